"""What is in a model folder, from its config and file headers alone: no tensor is read, so any size takes a second."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from voroq.errors import VoroqError
from voroq.kernels import pick
from voroq.packed.base import Spec
from voroq.packed.checkpoint import Folder, open_folder
from voroq.packed.codebooks import GridForm, PulsesForm, PyramidForm
from voroq.packed.legacy import OldSpec
from voroq.packed.native_format import NativeSpec, Run
from voroq.packed.vptq_format import VptqSpec

REPORT = "voroq_report.json"


@dataclass(frozen=True)
class Site:
    """One quantized linear: `shape` (out, in), `bytes` stored for it, its bias excepted, the loss the report gives (None without), and the
    kernel that multiplies it on this machine's CPU."""

    name: str
    shape: tuple[int, int]
    layout: str
    settings: str
    bits_per_weight: float
    bytes: int
    loss: float | None
    kernel: str


@dataclass(frozen=True)
class Rest:
    """One tensor that is stored as it was."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """`bits_per_weight`: everything stored for the sites, over their weights; of a model without sites, over its matrices.

    `unquantized_share`: of all parameters, how many are stored as they were. `file_bytes`: its safetensors files.
    """

    path: str
    quant_method: str | None
    method: str | None
    bits_per_weight: float
    quantized_weights: int
    quantized_bytes: int
    unquantized_share: float
    unquantized_bytes: int
    file_bytes: int
    sites: list[Site]
    unquantized: list[Rest]


def inspect_folder(path: str | Path) -> Inspection:
    """Raises VoroqError or FormatError for a folder that is no model, or whose files contradict its config."""
    if not (Path(path) / "config.json").is_file():
        raise VoroqError(f"{path} has no config.json: give the folder of a model")
    folder = open_folder(path)
    if folder.specs is not None and any(folder.specs.lacks_shape(name) for name in folder.names()):
        from voroq.integrations.shapes import open_model_folder  # brings transformers, which nothing else here needs

        folder = open_model_folder(path)
    report = read_report(path)
    losses = {site.get("name"): site.get("loss") for site in report.get("sites", []) if isinstance(site, dict)}
    specs = folder.sites()
    sites = [_site(folder, name, spec, losses.get(name)) for name, spec in specs.items()]
    owned = {f"{name}.{stored.name}" for name, spec in specs.items() for stored in spec.layout()}
    rest = [Rest(t.name, t.shape, str(t.dtype).removeprefix("torch."), t.size) for t in folder.tensors.values() if t.name not in owned]
    weights, stored = sum(prod(site.shape) for site in sites), sum(site.bytes for site in sites)
    kept = sum(prod(tensor.shape) for tensor in rest)
    matrices = [tensor for tensor in rest if len(tensor.shape) > 1]
    measured = (stored, weights) if sites else (sum(t.bytes for t in matrices), sum(prod(t.shape) for t in matrices))
    return Inspection(
        path=str(path),
        quant_method=None if folder.specs is None else folder.specs.method,
        method=report.get("method"),
        bits_per_weight=8 * measured[0] / max(1, measured[1]),
        quantized_weights=weights,
        quantized_bytes=stored,
        unquantized_share=kept / max(1, kept + weights),
        unquantized_bytes=sum(tensor.bytes for tensor in rest),
        file_bytes=file_bytes(path),
        sites=sites,
        unquantized=rest,
    )


def file_bytes(folder: str | Path) -> int:
    """Bytes of all safetensors files of a model folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def read_report(folder: str | Path) -> dict:
    """The report of the run that wrote `folder`, or {} where there is none (a model that others quantized)."""
    path = Path(folder) / REPORT
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VoroqError(f"{path} is damaged ({error}): delete it, the model itself does not need it") from error
    return report if isinstance(report, dict) else {}


def _site(folder: Folder, name: str, spec: Spec, loss: float | None) -> Site:
    stored = folder.stored_bytes(name, spec)
    return Site(name, tuple(spec.shape), spec.method, settings(spec), 8 * stored / prod(spec.shape), stored, loss, _kernel(spec))


