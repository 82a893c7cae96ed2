"""Rounding in a metric of two sides: an error costs what its input makes of it, and what its output does to the model's loss.

With H = E[x x^T] of a linear's inputs and G = E[g g^T] of the gradients of the log-likelihood at its outputs, an error E of the weight
[out in] moves the model's answers by about

    KL = 1/2 tr(G E H E^T)

(the Fisher matrix, taken as a Kronecker product: Martens & Grosse 2015; for rounding: YAQA, Tseng et al. 2025). Rows are then no longer
independent. With inv(G) = V^T V, V upper triangular, and F_r what row block r is off once it has answered the blocks before it,

    tr(G E H E^T) = sum_r tr(D_r F_r H F_r^T)          D_r = inv(V_rr^T V_rr)

so the two-sided loop is the one-sided one (`feedback.py`) inside another: bands in order, in each rows of tiles top down, columns along
each, vectors searched in the metric D_r, both kinds of error fed forward. `descend` then goes over all tiles again in the exact metric, and
`anneal` at falling temperatures. All take tiles one column wide. With G the identity they do what `feedback.py` and `descent.py` do.

On a CPU with the library of kernels, tables and pyramids in float32 go there, one or some rows of tiles at a time.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq import native
from voroq.codebook.base import Codebook
from voroq.codebook.pyramid import Pulses
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.numerics.linalg import inverse_factor
from voroq.numerics.nearest import is_native
from voroq.quantized import Band
from voroq.rounding.descent import cooling, noise
from voroq.rounding.feedback import Rounded, conditional_metric
from voroq.shapes import Matrix, Square

PADDING = 1e-3
"""What an error in a row that only pads the last tile counts, relative to the mean row."""


def kronecker_loss(delta: Matrix, h: Square, g: Float[Tensor, "out out"]) -> Float[Tensor, "out"]:
    """Diagonal of G delta H delta^T: what each row adds to tr(G delta H delta^T)."""
    return ((g @ delta @ h) * delta).sum(1)


def feedback(w: Matrix, h: Square, g: Float[Tensor, "out out"], bands: Sequence[Band], *, lazy: int = 128) -> Rounded:
    """Round `w` [out in] under the positive definite `h` [in in] and `g` [out out].

    Band by band, whatever heights their tiles have: what later columns owe for an error in earlier ones does not depend on G. About
    `lazy` rows of a band are finished before the rest of it is updated; it changes the speed, not the result.
    """
    u, v = inverse_factor(h), inverse_factor(g)
    rest, targets, codes = w.clone(), [], []
    for band in bands:
        columns = slice(band.start, band.stop)
        inside = u[columns, columns].contiguous()
        target, part = _feedback_band(rest[:, columns], inside, v, PADDING * g.diagonal().mean(), band, lazy)
        if band.stop < w.shape[1]:
            left = rest[:, columns] - band.decode(part, w.shape[0])
            rest[:, band.stop :] -= torch.linalg.solve_triangular(inside, left, upper=True, left=False) @ u[columns, band.stop :]
        targets.append(target)
        codes.append(part)
    return _result(w, h, g, bands, codes, torch.cat(targets, dim=1))


def descend(
    w: Matrix, h: Square, g: Float[Tensor, "out out"], bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, lazy: int = 128
) -> Rounded:
    """`codes` after at most `sweeps` sweeps over all tiles, each rounded again given all the others; fewer where a sweep moves nothing.

    A code moves only where that lowers tr(G E H E^T), so the loss never rises. About `lazy` rows of a band are finished before the
    rest of it hears of them; it changes the speed, not the result. `targets` are the weights themselves.
    """
    return _swept(w, h, g, bands, codes, lambda loss: [0.0] * sweeps, None, lazy)


def anneal(
    w: Matrix,
    h: Square,
    g: Float[Tensor, "out out"],
    bands: Sequence[Band],
    codes: Sequence[Tensor],
    *,
    sweeps: int,
    rng: torch.Generator,
    lazy: int = 128,
) -> Rounded:
    """`codes` after `sweeps` sweeps at falling temperatures (`descent.py` says what for); `rng` is a CPU generator."""
    return _swept(w, h, g, bands, codes, lambda loss: cooling(loss, sweeps), rng, lazy)


def _swept(
    w: Matrix,
    h: Square,
    g: Float[Tensor, "out out"],
    bands: Sequence[Band],
    codes: Sequence[Tensor],
    heats: Callable[[float], Sequence[float]],
    rng: torch.Generator | None,
    lazy: int,
) -> Rounded:
    out = w.shape[0]
    room = max(-(-out // band.tile.rows) * band.tile.rows for band in bands)
    error, weights = _padded(w, g, room)
    codes = [part.clone(memory_format=torch.contiguous_format) for part in codes]  # as the library walks them
    for band, part in zip(bands, codes, strict=True):
        tall = part.shape[0] * band.tile.rows
        error[:tall, band.start : band.stop] -= band.decode(part, tall)
    strips = [_Strip.of(band, part, h, weights, lazy) for band, part in zip(bands, codes, strict=True)]
    for heat in heats(float(kronecker_loss(error[:out], h, g).sum()) / w.numel()):
        moves = sum(strip.sweep(part, error, h, weights, heat, rng) for strip, part in zip(strips, codes, strict=True))
        if not moves and not heat:
            break
    return _result(w, h, g, bands, codes, w)


@dataclass(frozen=True)
class _Strip:
    """A band with what its sweeps need over and over: the metric of every row of tiles, what undoes it, the curvature along the columns,
    and for every `group` of rows G times those inverses, which says what a row's steps are to the rows below."""

    band: Band
    metrics: Float[Tensor, "rows v v"]
    inverses: Float[Tensor, "rows v v"]
    curvature: Float[Tensor, "c c"]
    group: int
    below: tuple[Float[Tensor, "n n"], ...]

    @staticmethod
    def of(band: Band, codes: Int[Tensor, "rows c s"], h: Square, weights: Float[Tensor, "m m"], lazy: int) -> "_Strip":
        height, count, columns = band.tile.rows, codes.shape[0], slice(band.start, band.stop)
        metrics = torch.stack([weights[top : top + height, top : top + height] for top in range(0, count * height, height)])
        inverses, group = _inverse(metrics), max(1, lazy // height)
        below = []
        for first in range(0, count, group):
            part = inverses[first : first + group]
            rows = slice(first * height, (first + len(part)) * height)
            below.append(torch.einsum("mrv,rvw->mrw", weights[rows, rows].unflatten(1, (-1, height)), part).flatten(1).contiguous())
        return _Strip(band, metrics, inverses, h[columns, columns].contiguous(), group, tuple(below))

    def sweep(
        self,
        codes: Int[Tensor, "rows c s"],
        error: Float[Tensor, "m in"],
        h: Square,
        weights: Float[Tensor, "m m"],
        heat: float,
        rng: torch.Generator | None,
    ) -> int:
        """One sweep over all rows of tiles; `codes` and `error` move in place. The number of moves."""
        height, columns, moves = self.band.tile.rows, slice(self.band.start, self.band.stop), 0
        shaken = self._shaken(heat, rng) if heat else None
        for at, first in enumerate(range(0, codes.shape[0], self.group)):
            part = codes[first : first + self.group]
            rows = slice(first * height, (first + len(part)) * height)
            pulls = (weights[rows] @ error) @ h[:, columns]
            if shaken is not None:
                pulls += shaken[first : first + self.group].flatten(0, 1)
            left = error[rows, columns].contiguous()
            moves += self._descend(at, pulls, left, part)
            error[rows, columns] = left
        return moves

    def _descend(self, at: int, pulls: Float[Tensor, "n c"], error: Float[Tensor, "n c"], codes: Int[Tensor, "r c s"]) -> int:
        """One sweep along the `at`-th group of rows; `pulls`, which are G E H there, `error` and `codes` move in place."""
        first, height, below = at * self.group, self.band.tile.rows, self.below[at]
        tables = _tables(self.band, pulls)
        if tables is not None:
            metrics, inverses = self.metrics[first : first + len(codes)], self.inverses[first : first + len(codes)]
            rows = native.Rows(metrics.data_ptr(), inverses.data_ptr(), below.data_ptr(), len(codes), pulls.shape[1])
            count, moving = ctypes.c_int64(0), (pulls.data_ptr(), error.data_ptr(), codes.data_ptr())
            native.call("voroq_descend_tiles", tables, rows, self.curvature.data_ptr(), *moving, ctypes.byref(count))
            return count.value
        moves = 0
        for row in range(len(codes)):
            here, after = slice(row * height, (row + 1) * height), slice((row + 1) * height, None)
            before = pulls[here].clone()
            moves += _descend_tile(pulls[here], error[here], self, first + row, codes[row])
            pulls[after] += below[after, here] @ (pulls[here] - before)
        return moves

    def _shaken(self, heat: float, rng: torch.Generator | None) -> Float[Tensor, "rows v c"]:
        """Noise for the pulls that puts the targets off by what a temperature of `heat` allows."""
        drawn = noise((*self.metrics.shape[:2], len(self.curvature)), self.metrics, rng)
        return (torch.linalg.cholesky(self.metrics) @ drawn) * (heat * self.curvature.diagonal()).sqrt()


def _feedback_band(
    w: Float[Tensor, "out c"], u: Float[Tensor, "c c"], v: Float[Tensor, "out out"], padding: Tensor, band: Band, lazy: int
) -> tuple[Float[Tensor, "out c"], Int[Tensor, "rows c s"]]:
    """Targets and codes of the columns `w` of a band, a row of tiles after the other. Rows that only pad the last count `padding`."""
    out, height = w.shape[0], band.tile.rows
    room = -(-out // height) * height
    rest, codes = torch.nn.functional.pad(w, (0, 0, 0, room - out)), _room(band, room)
    below = torch.eye(room, dtype=v.dtype, device=v.device) / padding.sqrt()
    below[:out, :out] = v
    targets = torch.empty_like(rest)
    group = max(1, lazy // height) * height
    for first in range(0, room, group):
        last = min(first + group, room)
        owed = torch.empty_like(rest[first:last])
        for top in range(first, last, height):
            rows = slice(top, top + height)
            here = below[rows, rows]
            target = rest[rows].clone()
            errors = _feedback_tile(target, u, conditional_metric(here), band, top // height, codes[top // height])
            targets[rows] = target
            made = target - errors * u.diagonal()
            error = torch.linalg.solve_triangular(here.T, rest[rows] - made, upper=False)
            rest[top + height : last] -= below[rows, top + height : last].T @ error
            owed[top - first : top + height - first] = error
        rest[last:] -= below[first:last, last:].T @ owed
    return targets[:out], codes


def _feedback_tile(
    rest: Float[Tensor, "v c"], u: Float[Tensor, "c c"], metric: Float[Tensor, "v v"], band: Band, row: int, codes: Int[Tensor, "c s"]
) -> Float[Tensor, "v c"]:
    """Round one row of tiles column by column; `rest` becomes the targets, and what comes back is (target - word) / diag(u)."""
    tables, pulses = _tables(band, rest), _pulses(band, row, rest)
    errors = torch.empty_like(rest)
    metric = metric.contiguous()
    if pulses is not None:
        inverse = _inverse(metric)
        sides = native.Sides(metric.data_ptr(), inverse.data_ptr(), rest.shape[1])
        native.call("voroq_feedback_pulses", pulses, sides, u.data_ptr(), rest.data_ptr(), codes.data_ptr(), errors.data_ptr(), -1)
        return errors
    if tables is not None:
        arguments = (tables, metric.data_ptr(), u.data_ptr(), rest.shape[1], rest.data_ptr(), codes.data_ptr(), errors.data_ptr())
        native.call("voroq_feedback_tile", *arguments)
        return errors
    for j in range(rest.shape[1]):
        codes[j : j + 1] = _encode(band, row, rest[:, j : j + 1], metric)
        errors[:, j] = (rest[:, j] - _decode(band, row, codes[j : j + 1])[:, 0]) / u[j, j]
        rest[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
    return errors


def _descend_tile(
    pull: Float[Tensor, "v c"], error: Float[Tensor, "v c"], strip: _Strip, row: int, codes: Int[Tensor, "c s"]
) -> int:
    """One sweep along the `row`-th row of tiles; `pull`, which is G E H there, `error` and `codes` move in place. The number of moves."""
    band, h, metric, inverse = strip.band, strip.curvature, strip.metrics[row], strip.inverses[row]
    pulses = _pulses(band, row, pull)
    if pulses is not None:
        count, sides = ctypes.c_int64(0), native.Sides(metric.data_ptr(), inverse.data_ptr(), pull.shape[1])
        moving = (pull.data_ptr(), error.data_ptr(), codes.data_ptr())
        native.call("voroq_descend_pulses", pulses, sides, h.data_ptr(), *moving, ctypes.byref(count), -1)
        return count.value
    moves = 0
    for j in range(pull.shape[1]):
        old = _decode(band, row, codes[j : j + 1])
        step = (inverse @ pull[:, j : j + 1]) / h[j, j]
        found = _encode(band, row, old + step, metric)
        change = _decode(band, row, found) - old
        if not _cost(step - change, metric) < _cost(step, metric):
            continue
        moves += 1
        codes[j : j + 1] = found
        error[:, j] -= change[:, 0]
        pull -= (metric @ change) * h[j]
    return moves


def _cost(delta: Float[Tensor, "v 1"], metric: Float[Tensor, "v v"]) -> float:
    return float((metric @ delta * delta).sum())


def _encode(band: Band, row: int, column: Float[Tensor, "v 1"], metric: Float[Tensor, "v v"]) -> Int[Tensor, "1 s"]:
    """Codes of one tile, the `row`-th from the top, searched in `metric`."""
    words = column.T if band.scale is None else column.T / band.scale[row]
    return band.codebook.encode(words, metric)


def _decode(band: Band, row: int, codes: Int[Tensor, "1 s"]) -> Float[Tensor, "v 1"]:
    words = band.codebook.decode(codes).T
    return words if band.scale is None else words * band.scale[row]


def _tables(band: Band, v: Tensor) -> object | None:
    """The band's tables as the library of kernels takes them, or None where it does not."""
    book: Codebook = band.codebook
    stages = (book,) if isinstance(book, Table) else book.stages if isinstance(book, Residual) else ()
    if not 1 <= len(stages) <= 2 or band.scale is not None or not is_native(v):
        return None
    held = [stage.centroids for stage in stages]
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in held):
        return None
    second = held[1] if len(held) > 1 else None
    beam = book.beam if isinstance(book, Residual) else 1
    return native.Tables(
        held[0].data_ptr(),
        None if second is None else second.data_ptr(),
        held[0].shape[0],
        0 if second is None else second.shape[0],
        band.tile.rows,
        min(beam, held[0].shape[0]),
    )


def _pulses(band: Band, row: int, v: Tensor) -> native.Union | None:
    """The words of the band's pyramids in its `row`-th row of tiles as the library of kernels takes them, or None where it does not."""
    book: Codebook = band.codebook
    if not isinstance(book, Pulses) or not book.is_native(v) or book.scales.dtype != torch.float32:
        return None
    return native.union(book.dim, book.pulses, book.scales if band.scale is None else book.scales * band.scale[row])


def _inverse(metric: Float[Tensor, "*rows v v"]) -> Float[Tensor, "*rows v v"]:
    return torch.linalg.inv(metric.double()).to(metric.dtype).contiguous()


def _room(band: Band, rows: int) -> Int[Tensor, "rows cols s"]:
    if band.tile.cols != 1 or band.zero is not None:
        raise ValueError(f"two-sided rounding takes tiles one column wide without zero points, got {band.tile}")
    shape = (rows // band.tile.rows, band.stop - band.start, len(band.codebook.widths))
    device = next(iter(band.codebook.tensors().values())).device
    return torch.zeros(shape, dtype=torch.int16 if isinstance(band.codebook, Pulses) else torch.long, device=device)


def _padded(w: Matrix, g: Float[Tensor, "out out"], rows: int) -> tuple[Float[Tensor, "m in"], Float[Tensor, "m m"]]:
    """Copies with rows of zeros below, which cost little and are tied to nothing."""
    out = w.shape[0]
    weights = torch.eye(rows, dtype=g.dtype, device=g.device) * (PADDING * g.diagonal().mean())
    weights[:out, :out] = g
    return torch.nn.functional.pad(w, (0, 0, 0, rows - out)).clone(), weights


def _result(w: Matrix, h: Square, g: Float[Tensor, "out out"], bands: Sequence[Band], codes: Sequence[Tensor], targets: Matrix) -> Rounded:
    made = torch.cat([band.decode(part, w.shape[0]) for band, part in zip(bands, codes, strict=True)], dim=1)
    return Rounded(tuple(bands), tuple(codes), kronecker_loss(w - made, h, g), targets)
