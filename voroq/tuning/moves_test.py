"""Moves go to nearer words only, the best first, and no more than allowed."""

import torch

from voroq.codebook.table import Table
from voroq.quantized import Band, Tile
from voroq.tuning.moves import Latent, repick


def some_band() -> tuple[Band, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    band = Band(0, 6, Tile(2, 1), Table(torch.randn(8, 2, generator=rng)))
    return band, torch.randint(0, 8, (4, 6, 1), generator=rng), torch.randn(7, 6, generator=rng)


def distances(band: Band, codes: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    return band.tile.cut(latent - band.decode(codes, 7)).square().sum(1)


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


def test_the_latent_steps_as_adam_does():
    w = torch.randn(3, 4)
    latent, p = Latent(w), torch.nn.Parameter(w.clone())
    adam = torch.optim.Adam([p], lr=0.01 * latent.size, betas=(0.9, 0.95), eps=1e-20)
    for number in range(1, 5):
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
        adam.step()
        latent.step(p.grad, 0.01, number)
    torch.testing.assert_close(latent.weight, p.detach())
