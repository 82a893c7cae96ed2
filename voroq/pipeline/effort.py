"""How much work a result is worth: three presets between an untuned run and everything that paid (docs/vptq.md has the ablation).

    fast       for tables and pyramids bits allocated by what every linear is worth, else the method alone; memory of one block
    balanced   the same with text by the model itself beside the calibration text and, for VPTQ, without the channels of MLPs that do not
               pay; then the whole model tuned towards the original's logits
    best       with more such text, more windows where they are short, more search in every table and, by annealing, among the codes, and
               a tuning as long as it pays

The last two hold the original and the quantized model in memory at once, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from voroq.methods import METHODS
from voroq.pipeline.plan import Budget
from voroq.tuning.loop import Tuning


@dataclass(frozen=True)
class Effort:
    """`options` are the method's own, by method; what the user asks for comes first. The budgets of the methods in `allocate` are spent
    by sensitivity."""

    tuning: Tuning | None = None
    tokens: int = 0
    """calibration tokens that moments are of at least: more windows where a run is asked for short ones"""
    own_text: int = 0
    """documents that the model writes itself, to calibrate on beside the text"""
    narrower: bool = False
    """whether channels of MLPs may be left out, where the plan says that it pays"""
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    allocate: frozenset[str] = frozenset()

    def completed(self, method: str, options: Mapping[str, str]) -> dict[str, str]:
        """The user's options for `method`, with this effort's where there are none."""
        return {**self.options.get(method, {}), **options}

    def allocates(self, plan: object) -> bool:
        """Whether `plan` is a budget to be allocated; where the settings are given there is nothing to allocate."""
        return isinstance(plan, Budget) and plan.method in self.allocate


EVERY = frozenset(METHODS)
_BALANCED = Tuning(
    steps=340,
    batch=4,
    rate=0.006,
    moves=0.02,
    move_rate=0.0079,
    guide=1.0,
    head_rate=0.0005,
    embedding_rate=0.002,
    embedding_steps=100,
)
_BEST = replace(_BALANCED, steps=2000, samples=8192, rate=0.004, move_rate=0.0031, head_rate=0.0015, embedding_steps=400)

EFFORTS = {
    "fast": Effort(allocate=frozenset({"vptq", "pvq"})),
    "balanced": Effort(_BALANCED, own_text=512, narrower=True, allocate=EVERY),
    "best": Effort(
        _BEST,
        tokens=1 << 19,
        own_text=4096,
        narrower=True,
        options={"vptq": {"rounds": "4", "restarts": "3", "anneal": "400"}},
        allocate=EVERY,
    ),
}
