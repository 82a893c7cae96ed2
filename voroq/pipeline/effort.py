"""How much work a result is worth: three presets between an untuned run and everything that paid (docs/vptq.md has the ablation).

    fast       the method alone, block by block; memory of one block
    balanced   bits allocated by what every linear is worth, then the whole model tuned towards the original's logits
    best       the same with more search in every table, and a tuning as long as it pays

The last two hold the original and the quantized model in memory at once, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from voroq.pipeline.plan import Budget
from voroq.tuning.loop import Tuning


@dataclass(frozen=True)
class Effort:
    """`options` are the method's own, by method; what the user asks for comes first. `allocate` lets a budget be spent by sensitivity."""

    tuning: Tuning | None = None
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    allocate: bool = False

    def completed(self, method: str, options: Mapping[str, str]) -> dict[str, str]:
        """The user's options for `method`, with this effort's where there are none."""
        return {**self.options.get(method, {}), **options}

    def allocates(self, plan: object) -> bool:
        """Whether `plan` is a budget to be allocated; where the settings are given there is nothing to allocate."""
        return self.allocate and isinstance(plan, Budget)


_BALANCED = Tuning(steps=120, batch=4, rate=0.01, moves=0.02, move_rate=0.01, guide=1.0, head_rate=0.0005)
_BEST = replace(_BALANCED, steps=1800, move_rate=0.0034)

EFFORTS = {
    "fast": Effort(),
    "balanced": Effort(_BALANCED, allocate=True),
    "best": Effort(_BEST, {"vptq": {"rounds": "4"}}, allocate=True),
}
