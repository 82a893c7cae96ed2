"""Moves go to nearer words only, the best first, and no more than allowed."""

import pytest
import torch

from voroq.codebook.table import Table
from voroq.quantized import Band, Tile
from voroq.tuning.moves import Latent, _unsettled, repick


def some_band() -> tuple[Band, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    band = Band(0, 6, Tile(2, 1), Table(torch.randn(8, 2, generator=rng)))
    return band, torch.randint(0, 8, (4, 6, 1), generator=rng), torch.randn(7, 6, generator=rng)


def distances(band: Band, codes: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    return (band.words(latent) - band.codebook.decode(codes.reshape(-1, 1))).square().sum(1)


def test_all_of_them_is_encoding():
    band, codes, latent = some_band()
    whole = latent[:6]  # three tiles down, no padding
    assert torch.equal(repick(band, codes[:3], whole, 1.0), band.encode(whole))


def test_a_few_are_the_best():
    band, codes, latent = some_band()
    gains = distances(band, codes, latent) - distances(band, band.encode(latent), latent)
    after = repick(band, codes, latent, 0.25)
    moved = (after != codes).reshape(-1)
    assert int(moved.sum()) == 6 and bool(gains[moved].min() >= gains[~moved].max())
    assert torch.equal(repick(band, codes, latent, 0.0), codes)


@pytest.mark.parametrize("lying", [torch.Tensor.contiguous, lambda t: t.T.contiguous().T], ids=["by rows", "by columns"])
def test_the_latent_steps_as_adam_does(lying):
    w = torch.randn(3, 4)
    latent, p = Latent(lying(w)), torch.nn.Parameter(w.clone())
    adam = torch.optim.Adam([p], lr=0.01 * latent.size, betas=(0.9, 0.95), eps=1e-20, fused=False)
    for number in range(1, 5):
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
        adam.step()
        latent.step(lying(p.grad), 0.01)
    torch.testing.assert_close(latent.weight, p.detach())


def test_what_is_settled_needs_no_search():
    """A latent that drifted a little from the words is moved as a search of all of it would."""
    rng = torch.Generator().manual_seed(1)
    band = Band(0, 50, Tile(2, 1), Table(torch.randn(32, 2, generator=rng)))
    codes = torch.randint(0, 32, (40, 50, 1), generator=rng)
    latent = band.decode(codes, 80) + 0.1 * torch.randn(80, 50, generator=rng)
    settled = codes.numel() - _unsettled(band.codebook, band.words(latent), codes.reshape(-1, 1)).numel()
    assert codes.numel() / 2 < settled < codes.numel()
    assert torch.equal(repick(band, codes, latent, 1.0), band.encode(latent)) and not torch.equal(band.encode(latent), codes)


def test_scaled_rows_weigh_by_their_scale():
    rng = torch.Generator().manual_seed(2)
    scale = torch.tensor([1.0, 10.0])
    band = Band(0, 40, Tile(2, 1), Table(torch.randn(4, 2, generator=rng)), scale)
    codes, latent = torch.zeros(2, 40, 1, dtype=torch.long), torch.randn(4, 40, generator=rng) * scale.repeat_interleave(2)[:, None]
    after = repick(band, codes, latent, 0.25)
    gains = [band.tile.cut(latent - band.decode(c, 4)).square().sum(1) for c in (codes, band.encode(latent))]
    moved = (after != codes).reshape(-1)
    assert int(moved.sum()) == 20 and bool((gains[0] - gains[1])[moved].min() >= (gains[0] - gains[1])[~moved].max())
