"""Plans that know what every site is worth, and the file they are kept in, to be read and edited by people.

    {"voroq_plan": 1, "sites": [{"name": "model.layers.0.mlp.up_proj", "method": "vptq", "options": {"vector_length": 4, ...}}, ...]}

`name` may be a glob; the first that matches a site decides; `method` null leaves its sites as they are. Whatever else stands beside them
(bits, kl, shape) is for the reader.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voroq.errors import VoroqError
from voroq.methods import METHODS, VPTQ, Method, probing, tile_height
from voroq.packed.files import write_json
from voroq.pipeline.calibration import Texts
from voroq.pipeline.channels import Channels, channels_of
from voroq.pipeline.model import OpenModel, open_model
from voroq.pipeline.plan import Budget, Plan, distortion, parse_options, steep
from voroq.pipeline.preflight import prepare
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.sensitivity import Worths, probe
from voroq.pipeline.source import open_source
from voroq.pipeline.work import resolve_devices

RATE = ("vector_length", "table_bits", "bits", "group_size", "dim")
"""Options that set how many bits a method stores."""
PROBE_SAMPLES = 64
"""Calibration windows a probe takes by default."""


@dataclass(frozen=True)
class Planned:
    """`plan`, and a row per site: name, shape, method, options, bits per weight, and the KL in nats per token it is expected to cost."""

    plan: Plan
    rows: tuple[dict[str, Any], ...]
    bits_per_weight: float
    kl: float
    channels: int | None = None
    """of every MLP, where the plan is for a model with fewer than there are"""

    def write(self, path: Path, source: str) -> None:
        """The plan file, written whole or not at all."""
        data = {"voroq_plan": 1, "source": source, "bits_per_weight": self.bits_per_weight, "kl": self.kl, "sites": self.rows}
        write_json(path, data)


def plan_model(
    source: str | Path,
    budget: Budget | Plan,
    *,
    size: int | None = None,
    narrower: bool = False,
    calibration: Texts = None,
    samples: int | None = None,
    context: int | None = None,
    interleave: bool = True,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Planned:
    """Settings for every site of the model in `source` such that `budget` (or files of `size` bytes in all) holds and the expected
    divergence from the model is least. One pass over `samples` calibration windows measures what every site is worth, with its channels
    `interleave`d or not, as the run will have them. With `narrower` the plan may be for the model with fewer channels in its MLPs, so
    many as it says; its bits are then for the weights that are left, as many in all.

    Raises VoroqError where no setting fits, or the model cannot be probed.
    """
    progress = progress or Silent()
    if not isinstance(budget, Budget):
        raise VoroqError("there is nothing to allocate: the options set the rate; give --bits, and no option that sets the rate")
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    model = open_model(origin, device=resolve_devices(device)[0])
    sites = [(site.name, site.shape) for index in range(model.n_blocks) for site in model.sites(index)]
    if size is not None:
        budget = dataclasses.replace(budget, bits=_bits_for(size, model, sites))
    ready = prepare(
        model,
        budget,
        calibration=calibration,
        samples=PROBE_SAMPLES if samples is None else samples,
        context=context,
        mode="parallel",
        seed=seed,
        progress=progress,
    )
    if interleave:
        model.interleave(lambda name: tile_height(ready.plan.method_for(name)))
    channels = _channels(model, progress) if narrower and budget.method == "vptq" else None
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(None, tuple((name, probing(method)) for name, method in ready.plan.rules))
        rest = {"seed": seed, "folder": Path(folder), "progress": progress, "channels": channels}
        measured = probe(model, plan, ready.windows, dtype=ready.dtype, **rest)
    progress.done()
    dealt = [group for groups in model.interleaved.values() for group in groups] if budget.method == "vptq" else []
    known = Measured(budget, tuple(sites), 8 * ready.dtype.itemsize, measured, ready.plan, tuple(dealt))
    return min((known.planned(channels, step) for step in range(len(channels.steps) if channels else 1)), key=lambda planned: planned.kl)


@dataclass(frozen=True)
class Measured:
    """What the `sites` of a model, name and shape each, are worth (`worths`) where they are rounded as `probed` says. Those that are
    `dealt` channels together have tiles of one height."""

    budget: Budget
    sites: tuple[tuple[str, tuple[int, int]], ...]
    float_bits: int
    worths: Worths
    probed: Plan
    dealt: tuple[Sequence[str], ...]

    def planned(self, channels: Channels | None = None, step: int = 0) -> Planned:
        """The best settings; with the cheapest channels of every MLP left out, so many as `step` says, whose bits the others have."""
        gone = channels.steps[step] if step else 0
        shapes = {name: channels.narrowed(name, shape, gone) if gone else shape for name, shape in self.sites}
        whole, weights = (sum(map(math.prod, each.values())) for each in (dict(self.sites), shapes))
        budget = dataclasses.replace(self.budget, bits=self.budget.bits * whole / weights)

        def cost(name: str, method: Method) -> float:
            worth, width = self.worths.sites[name], dict(self.sites)[name][1]
            before = self._relative(name, self.probed.method_for(name), width, 0)
            tighter = worth.tighter[step] if worth.tighter else 1.0
            return tighter * worth.kl * self._relative(name, method, shapes[name][1], width - shapes[name][1]) / before

        plan = budget.plan(list(shapes.items()), float_bits=self.float_bits, cost=cost, together=self.dealt)
        rows = []
        for name, shape in shapes.items():
            method = plan.method_for(name)
            bits = method.stored_bits(shape, self.float_bits) / math.prod(shape)
            row = {"name": name, "shape": list(shape), "method": budget.method, "options": _options(method)}
            rows.append({**row, "bits": bits, "kl": cost(name, method)})
        total = sum(row["bits"] * math.prod(row["shape"]) for row in rows) / weights
        kl = sum(row["kl"] for row in rows) + (self.worths.left_out[step] if gone else 0)
        return Planned(plan, tuple(rows), total, kl, channels.width - gone if gone else None)

    def _relative(self, name: str, method: Method, width: int, gone: int) -> float:
        """What the errors of a setting cost a site of so many columns, and of so many more that are gone, up to a factor of its own."""
        error = distortion(method)
        thinned = method.columns(width)[0] if isinstance(method, VPTQ) and method.outliers == "cheapest" else 0
        if thinned + gone:
            error = self.worths.sites[name].thinning.error(thinned, error, gone)
        return steep(error)


def _channels(model: OpenModel, progress: Progress) -> Channels | None:
    """The channels that may be left out, if any; where the model cannot be pruned, that is said."""
    try:
        return channels_of(model)
    except VoroqError as error:
        progress.warn(f"all channels stay: {error}")
        return None


def can_plan(source: str | Path, *, device: str, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether what the linears of the model in `source` are worth can be measured: it needs a language model head."""
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    return open_model(origin, device=resolve_devices(device)[0]).skeleton.get_output_embeddings() is not None


