"""The hall: one quantized linear in memory, between the rooms that make it and the rooms that live with it.

A weight w [out in] is taken into another basis by a transform, its columns are cut into bands, each band into tiles of
`rows x cols` weights, and every tile is one word of the band's codebook. GPTQ's tile is 1x1, GPTVQ's 1xd, VPTQ's dx1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.base import Codebook
from voroq.shapes import Matrix, Vectors
from voroq.transform.chain import Chain


@dataclass(frozen=True)
class Tile:
    """A patch of `rows` outputs by `cols` inputs. `cut` and `join` are inverse up to the zero rows that pad `out`."""

    rows: int
    cols: int

    @property
    def size(self) -> int:
        return self.rows * self.cols

    def grid(self, out: int, columns: int) -> tuple[int, int]:
        """Tiles down and along a matrix of `out` x `columns`; the last row of tiles may be padded, columns must divide."""
        if columns % self.cols:
            raise ValueError(f"{columns} columns do not divide into tiles of {self.cols} columns; choose a tile width that divides them")
        return -(-out // self.rows), columns // self.cols

    def cut(self, w: Float[Tensor, "out c"]) -> Vectors:
        """Vectors [n rows*cols] in row-major order of the tile grid; missing rows are zero."""
        down, along = self.grid(*w.shape)
        w = torch.nn.functional.pad(w, (0, 0, 0, down * self.rows - w.shape[0]))
        return w.reshape(down, self.rows, along, self.cols).permute(0, 2, 1, 3).reshape(down * along, self.size)

    def join(self, v: Vectors, out: int) -> Float[Tensor, "out c"]:
        """Inverse of `cut` for a matrix of `out` rows."""
        down = -(-out // self.rows)
        along = v.shape[0] // down
        return v.reshape(down, along, self.rows, self.cols).permute(0, 2, 1, 3).reshape(down * self.rows, along * self.cols)[:out]


@dataclass(frozen=True)
class Band:
    """Columns start..stop (in the transformed order) written in one codebook.

    `scale` and `zero`, one per row of tiles, map words to weights: w = scale * (word - zero).
    """

    start: int
    stop: int
    tile: Tile
    codebook: Codebook
    scale: Float[Tensor, "rows"] | None = None
    zero: Float[Tensor, "rows"] | None = None

    def words(self, w: Float[Tensor, "out c"]) -> Vectors:
        """What the codebook is to say for columns `w`: word = w / scale + zero, tile by tile."""
        along = self.tile.grid(*w.shape)[1]
        words = self.tile.cut(w)
        if self.scale is not None:
            words = words / self.scale.repeat_interleave(along)[:, None]
        if self.zero is not None:
            words = words + self.zero.repeat_interleave(along)[:, None]
        return words

    def encode(self, w: Float[Tensor, "out c"], metric: Float[Tensor, "c c"] | None = None) -> Int[Tensor, "rows cols s"]:
        """Codes of columns `w`; `c` is a multiple of the tile's width (one tile wide when a metric is given)."""
        if metric is not None and self.tile.rows > 1:
            metric = torch.kron(torch.eye(self.tile.rows, dtype=w.dtype, device=w.device), metric)
        return self.codebook.encode(self.words(w), metric).reshape(*self.tile.grid(*w.shape), -1)

    def decode(self, codes: Int[Tensor, "rows cols s"], out: int) -> Float[Tensor, "out c"]:
        words = self.codebook.decode(codes.reshape(-1, codes.shape[-1]))
        if self.zero is not None:
            words = words - self.zero.repeat_interleave(codes.shape[1])[:, None]
        if self.scale is not None:
            words = words * self.scale.repeat_interleave(codes.shape[1])[:, None]
        return self.tile.join(words, out)


@dataclass(frozen=True)
class Slab:
    """A band still to be fitted when rounding reaches it: `fit(target [out c], start) -> Band` (GPTQ's groups)."""

    start: int
    stop: int
    fit: Callable[[Tensor], Band]


@dataclass(frozen=True)
class Quantized:
    """One quantized linear: `shape` (out, in), the basis, and the codes [rows cols s] of every band, in column order."""

    shape: tuple[int, int]
    transform: Chain
    bands: tuple[Band, ...]
    codes: tuple[Int[Tensor, "..."], ...] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the maker has to say about this matrix (dead columns, extra damping); the run puts it into its report."""

    def __post_init__(self) -> None:
        edges = [0, *[band.stop for band in self.bands]]
        if [band.start for band in self.bands] != edges[:-1] or edges[-1] != self.shape[1]:
            raise ValueError(f"bands must cover columns 0..{self.shape[1]} without gap, got edges {edges}")

    def stored(self) -> Matrix:
        """The weight in the transformed basis, [out in] in stored column order."""
        parts = [band.decode(codes, self.shape[0]) for band, codes in zip(self.bands, self.codes, strict=True)]
        return torch.cat(parts, dim=1)

    def dequantize(self) -> Matrix:
        """The weight [out in] in the original basis."""
        return self.transform.restore(self.stored())

    def linear(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """`x @ dequantize().T`, differentiable in centroids, scales and shifts."""
        stored = self.stored()
        return self.transform.linear(x, lambda inner: inner @ stored.T)


def reals(q: Quantized) -> dict[str, Tensor]:
    """Every real number stored for `q`, by place: tables "0/centroids", row scales "0/scale" (0 is the band), "basis/NAME" of the
    transform. Zero points are small integers and not among them."""
    found = {}
    for i, band in enumerate(q.bands):
        found |= {f"{i}/{name}": t for name, t in band.codebook.tensors().items()}
        if band.scale is not None:
            found[f"{i}/scale"] = band.scale
    found |= {f"basis/{name}": t for name, t in q.transform.tensors().items()}
    return {name: t for name, t in found.items() if t.is_floating_point()}


def with_reals(q: Quantized, tensors: Mapping[str, Tensor]) -> Quantized:
    """`q` with other real numbers, by the names of `reals`; what `tensors` leaves out stays."""

    def chosen(place: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors.get(f"{place}/{name}", t) for name, t in own.items()}

    bands = []
    for i, band in enumerate(q.bands):
        book = band.codebook.with_tensors(chosen(str(i), band.codebook.tensors()))
        bands.append(replace(band, codebook=book, scale=tensors.get(f"{i}/scale", band.scale)))
    return replace(q, bands=tuple(bands), transform=q.transform.with_tensors(chosen("basis", q.transform.tensors())))


def narrow(q: Quantized, dtype: torch.dtype) -> Quantized:
    """Round every real tensor of `q` to what `dtype` can hold (kept as float32), so that packing loses nothing.

    This is the only place where precision is given up on purpose.
    """

    def rounded(t: Tensor) -> Tensor:
        short = t.to(dtype)
        if not torch.isfinite(short).all():
            raise ValueError(
                f"a stored value does not fit in {dtype}: largest magnitude {t.abs().max().item():.4g}; use bfloat16 or float32"
            )
        return short.float()

    return with_reals(q, {name: rounded(t) for name, t in reals(q).items()})
