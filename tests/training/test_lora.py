"""The LoRA layer: its gradients are those of plain autograd and of peft, on dense and on NF4 weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from adapterhub.training.layers import lora, nf4_matrix  # noqa: E402
from tests.conftest import need_module  # noqa: E402


def layer(quantized: bool, bias: bool = False) -> lora.LoRALinear:
    torch.manual_seed(1)
    weight = torch.randn(48, 64) * 0.1
    lora_layer = lora.LoRALinear(
        nf4_matrix.quantize(weight) if quantized else weight, torch.randn(48) if bias else None, r=4, alpha=6
    )
    lora_layer.reset(torch.Generator().manual_seed(2))
    torch.nn.init.normal_(lora_layer.lora_B)
    return lora_layer


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_plain_autograd(quantized: bool, bias: bool) -> None:
    ours = layer(quantized, bias)
    x = torch.randn(2, 5, 64, requires_grad=True)
    upstream = torch.randn(2, 5, 48)
    y = ours(x)
    gradients = torch.autograd.grad(y, (x, ours.lora_A, ours.lora_B), upstream)
    weight = nf4_matrix.dequantize(ours.base, torch.float32) if quantized else ours.base
    plain = x @ weight.t() + (0 if ours.bias is None else ours.bias) + 1.5 * (x @ ours.lora_A.t() @ ours.lora_B.t())
    expected = torch.autograd.grad(plain, (x, ours.lora_A, ours.lora_B), upstream)
    torch.testing.assert_close(y, plain)
    for ours_gradient, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours_gradient, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.peer
def test_output_and_gradients_are_pefts() -> None:
    need_module("peft")
    from peft import LoraConfig, get_peft_model

    ours = layer(quantized=False)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    model[0].weight.data.copy_(ours.base)
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    linear = theirs.base_model.model[0]
    linear.lora_A["default"].weight.data.copy_(ours.lora_A.data)
    linear.lora_B["default"].weight.data.copy_(ours.lora_B.data)
    x = torch.randn(7, 64)
    for y in (ours(x), theirs(x)):
        y.square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.lora_A.grad, linear.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.lora_B.grad, linear.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.peer
def test_the_initial_factors_spread_as_pefts_do() -> None:
    reference = torch.empty(16, 300)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5)  # peft, tuners/lora/layer.py, reset_lora_parameters
    ours = lora.LoRALinear(torch.zeros(8, 300), None, r=16, alpha=16)
    ours.reset(torch.Generator().manual_seed(0))
    assert torch.allclose(ours.lora_A.abs().max(), reference.abs().max(), rtol=0.01)
    assert not ours.lora_B.any()


def test_a_frozen_layer_passes_gradients_through() -> None:
    weight = torch.randn(8, 64)
    frozen = lora.FrozenLinear(nf4_matrix.quantize(weight), torch.ones(8))
    x = torch.randn(3, 64, requires_grad=True)
    y = frozen(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dense = nf4_matrix.dequantize(frozen.base, torch.float32)
    torch.testing.assert_close(y, x @ dense.t() + 1)
    torch.testing.assert_close(gradient, dense.sum(dim=0).expand(3, -1))
