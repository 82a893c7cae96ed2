"""A trainable linear computes what its quantized matrix does, passes gradients to all it stores, and loses nothing on the way."""

import torch
from torch import nn

from voroq.codebook.presets import preset
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.packed.format import pack, unpack
from voroq.quantized import Band, Quantized, Tile, reals, with_reals
from voroq.transform.affine import ColumnAffine
from voroq.transform.chain import Chain
from voroq.tuning.losses import divergence
from voroq.tuning.trainable import Trainable


def some_quantized(seed: int = 0) -> Quantized:
    rng = torch.Generator().manual_seed(seed)
    book = Residual((Table(torch.randn(8, 2, generator=rng)), Table(torch.randn(4, 2, generator=rng))))
    codes = torch.stack([torch.randint(0, n, (4, 6), generator=rng) for n in (8, 4)], dim=-1)
    affine = ColumnAffine(torch.rand(6, generator=rng) + 0.5, torch.randn(6, generator=rng))
    return Quantized((7, 6), Chain((affine,)), (Band(0, 6, Tile(2, 1), book),), (codes,))


def test_it_computes_what_the_matrix_does():
    q, x = some_quantized(), torch.randn(3, 5, 6)
    bias = nn.Parameter(torch.randn(7))
    torch.testing.assert_close(Trainable(q, bias)(x), x @ q.dequantize().T + bias)


def test_pyramids_are_spelled_out_and_stay_numbers():
    rng = torch.Generator().manual_seed(1)
    book = preset(16, 64)
    codes = book.encode(torch.randn(10, 16, generator=rng)).reshape(2, 5, 2)
    q = Quantized((30, 5), Chain(), (Band(0, 5, Tile(16, 1), book, scale=torch.rand(2, generator=rng) + 0.5),), (codes,))
    module, x = Trainable(q), torch.randn(7, 5, generator=rng)
    torch.testing.assert_close(module(x), x @ q.dequantize().T)
    module(x).square().sum().backward()
    assert set(module.stored) == {"0/scales", "0/scale"} and all(bool(p.grad.abs().sum() > 0) for p in module.stored.values())
    with torch.no_grad():
        module.stored["0/scales"] *= 2
    torch.testing.assert_close(module(x), 2 * x @ q.dequantize().T)
    assert torch.equal(module.quantized().codes[0], codes) and module.quantized().bands[0].codebook.bits == 64
    module.codes = (codes.flip(1),)
    torch.testing.assert_close(module(x), x @ module.quantized().dequantize().T)


def test_every_stored_number_gets_its_gradient():
    module, x = Trainable(some_quantized()), torch.randn(5, 6)
    module(x).square().sum().backward()
    used = module._frame.codes[0][..., 0].unique()
    for name, p in module.stored.items():
        assert p.grad is not None and bool(p.grad.abs().sum() > 0), name
    table = module.stored["0/centroids_0"]
    assert set(used.tolist()) == set(table.grad.abs().sum(1).nonzero()[:, 0].tolist())
    with torch.no_grad():
        base = module(x).double().square().sum()
        table[used[0], 1] += 1e-3
        rise = (module(x).double().square().sum() - base) / 1e-3
    torch.testing.assert_close(rise.float(), table.grad[used[0], 1], rtol=0.02, atol=0.05)


def test_nothing_trained_is_nothing_changed():
    packed = pack(some_quantized(), torch.float16, "vptq")
    again = pack(with_reals(some_quantized(), reals(Trainable(unpack(packed)).quantized())), torch.float16, "vptq")
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in packed.tensors.items())


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.4, 0.4])
    by_hand = sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
    torch.testing.assert_close(divergence((p.log() + 3)[None], q.log()[None]), by_hand)
    torch.testing.assert_close(divergence(torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)), torch.tensor(2.0).log())
