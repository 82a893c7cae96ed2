"""The error-feedback loop held to its theorem and to slow literal twins."""

import pytest
import torch

from voroq.codebook.grid import Grid
from voroq.codebook.table import Table
from voroq.methods.rtn import grid_slabs
from voroq.numerics.linalg import inverse_factor, proxy_loss
from voroq.quantized import Band, Tile
from voroq.rounding.feedback import feedback
from voroq.rounding.nearest import round_to_nearest

OUT, IN = 8, 24


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def problem(columns: int = IN) -> tuple[torch.Tensor, torch.Tensor]:
    mix = torch.randn(columns, columns, generator=rng(), dtype=torch.float64)
    x = torch.randn(200, columns, generator=rng(1), dtype=torch.float64) @ mix
    return torch.randn(OUT, columns, generator=rng(2), dtype=torch.float64), x.T @ x / 200 + 0.01 * torch.eye(columns)


def table(k: int, dim: int) -> Table:
    return Table(torch.randn(k, dim, generator=rng(3), dtype=torch.float64))


def grid(start: int, stop: int) -> Band:
    return Band(
        start,
        stop,
        Tile(1, 1),
        Grid(2),
        scale=torch.full((OUT,), 0.7, dtype=torch.float64),
        zero=torch.full((OUT,), 1.0, dtype=torch.float64),
    )


BANDS = {
    "1x1 grid that clamps": lambda: [grid(0, IN)],
    "4x1 table": lambda: [Band(0, IN, Tile(4, 1), table(16, 4))],
    "3x1 table, padded": lambda: [Band(0, IN, Tile(3, 1), table(16, 3))],
    "1x4 table": lambda: [Band(0, IN, Tile(1, 4), table(64, 4))],
    "2x2 table": lambda: [Band(0, IN, Tile(2, 2), table(64, 4))],
    "outliers first": lambda: [Band(0, 4, Tile(2, 1), table(64, 2)), Band(4, IN, Tile(4, 1), table(16, 4))],
}


def decoded(done) -> torch.Tensor:
    return torch.cat([band.decode(codes, OUT) for band, codes in zip(done.bands, done.codes, strict=True)], dim=1)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("name", BANDS)
def test_tile_losses_sum_to_proxy_loss(name: str, metric: bool):
    w, h = problem()
    done = feedback(w, h, BANDS[name](), metric=metric)
    torch.testing.assert_close(done.loss, proxy_loss(w - decoded(done), h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BANDS)
def test_lazy_updates_change_nothing_but_time(name: str):
    w, h = problem()
    one, other = feedback(w, h, BANDS[name](), lazy=1), feedback(w, h, BANDS[name](), lazy=7)
    assert all(torch.equal(a, b) for a, b in zip(one.codes, other.codes, strict=True))


def gptq_literal(w: torch.Tensor, h: torch.Tensor, slabs, group: int) -> torch.Tensor:
    """OBQ with the inverse re-made after every column: the definition GPTQ's Cholesky trick computes."""
    w, out = w.clone(), torch.zeros_like(w)
    for i in range(w.shape[1]):
        if i % group == 0:
            band = slabs[i // group].fit(w[:, i : i + group])
        column = w[:, i : i + 1]
        out[:, i : i + 1] = band.decode(band.encode(column), w.shape[0])
        inverse = torch.linalg.inv(h[i:, i:])
        error = (column - out[:, i : i + 1]) / inverse[0, 0]
        w[:, i:] -= error * inverse[0]
    return out


@pytest.mark.parametrize("group", [IN, 8])
def test_gptq_equals_obq_in_fixed_order(group: int):
    w, h = problem()
    slabs = grid_slabs(IN, 3, group, "minmax")
    torch.testing.assert_close(decoded(feedback(w, h, slabs)), gptq_literal(w, h, slabs, group))


def vptq_literal(w: torch.Tensor, h: torch.Tensor, book: Table) -> torch.Tensor:
    """VPTQ's column loop as its paper states it: nearest centroid per piece, error over the pivot, to all later columns."""
    w, out, u = w.clone(), torch.zeros_like(w), torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for n in range(w.shape[1]):
        for row in range(0, w.shape[0], book.dim):
            piece = w[row : row + book.dim, n]
            out[row : row + book.dim, n] = book.centroids[(book.centroids - piece).square().sum(1).argmin()]
        error = (w[:, n] - out[:, n]) / u[n, n]
        for later in range(n + 1, w.shape[1]):
            w[:, later] -= error * u[n, later]
    return out


def test_vptq_equals_its_literal_column_loop():
    w, h = problem()
    torch.testing.assert_close(decoded(feedback(w, h, [Band(0, IN, Tile(4, 1), table(16, 4))])), vptq_literal(w, h, table(16, 4)))


def test_diagonal_hessian_means_round_to_nearest():
    w, h = problem()
    slabs = grid_slabs(IN, 3, 8, "mse")
    bands, codes = round_to_nearest(w, slabs)
    done = feedback(w, torch.diag(h.diagonal()), slabs)
    assert all(torch.equal(a, b) for a, b in zip(codes, done.codes, strict=True))
    assert all(torch.equal(a.scale, b.scale) for a, b in zip(bands, done.bands, strict=True))


def test_scale_of_the_hessian_does_not_matter():
    w, h = problem()
    one, other = feedback(w, h, BANDS["4x1 table"]()), feedback(w, 1024 * h, BANDS["4x1 table"]())
    assert torch.equal(one.codes[0], other.codes[0])


def test_metric_search_lowers_the_loss_of_wide_tiles():
    w, h = problem()
    plain, metric = (feedback(w, h, BANDS["1x4 table"](), metric=m).loss.sum() for m in (False, True))
    assert metric < plain


def test_targets_are_what_was_rounded():
    w, h = problem()
    done = feedback(w, h, BANDS["4x1 table"]())
    u = inverse_factor(h)
    owed = (done.targets - decoded(done)) / u.diagonal()
    torch.testing.assert_close(owed.square().sum(1), done.loss)
