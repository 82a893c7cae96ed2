"""Several linears of one input as one operator: the same as one by one, whichever kernels multiply, in graphs and under gradients."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from voroq import native
from voroq.kernels import KERNELS, key_of, linears, matmul, matmuls, pick
from voroq.packed.base import Packed
from voroq.packed.conftest import random_gptq, random_vptq
from voroq.packed.format import pack, unpack


def three() -> list[Packed]:
    """The second is left to the reference on the CPU."""
    quantized = (random_vptq(43, 106, 2, steps=("affine", "permute")), random_vptq(30, 106, 3, v=24), random_gptq(11, 106, 4))
    return [pack(q, torch.float32, layout) for q, layout in zip(quantized, ("vptq", "vptq", "voroq"), strict=True)]


def operands(several: list[Packed]) -> tuple[list[Tensor], str]:
    tensors = [packed.tensors[stored.name] for packed in several for stored in packed.spec.layout()]
    return tensors, "\n".join(key_of(packed.spec) for packed in several)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, 106, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", [None, *KERNELS])
def test_each_by_the_kernel_that_would_multiply_it_alone(kernel, monkeypatch):
    several = three() if kernel in (None, "reference") else three()[::2]
    if kernel == "triton":
        pytest.importorskip("triton")
    if kernel == "cpu" and native.library() is None:
        pytest.skip(native.problem())
    monkeypatch.setenv("VOROQ_KERNEL", kernel or "")
    for shape in ((1,), (2, 3), (0,), ()):
        x = rows(*shape)
        assert all(map(torch.equal, matmuls(x, several), [matmul(x, packed) for packed in several])), pick(several[0].spec, x)


def test_the_operator_is_one_step_of_a_graph():
    checks = torch.library.opcheck(torch.ops.voroq.linears, (rows(3).requires_grad_(), *operands(three())))
    assert set(checks.values()) == {"SUCCESS"}


def test_the_gradient_is_the_sum_of_those_of_all():
    several, x = three(), rows(3).requires_grad_()
    above = [torch.randn(3, packed.spec.shape[0]) for packed in several]
    sum((y * own).sum() for y, own in zip(matmuls(x, several), above, strict=True)).backward()
    expected = sum(own @ unpack(packed).dequantize() for packed, own in zip(several, above, strict=True))
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    x.grad = None
    matmuls(x, several)[1].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 30) @ unpack(several[1]).dequantize(), rtol=1e-4, atol=1e-4)


def test_without_gradients_no_operator_is_called(monkeypatch):
    tensors, keys = operands(three())
    monkeypatch.setattr(torch.ops.voroq, "linears", None)
    assert len(linears(rows(1), tensors, keys)) == 3


COMPILED = """
import torch
from voroq.kernels import linears
from voroq.kernels.linears_test import operands, rows, three

tensors, keys = operands(three())
graphs, x = [], rows(3)
compiled = torch.compile(linears, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
assert all(map(torch.equal, compiled(x, tensors, keys), linears(x, tensors, keys)))
assert [n.target for n in graphs[0].graph.nodes if "voroq" in str(n.target)] == [torch.ops.voroq.linears]
"""


def test_they_compile_into_one_graph():
    """In a process of its own, without the checks of shapes that the suite wraps around every function."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
