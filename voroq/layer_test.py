import accelerate
import pytest
import torch

from voroq.kernels import KERNELS, matmul
from voroq.layer import QuantLinear
from voroq.packed.checkpoint import check_packed
from voroq.packed.conftest import random_gptq, random_vptq
from voroq.packed.format import pack, unpack

LINEARS = {
    "vptq": random_vptq(10, 20, 1, sizes=(16, 4), groups=2, outliers=(4, 3, 8), steps=("affine", "permute")),
    "voroq": random_gptq(10, 20, 2),
}


@pytest.fixture(params=LINEARS)
def packed(request):
    return pack(LINEARS[request.param], torch.bfloat16, request.param)


def x(dtype=torch.float32):
    return torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_layer_computes_what_the_quantized_linear_computes(packed):
    bias = torch.arange(10.0)
    layer = QuantLinear.holding(packed, bias)
    assert torch.allclose(layer(x()), unpack(packed).linear(x()) + bias, atol=1e-5)
    assert layer(x(torch.bfloat16)).dtype == torch.bfloat16
    assert layer(x()[:0]).shape == (0, 3, 10)


def test_gradients_flow_through_to_the_input_and_nowhere_else(packed):
    layer = QuantLinear.holding(packed)
    inputs = x().requires_grad_()
    layer(inputs).sum().backward()
    assert torch.allclose(inputs.grad, unpack(packed).dequantize().sum(0).expand_as(inputs), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_parameters_are_exactly_those_of_the_layout_and_load_from_a_state_dict(packed):
    layer = QuantLinear(packed.spec, bias=True, dtype=torch.bfloat16, device="meta")
    state = layer.state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == {s.name: s.shape for s in packed.spec.layout()} | {"bias": (10,)}
    assert all(state[name].dtype == tensor.dtype for name, tensor in packed.tensors.items())
    layer = QuantLinear(packed.spec, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict(packed.tensors)
    check_packed("m", layer.packed())
    assert torch.equal(layer(x()), matmul(x(), packed))
    assert "layout=" in repr(layer) and "bits_per_weight=" in repr(layer)


def test_dequantize_gives_the_dense_twin(packed, monkeypatch):
    layer = QuantLinear.holding(packed, torch.arange(10.0))
    dense = layer.dequantize(torch.float32)
    assert type(dense) is torch.nn.Linear
    torch.testing.assert_close(dense(x()), layer(x()))
    monkeypatch.setenv("VOROQ_KERNEL", "reference")
    assert torch.equal(dense(x()), layer(x()))
    assert layer.dequantize().weight.dtype == torch.bfloat16


def test_weights_offloaded_by_accelerate_come_back_for_the_forward(packed):
    layer = torch.nn.Sequential(QuantLinear.holding(packed))
    expected = layer(x())
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert torch.equal(layer(x()), expected)


def test_the_reference_kernel_is_last_and_takes_everything(packed):
    assert list(KERNELS)[-1] == "reference"
    assert KERNELS["reference"].supports(packed.spec, x())
