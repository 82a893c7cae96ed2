"""Two-sided rounding held to its theorem, to its one-sided special case, and to slow literal twins."""

import pytest
import torch

from voroq import native
from voroq.codebook import pyramid
from voroq.codebook.presets import preset
from voroq.codebook.pyramid import Pulses
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.numerics.linalg import inverse_factor, proxy_loss
from voroq.quantized import Band, Tile
from voroq.rounding import descent, kronecker
from voroq.rounding import feedback as one_sided
from voroq.rounding.feedback import conditional_metric

OUT, IN = 12, 24


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def spd(size: int, seed: int) -> torch.Tensor:
    mix = torch.randn(size, size, generator=rng(seed + 1), dtype=torch.float64)
    x = torch.randn(200, size, generator=rng(seed), dtype=torch.float64) @ mix
    h = x.T @ x / 200 + 0.01 * torch.eye(size)
    return h / h.diagonal().mean()


def problem(out: int = OUT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(out, IN, generator=rng(7), dtype=torch.float64), spd(IN, 1), spd(out, 3)


def table(k: int, dim: int, scale: float = 1.0) -> Table:
    return Table(scale * torch.randn(k, dim, generator=rng(k + dim), dtype=torch.float64))


BANDS = {
    "4x1": lambda: [Band(0, IN, Tile(4, 1), table(16, 4))],
    "3x1 in two groups": lambda: [Band(0, 10, Tile(3, 1), table(8, 3)), Band(10, IN, Tile(3, 1), table(32, 3))],
    "5x1, padded": lambda: [Band(0, IN, Tile(5, 1), table(16, 5))],
    "2x1 before 4x1": lambda: [Band(0, 4, Tile(2, 1), table(32, 2)), Band(4, IN, Tile(4, 1), table(16, 4))],
    "residual": lambda: [Band(0, IN, Tile(4, 1), Residual((table(16, 4), table(8, 4, 0.3)), 16))],
    "scaled": lambda: [Band(0, IN, Tile(4, 1), table(16, 4), scale=torch.linspace(0.5, 1.5, 3, dtype=torch.float64))],
}


def pulses(dim: int) -> Pulses:
    return Pulses(dim, (2, 4, 3), torch.tensor([0.8, 0.6, 1.1], dtype=torch.float64))


PYRAMIDS = {
    "pyramids": lambda: [Band(0, IN, Tile(4, 1), pulses(4))],
    "pyramids, scaled": lambda: [Band(0, IN, Tile(4, 1), pulses(4), scale=torch.linspace(0.5, 1.5, 3, dtype=torch.float64))],
}


def made(done) -> torch.Tensor:
    return torch.cat([band.decode(codes, OUT) for band, codes in zip(done.bands, done.codes, strict=True)], dim=1)


@pytest.mark.parametrize("lazy", [1, 128])
@pytest.mark.parametrize("name", ["4x1", "3x1 in two groups", "2x1 before 4x1", "residual", "scaled", *PYRAMIDS])
def test_the_losses_of_all_tiles_sum_to_the_loss(name: str, lazy: int):
    w, h, g = problem()
    done = kronecker.feedback(w, h, g, (BANDS | PYRAMIDS)[name](), lazy=lazy)
    u, v = inverse_factor(h), inverse_factor(g)
    total = 0.0
    for band in done.bands:
        columns = slice(band.start, band.stop)
        left = ((done.targets - made(done)) / u.diagonal())[:, columns]
        for top in range(0, OUT, band.tile.rows):
            rows = slice(top, top + band.tile.rows)
            total += float(((conditional_metric(v[rows, rows]) @ left[rows]) * left[rows]).sum())
    delta = w - made(done)
    loss = float(torch.trace(g @ delta @ h @ delta.T))
    assert total == pytest.approx(loss, rel=1e-9)
    assert float(done.loss.sum()) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("name", BANDS)
def test_with_independent_rows_it_is_the_one_sided_sweep(name: str):
    w, h, _ = problem()
    bands = BANDS[name]()
    two, one = kronecker.feedback(w, h, torch.eye(OUT, dtype=torch.float64), bands), one_sided.feedback(w, h, bands)
    if name != "5x1, padded":  # there the rows that only pad a tile count less
        assert all(torch.equal(a, b) for a, b in zip(two.codes, one.codes, strict=True))
        assert torch.allclose(two.targets, one.targets)
    again = kronecker.descend(w, h, torch.eye(OUT, dtype=torch.float64), bands, one.codes, sweeps=50)
    if name in ("4x1", "scaled"):
        assert float(again.loss.sum()) <= float(one.loss.sum())
        settled = descent.descend(w, h, bands, again.codes, sweeps=1)
        assert all(torch.equal(a, b) for a, b in zip(settled.codes, again.codes, strict=True))


@pytest.mark.parametrize("name", ["4x1", *PYRAMIDS])
def test_it_beats_the_one_sided_sweep_in_its_own_metric(name: str):
    w, h, g = problem()
    bands = (BANDS | PYRAMIDS)[name]()
    two, one = kronecker.feedback(w, h, g, bands), one_sided.feedback(w, h, bands)
    delta = w - made(one)
    assert float(two.loss.sum()) < float(torch.trace(g @ delta @ h @ delta.T))
    assert float(proxy_loss(w - made(two), h).sum()) > float(one.loss.sum())


@pytest.mark.parametrize("name", BANDS)
def test_descent_never_raises_the_loss_and_ends_where_no_single_code_can_lower_it(name: str):
    w, h, g = problem()
    bands = BANDS[name]()
    before = kronecker.feedback(w, h, g, bands)
    last = float(before.loss.sum())
    done = before
    for _ in range(6):
        done = kronecker.descend(w, h, g, bands, done.codes, sweeps=1)
        assert float(done.loss.sum()) <= last + 1e-9
        last = float(done.loss.sum())
    settled = kronecker.descend(w, h, g, bands, done.codes, sweeps=200)
    last = float(settled.loss.sum())
    for at, band in enumerate(bands):
        for row in range(settled.codes[at].shape[0]):
            codes = [part.clone() for part in settled.codes]
            for word in range(2 ** band.codebook.widths[0]):
                codes[at][row, 1, 0] = word
                delta = w - torch.cat([b.decode(c, OUT) for b, c in zip(bands, codes, strict=True)], dim=1)
                assert float(torch.trace(g @ delta @ h @ delta.T)) >= last - 1e-3 * last  # padding rows count a little too


@pytest.mark.parametrize("name", PYRAMIDS)
def test_descent_over_pyramids_never_raises_the_loss_and_settles(name: str):
    w, h, g = problem()
    bands = PYRAMIDS[name]()
    done = kronecker.feedback(w, h, g, bands)
    first = last = float(done.loss.sum())
    for _ in range(10):
        done = kronecker.descend(w, h, g, bands, done.codes, sweeps=1)
        assert float(done.loss.sum()) <= last + 1e-9
        last = float(done.loss.sum())
    again = kronecker.descend(w, h, g, bands, done.codes, sweeps=1)
    assert last < first and torch.equal(again.codes[0], done.codes[0])


@pytest.mark.parametrize("name", PYRAMIDS)
def test_with_independent_rows_pyramids_are_the_one_sided_sweep(name: str):
    """A metric that is a multiple of the identity: the best point of a level is its projection, and the best level the nearest."""
    w, h, _ = problem()
    bands = PYRAMIDS[name]()
    two, one = kronecker.feedback(w, h, torch.eye(OUT, dtype=torch.float64), bands), one_sided.feedback(w, h, bands)
    assert torch.equal(two.codes[0], one.codes[0].to(two.codes[0])) and torch.allclose(two.targets, one.targets)


@pytest.mark.skipif(native.library() is None, reason="the library of kernels is not built")
@pytest.mark.parametrize(("dim", "width", "out"), [(8, 16, 24), (8, 24, 20), (16, 32, 32), (16, 52, 40)])
def test_the_library_and_torch_find_the_same_pulses(dim: int, width: int, out: int, monkeypatch: pytest.MonkeyPatch):
    w, h, g = (t.float() for t in problem(out))
    bands = [Band(0, IN, Tile(dim, 1), preset(dim, width).spelled, scale=torch.linspace(0.8, 1.2, -(-out // dim)))]
    fast = kronecker.feedback(w, h, g, bands)
    swept = kronecker.descend(w, h, g, bands, fast.codes, sweeps=3)
    monkeypatch.setattr(pyramid, "is_native", lambda v: False)
    slow = kronecker.feedback(w, h, g, bands)
    assert torch.equal(fast.codes[0], slow.codes[0])
    assert torch.allclose(fast.targets, slow.targets, atol=1e-4)
    twin = kronecker.descend(w, h, g, bands, fast.codes, sweeps=3)
    assert torch.equal(swept.codes[0], twin.codes[0]) and not torch.equal(swept.codes[0], fast.codes[0])


@pytest.mark.skipif(native.library() is None, reason="the library of kernels is not built")
@pytest.mark.parametrize("name", ["4x1", "3x1 in two groups", "5x1, padded", "2x1 before 4x1", "residual"])
def test_the_library_and_torch_agree(name: str, monkeypatch: pytest.MonkeyPatch):
    w, h, g = (t.float() for t in problem())
    bands = [_single(band) for band in BANDS[name]()]
    fast = kronecker.feedback(w, h, g, bands)
    swept = kronecker.descend(w, h, g, bands, fast.codes, sweeps=3)
    monkeypatch.setattr(kronecker, "is_native", lambda v: False)
    slow = kronecker.feedback(w, h, g, bands)
    assert all(torch.equal(a, b) for a, b in zip(fast.codes, slow.codes, strict=True))
    assert torch.allclose(fast.targets, slow.targets, atol=1e-4)
    twin = kronecker.descend(w, h, g, bands, fast.codes, sweeps=3)
    assert all(torch.equal(a, b) for a, b in zip(swept.codes, twin.codes, strict=True))
    assert torch.allclose(swept.loss, twin.loss, rtol=1e-3)


def _single(band: Band) -> Band:
    book = band.codebook.with_tensors({name: t.float() for name, t in band.codebook.tensors().items()})
    return Band(band.start, band.stop, band.tile, book)


def test_what_it_cannot_round_is_refused():
    w, h, g = problem()
    with pytest.raises(ValueError, match="one column wide"):
        kronecker.feedback(w, h, g, [Band(0, IN, Tile(1, 4), table(16, 4))])