def _kernel(spec: Spec) -> str:
    return pick(spec, torch.empty(1, spec.shape[1]))


def settings(spec: Spec) -> str:
    """A spec in the field's shorthand: "v4 k256+16 perm" is vectors of 4, 256 centroids, 16 residual ones, a stored permutation."""
    if isinstance(spec, OldSpec):
        return f"{settings(spec.current)} {'unpacked' if spec.unpacked else 'old'}"
    if isinstance(spec, VptqSpec):
        words = [f"v{spec.vector} k{spec.k}" + ("" if spec.residual is None else f"+{spec.residual}")]
        if spec.groups > 1:
            words.append(f"{spec.groups} groups")
        if spec.outliers is not None:
            words.append(f"{spec.outliers.columns} outliers v{spec.outliers.vector} k{spec.outliers.k}")
        words += ["row norm" if spec.norm_dim else "norm"] if spec.norm else []
        words += ["perm"] if spec.perm else []
        return " ".join(words)
    if isinstance(spec, NativeSpec):
        inputs = [] if spec.activations is None else [f"inputs in {spec.activations.bits} bits ({spec.activations.kind})"]
        return ", ".join([*(_run(run) for run in spec.runs), *spec.steps, *inputs])
    return type(spec).__name__


def _run(run: Run) -> str:
    if isinstance(run.form, GridForm):
        return f"{run.form.bits} bit" + (f" g{run.columns}" if run.count > 1 else f" x{run.columns}")
    if isinstance(run.form, PyramidForm):
        return f"{run.tile.rows}x{run.tile.cols} {run.form.kind} {run.width} bits"
    if isinstance(run.form, PulsesForm):
        return f"{run.tile.rows}x{run.tile.cols} pulses of {run.form.entry} bits"
    words = "+".join(str(1 << width) for width in run.form.widths)
    return f"{run.tile.rows}x{run.tile.cols} k{words}" + (f" {run.count} groups" if run.count > 1 else "")


def inspection_view(found: Inspection) -> Group:
    """Sites, then totals, then what is kept as it was, by kind and largest first."""
    sites = Table("site")
    for column in ("shape", "layout", "settings", "kernel", "bits/weight", "loss"):
        sites.add_column(column, justify="right" if column in ("shape", "bits/weight", "loss") else "left")
    for site in found.sites:
        loss = "-" if site.loss is None else f"{site.loss:.4f}"
        shape, bits = f"{site.shape[0]}x{site.shape[1]}", f"{site.bits_per_weight:.3f}"
        sites.add_row(Text(site.name), shape, site.layout, site.settings, site.kernel, bits, loss)
    totals = Table(show_header=False, box=None)
    over = f" over {found.quantized_weights:,} weights of {len(found.sites)} linears" if found.sites else ""
    totals.add_row("quantization", "none" if found.quant_method is None else f"{found.method or '?'} (layout {found.quant_method})")
    totals.add_row("bits per weight", f"{found.bits_per_weight:.3f}{over}")
    totals.add_row("quantized", f"{found.quantized_bytes / 1e6:.2f} MB")
    totals.add_row("kept as it was", f"{found.unquantized_bytes / 1e6:.2f} MB, {100 * found.unquantized_share:.1f} % of all parameters")
    totals.add_row("weight files", f"{found.file_bytes / 1e6:.2f} MB")
    kinds: dict[str, int] = {}
    for tensor in found.unquantized:
        kind = f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', tensor.name)}  {tensor.dtype}"
        kinds[kind] = kinds.get(kind, 0) + tensor.bytes
    kept = Table("kept as it was", "MB")
    for kind, size in sorted(kinds.items(), key=lambda pair: -pair[1]):
        kept.add_row(Text(kind), f"{size / 1e6:.3f}")
    return Group(Text(found.path), *([sites] if found.sites else []), totals, kept)
