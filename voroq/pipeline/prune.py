"""Channels of MLPs that are worth next to nothing, left out: a plain model of the same architecture, a little narrower.

A channel costs what its column of down costs once all others have answered (`column_costs`). The cheapest of every block go, as many in
each, since a config has one width for all; what is left of down answers by least squares (`without_columns`), and the rows of gate and
up go with them. The bits that they would have taken are then there for others: to quantize the rest finer costs nothing in all.

Least squares answer for one MLP's output. What leaving out still costs the answers of the model, tuning lowers: some steps towards the
model as it was, of all linears of the blocks (`ANSWERING`).
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.methods.vptq import column_costs
from voroq.numerics.linalg import damped, kept_columns, padded_without, relative_proxy_loss
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.shards import write_index
from voroq.pipeline.activations import Activations
from voroq.pipeline.calibration import DEFAULT_SAMPLES, Texts, calibration_windows
from voroq.pipeline.channels import DAMPING, channels_of, mlp_of, narrowed_config
from voroq.pipeline.model import OpenModel, open_model
from voroq.pipeline.observe import observe_block
from voroq.pipeline.output import check_disk, check_new, copied, copy_companions
from voroq.pipeline.preflight import ACTIVATIONS_IN_MEMORY, check_tokens, window_length, windows_at_once
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.source import Source, open_source
from voroq.pipeline.tokenizer import load_tokenizer
from voroq.pipeline.tune import Tuned, check_head, check_memory, tune
from voroq.pipeline.work import resolve_devices
from voroq.tuning.loop import Tuning

ANSWERING = Tuning(samples=8192, batch=4, norm_rate=0.0001, weight_rate=0.0005, guide=1.0)
"""How the rest of the model is tuned to answer for what was left out; `steps` are asked for."""


def prune_model(
    source: str | Path,
    out: str | Path,
    *,
    channels: int | None = None,
    steps: int = 0,
    calibration: Texts = None,
    samples: int | None = None,
    context: int | None = None,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model `source` (folder or hub id) to the new folder `out` with `channels` of the channels in each of its MLPs, and tune
    what is left towards `source` for `steps` steps; return what was done. Memory holds one block, with steps two models.

    Raises VoroqError, before anything is written, for a model without one such MLP in every block, or one too large to be tuned.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    model = open_model(origin, device=resolve_devices(device)[0])
    found = channels_of(model, channels)
    tuning = replace(ANSWERING, steps=steps)
    if steps:
        check_head(model)
        check_memory(model)
    tokenizer, length = load_tokenizer(origin), window_length(model, context)
    texts = {"context": length, "seed": seed, "progress": progress}
    windows, _ = calibration_windows(tokenizer, calibration, samples=samples or DEFAULT_SAMPLES, **texts)
    more = calibration_windows(tokenizer, calibration, samples=tuning.samples, **texts)[0] if steps else windows
    check_tokens(windows, model)
    folder = Path(out)
    check_new(folder)
    check_disk(folder, (2 if steps else 1) * sum(entry.size for entry in origin.tensors.values()))
    job = Pruning(model, found.kept, windows_at_once(length), progress)
    tuned = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            first = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) if steps else folder
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            lost = job.write(first, model.capture(windows, job.batch, limit=ACTIVATIONS_IN_MEMORY, folder=scratch))
            copy_companions(origin.folder, first, code=origin.trust_remote_code)
            write_json(first / "config.json", narrowed_config(origin.config, found.key, found.kept))
            if steps:
                tuned = _taught(model, first, folder, more, tuning, seed=seed, progress=progress)
    except OSError as error:
        raise VoroqError(f"cannot write to {folder}: {error.strerror}; free some space, or choose another OUT") from error
    share = found.share(model)
    return {
        "source": str(source),
        "channels": found.kept,
        "of": found.width,
        "weights": round(share * model.linear_weights),
        "share_of_weights": share,
        "lost": lost,
        "tuning": tuned and {"steps": tuned.steps, "kl_before": tuned.before, "kl_after": tuned.after},
        "seconds": time.perf_counter() - began,
    }


def share_left(source: str | Path, channels: int, *, device: str, revision: str | None = None, trust_remote_code: bool = False) -> float:
    """How many of the weights of the linears in `source` are left with so many channels. Raises VoroqError where it cannot be pruned so."""
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    model = open_model(origin, device=resolve_devices(device)[0])
    return channels_of(model, channels).share(model)


def _taught(
    model: OpenModel, first: Path, folder: Path, windows: Int[Tensor, "windows ctx"], tuning: Tuning, *, seed: int, progress: Progress
) -> Tuned:
    """Tune the pruned model in `first` towards `model`; `folder` gets its tensors, file by file, then what goes with them, config last."""
    source = open_source(first, trust_remote_code=model.source.trust_remote_code)
    pruned = open_model(source, device=model.device)
    stored = {name: pruned.plain_source(name) for name, _ in pruned.skeleton.named_parameters()}
    free = frozenset(name for name, found in stored.items() if found is not None)
    blocks = [pruned.block_name(index) for index in range(pruned.n_blocks)]
    rest = {"blocks": blocks, "seed": seed, "state": None, "progress": progress}
    done = tune(model.whole(), pruned.whole(), windows, tuning, free=free, **rest)
    changed = {stored[name]: t.to(source.tensors[stored[name]].dtype).cpu() for name, t in done.others.items()}
    for file in source.files():
        names = [name for name, entry in source.tensors.items() if entry.file == file]
        write_safetensors(folder / file, _entries(source, names, changed), {"format": "pt"})
    for path in sorted(first.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name not in source.files():
            path.replace(folder / path.name)
    return done


def _entries(source: Source, names: Sequence[str], changed: Mapping[str, Tensor]) -> list[Entry]:
    """The tensors `names` to be written, as they are in `source` unless `changed`."""
    return [Entry.of(name, changed[name].contiguous()) if name in changed else copied(source, name) for name in names]


@dataclass(frozen=True)
class Pruning:
    """What the block loop needs."""

    model: OpenModel
    channels: int
    batch: int
    progress: Progress

    def write(self, folder: Path, states: Activations) -> list[float]:
        """Write all tensors, a file for every block; the share of its output that each down loses."""
        model, source = self.model, self.model.source
        lost, places, size = [], {}, 0
        count = model.n_blocks + 1
        with states:
            for index in range(count):
                names, changed = model.outer_tensors(), {}
                if index < model.n_blocks:
                    self.progress.stage(f"pruning block {index + 1} of {model.n_blocks}")
                    names = model.block_tensors(index)
                    changed, share = self._block(index, states)
                    lost.append(share)
                file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
                entries = _entries(source, names, changed)
                write_safetensors(folder / file, entries, {"format": "pt"})
                places |= dict.fromkeys(names, file)
                size += sum(entry.size for entry in entries)
        write_index(folder, places, size)
        return lost

    def _block(self, index: int, states: Activations) -> tuple[dict[str, Tensor], float]:
        """The MLP's tensors of block `index`, by their names on disk, and the share of its output that down loses; `states` move on."""
        model = self.model
        block = model.load_block(index)
        mlp = mlp_of(model, block, index)
        down = mlp.names[0]
        moments, _ = observe_block(model, block, index, states, self.batch, sites=[down], outputs=states)
        h, _ = damped(moments[down].hessian(), DAMPING)
        w = mlp.down.weight.detach().float()
        gone = column_costs(w, h).argsort(stable=True)[: w.shape[1] - self.channels]
        kept, padded = kept_columns(w, gone), padded_without(w, h, gone)
        new = {down: padded[:, kept]} | {name: _rows(up, kept) for name, up in zip(mlp.names[1:], mlp.ups, strict=True)}
        tensors = {}
        for name, weight in new.items():
            stored = model.plain_source(f"{name}.weight")
            tensors[stored] = weight.to(model.source.tensors[stored].dtype).cpu().contiguous()
        model.drop_block(index)
        return tensors, relative_proxy_loss(w, padded, h)


def _rows(up: nn.Linear, kept: Bool[Tensor, "n"]) -> Tensor:
    """The rows of `up` that make the channels `kept`; several per channel where linears are fused."""
    return up.weight.detach()[kept.repeat(up.out_features // kept.shape[0])]
