import pytest
import torch

from voroq.codebook.grid import Grid
from voroq.codebook.table import Table
from voroq.moments import Moments, merge, observe
from voroq.quantized import Band, Quantized, Tile, narrow
from voroq.transform.affine import ColumnAffine
from voroq.transform.chain import Chain
from voroq.transform.permute import Permute


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize("rows, cols, out, columns", [(1, 1, 3, 4), (4, 1, 8, 3), (4, 1, 7, 3), (1, 2, 3, 8), (3, 2, 7, 4)])
def test_join_undoes_cut(rows: int, cols: int, out: int, columns: int):
    w, tile = torch.randn(out, columns, generator=rng()), Tile(rows, cols)
    vectors = tile.cut(w)
    assert vectors.shape == (-(-out // rows) * columns // cols, rows * cols)
    assert torch.equal(tile.join(vectors, out), w)


def test_cut_is_row_major_over_tiles_and_pads_with_zero():
    w = torch.arange(6.0).reshape(3, 2)
    assert Tile(2, 1).cut(w).tolist() == [[0, 2], [1, 3], [4, 0], [5, 0]]


def test_columns_must_divide_into_tiles():
    with pytest.raises(ValueError, match="do not divide"):
        Tile(1, 3).cut(torch.zeros(2, 4))


def sample() -> Quantized:
    table = Table(torch.randn(8, 2, generator=rng()))
    first = Band(0, 2, Tile(2, 1), table)
    second = Band(2, 5, Tile(1, 1), Grid(2), scale=torch.rand(3, generator=rng(1)) + 0.1, zero=torch.tensor([0.0, 1.0, 3.0]))
    codes = (torch.randint(0, 8, (2, 2, 1), generator=rng(2)), torch.randint(0, 4, (3, 3, 1), generator=rng(3)))
    steps = (
        ColumnAffine(torch.rand(5, generator=rng(4)) + 1, torch.randn(5, generator=rng(5))),
        Permute(torch.randperm(5, generator=rng(6))),
    )
    return Quantized((3, 5), Chain(steps), (first, second), codes)


def test_dequantize_by_hand():
    q = sample()
    affine, permute = q.transform.steps
    for row in range(3):
        for p in range(5):
            if p < 2:
                word = q.bands[0].codebook.centroids[q.codes[0][row // 2, p, 0], row % 2]
            else:
                word = q.bands[1].scale[row] * (q.codes[1][row, p - 2, 0] - q.bands[1].zero[row])
            column = permute.perm[p]
            assert q.dequantize()[row, column].item() == pytest.approx(
                (word * affine.scale[column] + affine.shift[column]).item(), rel=1e-6
            )


def test_linear_is_the_product_with_the_dequantized_weight_and_reaches_the_tables():
    q, x = sample(), torch.randn(4, 5, generator=rng(7))
    torch.testing.assert_close(q.linear(x), x @ q.dequantize().T)
    q.bands[0].codebook.centroids.requires_grad_()
    q.linear(x).sum().backward()
    assert q.bands[0].codebook.centroids.grad.abs().sum() > 0


def test_narrow_is_idempotent_and_representable():
    q = narrow(sample(), torch.float16)
    again = narrow(q, torch.float16)
    assert torch.equal(q.dequantize(), again.dequantize())
    assert torch.equal(q.bands[0].codebook.centroids.half().float(), q.bands[0].codebook.centroids)


def test_narrow_refuses_what_does_not_fit():
    q = sample()
    q.bands[0].codebook.centroids[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"does not fit in torch.float16.*1e\+06"):
        narrow(q, torch.float16)


def test_bands_must_cover_the_columns():
    q = sample()
    with pytest.raises(ValueError, match="without gap"):
        Quantized((3, 6), q.transform, q.bands, q.codes)


def test_moments_merge_is_observing_both():
    a, b = torch.randn(20, 4, generator=rng(), dtype=torch.float64), torch.randn(30, 4, generator=rng(1), dtype=torch.float64)
    empty = Moments(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0)
    whole, parts = observe(empty, torch.cat([a, b])), merge(observe(empty, a), observe(empty, b))
    torch.testing.assert_close(whole.second, parts.second)
    torch.testing.assert_close(whole.first, parts.first)
    assert whole.count == parts.count == 50
    torch.testing.assert_close(whole.hessian(), torch.cat([a, b]).T @ torch.cat([a, b]) / 50)


def test_half_inputs_are_accumulated_in_float32():
    x = torch.full((4096, 1), 8.0, dtype=torch.float16)
    assert observe(Moments.empty(1), x).second.item() == 4096 * 64
