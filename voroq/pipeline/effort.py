"""How much work a result is worth: three presets between an untuned run and everything that paid.

    fast       the method alone, block by block; memory of one block
    balanced   then the whole model tuned towards the original's logits
    best       more search in every table, and a longer tuning

The last two hold the original and the quantized model in memory at once, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from voroq.tuning.loop import Tuning


@dataclass(frozen=True)
class Effort:
    """`options` are the method's own, by method; what the user asks for comes first."""

    tuning: Tuning | None = None
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def completed(self, method: str, options: Mapping[str, str]) -> dict[str, str]:
        """The user's options for `method`, with this effort's where there are none."""
        return {**self.options.get(method, {}), **options}


EFFORTS = {
    "fast": Effort(),
    "balanced": Effort(Tuning(steps=100, moves=0.02)),
    "best": Effort(Tuning(steps=200, moves=0.02), {"vptq": {"rounds": "2", "sweeps": "2"}}),
}

