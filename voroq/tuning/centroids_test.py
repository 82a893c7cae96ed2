import pytest
import torch

from voroq.codebook.grid import Grid
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.numerics.linalg import proxy_loss
from voroq.quantized import Band, Tile
from voroq.rounding.metric import Metric
from voroq.tuning.centroids import refit

OUT, IN = 7, 10


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def table(k: int, dim: int, seed: int) -> Table:
    return Table(torch.randn(k, dim, generator=rng(seed), dtype=torch.float64))


def problem():
    """Outliers, a padded residual band and a plain one, with random codes."""
    x = torch.randn(50, IN, generator=rng(), dtype=torch.float64)
    bands = (
        Band(0, 2, Tile(2, 1), table(4, 2, 1)),
        Band(2, 6, Tile(3, 1), Residual((table(4, 3, 2), table(2, 3, 3)))),
        Band(6, IN, Tile(3, 1), table(4, 3, 4)),
    )
    codes = tuple(
        torch.stack(
            [
                torch.randint(0, 2**width, band.tile.grid(OUT, band.stop - band.start), generator=rng(10 + i))
                for width in band.codebook.widths
            ],
            -1,
        )
        for i, band in enumerate(bands)
    )
    return torch.randn(OUT, IN, generator=rng(5), dtype=torch.float64), x.T @ x / 50, bands, codes


def loss(w: torch.Tensor, h: torch.Tensor, bands, codes) -> float:
    made = torch.cat([band.decode(code, OUT) for band, code in zip(bands, codes, strict=True)], dim=1)
    return float(proxy_loss(w - made, h).sum())


def brute_force(w: torch.Tensor, h: torch.Tensor, bands, codes) -> float:
    """The design matrix written out column by column, whitened by a factor of H, and solved by lstsq."""
    stages = [stage for band in bands for stage in (band.codebook.stages if isinstance(band.codebook, Residual) else (band.codebook,))]
    sizes = [stage.centroids.numel() for stage in stages]
    columns = []
    for s, size in enumerate(sizes):
        for j in range(size):
            parts = [torch.zeros(n, dtype=torch.float64) for n in sizes]
            parts[s][j] = 1
            tables = iter(part.reshape(stage.centroids.shape) for part, stage in zip(parts, stages, strict=True))
            made = []
            for band, code in zip(bands, codes, strict=True):
                count = len(band.codebook.stages) if isinstance(band.codebook, Residual) else 1
                book = [Table(next(tables)) for _ in range(count)]
                made.append(Band(band.start, band.stop, band.tile, Residual(tuple(book))).decode(code, OUT))
            columns.append(torch.cat(made, dim=1))
    root = torch.linalg.cholesky(h)
    design = torch.stack([(column @ root).flatten() for column in columns], dim=1)
    target = (w @ root).flatten()
    solution = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
    return float((design @ solution - target).square().sum())


def test_refit_reaches_the_brute_force_optimum():
    w, h, bands, codes = problem()
    refitted = refit(w, Metric(h), bands, codes, steps=500)
    assert loss(w, h, refitted, codes) == pytest.approx(brute_force(w, h, bands, codes), rel=1e-6)


def test_every_step_lowers_the_loss():
    w, h, bands, codes = problem()
    losses = [loss(w, h, refit(w, Metric(h), bands, codes, steps=steps), codes) for steps in (0, 1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True) and losses[0] == loss(w, h, bands, codes) and losses[-1] < losses[0]


def test_unused_centroids_stay_where_they_are():
    w, h, bands, codes = problem()
    codes[0].clamp_(max=2)
    assert torch.equal(refit(w, Metric(h), bands, codes)[0].codebook.centroids[3], bands[0].codebook.centroids[3])


def test_grids_cannot_be_refitted():
    with pytest.raises(TypeError, match="only tables"):
        refit(torch.zeros(2, 2), Metric(torch.eye(2)), (Band(0, 2, Tile(1, 1), Grid(2)),), (torch.zeros(2, 2, 1, dtype=torch.long),))


def test_refit_in_the_metric_of_both_sides_equals_a_brute_force_solve():
    w, h, bands, codes = problem()
    y = torch.randn(40, OUT, generator=rng(20), dtype=torch.float64)
    g = y.T @ y / 40 + 0.1 * torch.eye(OUT, dtype=torch.float64)
    root_g, root_h = torch.linalg.cholesky(g).T, torch.linalg.cholesky(h + 1e-9 * torch.eye(IN, dtype=torch.float64))
    stages = [t for band in bands for t in band.codebook.tensors().values()]

    def made(tables) -> torch.Tensor:
        left = iter(tables)
        refitted = [
            Band(b.start, b.stop, b.tile, b.codebook.with_tensors({name: next(left) for name in b.codebook.tensors()})) for b in bands
        ]
        return torch.cat([band.decode(code, OUT) for band, code in zip(refitted, codes, strict=True)], dim=1)

    columns = []
    for s, stage in enumerate(stages):
        for j in range(stage.numel()):
            unit = [torch.zeros_like(t) for t in stages]
            unit[s].view(-1)[j] = 1
            columns.append((root_g @ made(unit) @ root_h).reshape(-1))
    design, target = torch.stack(columns, 1), (root_g @ w @ root_h).reshape(-1)
    best = float((design @ torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution - target[:, None]).square().sum())
    done = refit(w, Metric(h, g), bands, codes, steps=500)
    delta = w - torch.cat([band.decode(code, OUT) for band, code in zip(done, codes, strict=True)], dim=1)
    assert float(torch.trace(g @ delta @ h @ delta.T)) == pytest.approx(best, rel=1e-5)