def read_plan(path: str | Path) -> Plan:
    """The plan in a file, perhaps edited. Raises VoroqError naming the entry that is wrong and what is needed."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VoroqError(f"no plan {path} ({error.strerror}); write one with voroq plan") from error
    except ValueError as error:
        raise VoroqError(f"{path} is not JSON ({error}); write a plan with voroq plan") from error
    if not isinstance(data, dict) or data.get("voroq_plan") != 1 or not isinstance(data.get("sites"), list):
        raise VoroqError(f'{path} is not a plan: it needs "voroq_plan": 1 and a list "sites"')
    return Plan(None, tuple(_rule(entry, f"{path}, site {place}") for place, entry in enumerate(data["sites"])))


def _rule(entry: Any, where: str) -> tuple[str, Method | None]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "method" not in entry:
        raise VoroqError(f'{where}: needs "name" and "method"')
    name, method, options = entry["name"], entry["method"], entry.get("options", {})
    if method is None:
        return name, None
    if method not in METHODS:
        raise VoroqError(f"{where} ({name}): unknown method {method!r}; choose one of {', '.join(METHODS)}, or null")
    if not isinstance(options, dict):
        raise VoroqError(f'{where} ({name}): "options" must be an object')
    try:
        return name, METHODS[method](**parse_options(method, {key: str(value) for key, value in options.items()}))
    except VoroqError as error:
        raise VoroqError(f"{where} ({name}): {error}") from error


def _options(method: Any) -> dict[str, Any]:
    """The fields that set the rate, and what else differs from the method's defaults."""
    plain = type(method)()
    found = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in found.items() if name in RATE or value != getattr(plain, name)}


def _bits_for(size: int, model: OpenModel, sites: list[tuple[str, tuple[int, int]]]) -> float:
    """Bits per weight of the linears with which all tensors take `size` bytes."""
    weights = sum(math.prod(shape) for _, shape in sites)
    others = sum(entry.size for name, entry in model.source.tensors.items() if not model.site_of(name))
    bits = 8 * (size - others) / weights
    if bits <= 0:
        raise VoroqError(f"{size} bytes are less than the {others} that embeddings, norms and head take; give a larger --size")
    return bits
