"""Refits of scales are least squares: at the end no small step of any scale lowers the loss, whatever it is measured in."""

from dataclasses import replace

import pytest
import torch

from voroq.codebook.pyramid import Pulses
from voroq.quantized import Band, Tile
from voroq.rounding.kronecker import kronecker_loss
from voroq.tuning.scales import refit_levels, refit_rows

OUT, IN = 22, 24


def rng(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def spd(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=rng(seed), dtype=torch.float64)
    return x.T @ x / (3 * size)


def rounded(tile: Tile) -> tuple[torch.Tensor, Band, torch.Tensor]:
    """A weight whose last row of tiles is padded, one row of tiles of it zero, and its nearest words."""
    w = torch.randn(OUT, IN, generator=rng(7), dtype=torch.float64)
    w[tile.rows : 2 * tile.rows] = 0
    scale = torch.linspace(0.5, 1.5, tile.grid(OUT, IN)[0], dtype=torch.float64)
    band = Band(0, IN, tile, Pulses(8, (3, 5, 9, 7), torch.tensor([0.9, 0.6, 0.5, 40.0], dtype=torch.float64)), scale)
    return w, band, band.encode(w)


@pytest.mark.parametrize("sided", [1, 2])
@pytest.mark.parametrize("tile", [Tile(8, 1), Tile(1, 8)], ids=str)
@pytest.mark.parametrize("refit", [refit_rows, refit_levels])
def test_no_small_step_of_a_scale_lowers_the_loss(refit, tile: Tile, sided: int):
    w, band, codes = rounded(tile)
    h, g = spd(IN, 1), spd(OUT, 2) if sided == 2 else None

    def loss(band: Band) -> float:
        return float(kronecker_loss(w - band.decode(codes, OUT), h, torch.eye(OUT, dtype=torch.float64) if g is None else g).sum())

    done = refit(w, h, band, codes, g=g)
    least = loss(done)
    assert least < 0.99 * loss(band)
    assert done.scale[1] == band.scale[1] and done.codebook.scales[3] == band.codebook.scales[3], "what nothing uses stays"
    for i in range(band.scale.shape[0] if refit is refit_rows else 3):
        for step in (1e-3, -1e-3):
            if refit is refit_rows:
                moved = replace(done, scale=done.scale.index_add(0, torch.tensor([i]), torch.tensor([step], dtype=torch.float64)))
            else:
                scales = done.codebook.scales.index_add(0, torch.tensor([i]), torch.tensor([step], dtype=torch.float64))
                moved = replace(done, codebook=replace(done.codebook, scales=scales))
            assert loss(moved) >= least - 1e-10
