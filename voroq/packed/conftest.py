"""Random quantized linears and folders for tests: any tables and codes will do, methods are not needed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.codebook.pyramid import Pulses, Pyramids
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.packed.base import Packed
from voroq.packed.checkpoint import quantization_config
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack
from voroq.quantized import Band, Quantized, Tile
from voroq.transform.affine import ColumnAffine
from voroq.transform.chain import Chain
from voroq.transform.hadamard import Hadamard
from voroq.transform.permute import Permute
from voroq.transform.rows import RowAffine

GPTQMODEL = {
    "bits": 3,
    "group_size": -1,
    "desc_act": False,
    "lm_head": False,
    "method": "vptq",
    "quant_method": "vptq",
    "format": "vptq",
    "checkpoint_format": "vptq",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    "vector_lens": [3, 2],
    "num_centroids": [4, 8],
    "num_res_centroids": [-1, 4],
    "npercent": 5.0,
    "group_num": 2,
    "kmeans_mode": "hessian",
    "kmeans_iters": 100,
    "kmeans_tol": 1e-5,
    "kmeans_seed": 0,
    "enable_norm": True,
    "norm_dim": 0,
    "enable_perm": True,
    "block_size": 128,
    "percdamp": 0.01,
}
"""A `quantization_config` as GPTQModel 7.7 writes it."""


def random_transform(columns: int, steps: tuple[str, ...], rng: torch.Generator, out: int = 0) -> Chain:
    made = {
        "rows": lambda: RowAffine(torch.rand(out, generator=rng) + 0.5, torch.randn(out, generator=rng) / 8),
        "affine": lambda: ColumnAffine(torch.rand(columns, generator=rng) + 0.5, torch.randn(columns, generator=rng) / 8),
        "permute": lambda: Permute(torch.randperm(columns, generator=rng)),
        "rotate_in": lambda: Hadamard.random((out, columns), rng),
        "rotate_both": lambda: Hadamard.random((out, columns), rng, both=True),
    }
    return Chain(tuple(made[step]() for step in steps))


def random_table(sizes: tuple[int, ...], dim: int, rng: torch.Generator) -> Table | Residual:
    stages = tuple(Table(torch.randn(k, dim, generator=rng) / 4) for k in sizes)
    return stages[0] if len(stages) == 1 else Residual(stages)


def random_pyramids(dim: int, pulses: tuple[int, ...], spare: int, rng: torch.Generator) -> Pyramids:
    """With up to `spare` more bits than the points need."""
    scales = torch.rand(len(pulses), generator=rng) + 0.1
    return Pyramids(dim, pulses, scales, min(64, Pyramids(dim, pulses, scales).bits + spare))


def random_band(start: int, stop: int, tile: Tile, codebook, out: int, rng: torch.Generator, *, scale=False, zero=False):
    down, along = tile.grid(out, stop - start)
    codes = torch.stack([torch.randint(0, 2**width, (down, along), generator=rng) for width in codebook.widths], dim=-1)
    scales = torch.rand(down, generator=rng) / 4 + 0.1 if scale else None
    zeros = torch.randint(0, 2 ** codebook.widths[0], (out,), generator=rng).float() if zero else None
    return Band(start, stop, tile, codebook, scales, zeros), codes


def random_vptq(
    out: int, columns: int, seed: int, *, v: int = 4, sizes: tuple[int, ...] = (16,), groups: int = 1, outliers=(0, 2, 8), steps=()
) -> Quantized:
    """`outliers` = (columns, vector length, table size)."""
    rng = torch.Generator().manual_seed(seed)
    size, vector, k = outliers
    bands = [random_band(0, size, Tile(vector, 1), random_table((k,), vector, rng), out, rng)] if size else []
    edges = torch.linspace(size, columns, groups + 1).long().tolist()
    for start, stop in pairwise(edges):
        bands.append(random_band(start, stop, Tile(v, 1), random_table(sizes, v, rng), out, rng))
    transform = random_transform(columns, tuple(steps), rng, out)
    return Quantized((out, columns), transform, tuple(band for band, _ in bands), tuple(codes for _, codes in bands))


def random_gptq(out: int, columns: int, seed: int, *, bits: int = 3, group: int = 8, steps=("permute",)) -> Quantized:
    rng = torch.Generator().manual_seed(seed)
    edges = [*range(0, columns, group), columns]
    bands = [random_band(a, b, Tile(1, 1), Grid(bits), out, rng, scale=True, zero=True) for a, b in pairwise(edges)]
    transform = random_transform(columns, tuple(steps), rng)
    return Quantized((out, columns), transform, tuple(band for band, _ in bands), tuple(codes for _, codes in bands))


def random_pvq(out: int, columns: int, seed: int) -> Quantized:
    """One of six native linears, by `seed`: pyramids along and down, numbers of two words, gain and direction, tables on patches, pulses
    spelled out."""
    rng = torch.Generator().manual_seed(seed)
    tile, codebook, steps = [
        (Tile(1, 8), random_pyramids(8, (3, 2), 2, rng), ("rotate_in",)),
        (Tile(8, 1), random_pyramids(8, (4, 3, 1), 0, rng), ("affine", "rotate_both")),
        (Tile(1, 16), random_pyramids(16, (12, 10), 5, rng), ("permute",)),
        (Tile(1, 4), GainShape(4, 5, torch.rand(4, generator=rng) + 0.5), ("rotate_in",)),
        (Tile(2, 2), random_table((8, 4, 2), 4, rng), ("affine", "permute")),
        (Tile(8, 1), Pulses(8, (4, 9), torch.rand(2, generator=rng) + 0.1), ("rotate_in",)),
    ][seed % 6]
    bands = [random_band(a, a + columns // 2, tile, codebook, out, rng, scale=seed % 2 == 0) for a in (0, columns // 2)]
    transform = random_transform(columns, steps, rng, out)
    return Quantized((out, columns), transform, tuple(band for band, _ in bands), tuple(codes for _, codes in bands))


def assert_same(a: Quantized, b: Quantized) -> None:
    """Equal bit for bit in every part (integer types aside)."""
    assert a.shape == b.shape
    assert [type(step) for step in a.transform.steps] == [type(step) for step in b.transform.steps]
    assert a.transform.tensors().keys() == b.transform.tensors().keys()
    for name, tensor in a.transform.tensors().items():
        assert torch.equal(tensor, b.transform.tensors()[name]), name
    assert len(a.bands) == len(b.bands)
    for x, y, codes_x, codes_y in zip(a.bands, b.bands, a.codes, b.codes, strict=True):
        assert (x.start, x.stop, x.tile) == (y.start, y.stop, y.tile)
        assert (type(x.codebook), x.codebook.widths) == (type(y.codebook), y.codebook.widths)
        assert torch.equal(codes_x.long(), codes_y.long())
        for name, tensor in x.codebook.tensors().items():
            assert torch.equal(tensor, y.codebook.tensors()[name])
        for field in ("scale", "zero"):
            p, q = getattr(x, field), getattr(y, field)
            assert (p is None) == (q is None) and (p is None or torch.equal(p, q)), field


def write_folder(path: Path, linears: dict[str, Quantized], layout: str, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Packed]:
    """A folder with nothing but `linears` in it; their packed form."""
    packed = {name: pack(q, dtype, layout) for name, q in linears.items()}
    entries = [Entry.of(f"{name}.{local}", tensor) for name, p in packed.items() for local, tensor in p.tensors.items()]
    write_safetensors(path / "model.safetensors", entries, {"format": "pt"})
    write_json(path / "config.json", {"quantization_config": quantization_config(layout, {name: p.spec for name, p in packed.items()})})
    return packed


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> None:
    """Apply `change` to the tensors of a folder."""
    tensors = load_file(path / file)
    change(tensors)
    write_safetensors(path / file, [Entry.of(name, tensor.contiguous().clone()) for name, tensor in tensors.items()], {"format": "pt"})
