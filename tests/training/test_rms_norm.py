"""A frozen RMSNorm returns the bits of its family's module, and the gradient of x within rounding; other modules stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaWeightlessRMSNorm  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm  # noqa: E402
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm  # noqa: E402
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated  # noqa: E402

from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.layers.rms_norm import FORMULAS, Formula, FrozenRMSNorm, replace_frozen  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402

SIZE = 96
FAMILIES = [LlamaRMSNorm, Qwen3RMSNorm, GptOssRMSNorm, Gemma3RMSNorm, Gemma3nRMSNorm]


class Squared(LlamaRMSNorm):  # type: ignore[misc]
    """A norm of no known formula."""

    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states) ** 2


def frozen(norm_class: type[nn.Module], dtype: Any, **options: Any) -> nn.Sequential:
    """A model of one norm with a random frozen weight."""
    norm = norm_class(SIZE, **options)
    torch.manual_seed(0)
    nn.init.normal_(norm.weight)
    return nn.Sequential(norm).to(dtype).requires_grad_(requires_grad=False)


def gradient(function: Any, x: Any, dy: Any) -> Any:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, dy)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_class", FAMILIES)
def test_the_forward_pass_has_the_bits_of_the_family(norm_class: type[nn.Module], dtype: Any) -> None:
    model = frozen(norm_class, dtype)
    original = model[0]
    replace_frozen(model)
    assert isinstance(model[0], FrozenRMSNorm)
    assert model[0].weight is original.weight
    for shape in ((2, 33, SIZE), (3, 5, 4, SIZE)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for rows in (x, x.transpose(0, 1), x.float(), x * 1e-3):
            assert torch.equal(model(rows), original(rows))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("norm_class", FAMILIES)
def test_the_gradient_is_that_of_autograd_within_rounding(norm_class: type[nn.Module], dtype: Any, tolerance: float) -> None:
    model = frozen(norm_class, dtype)
    original = model[0]
    replace_frozen(model)
    x, dy = (torch.randn(7, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    expected, actual = gradient(original, x, dy), gradient(model, x, dy)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_gradient_in_float32_is_that_of_float64(formula: Formula) -> None:
    weight = nn.Parameter(torch.randn(SIZE, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    x, dy = (torch.randn(7, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def exact(x: Any) -> Any:
        return (weight.double() + formula.offset) * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    actual = gradient(FrozenRMSNorm(weight, 1e-5, formula), x, dy)
    torch.testing.assert_close(actual.double(), gradient(exact, x.double(), dy.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm_class", [Squared, nn.LayerNorm, Qwen3NextRMSNormGated, FalconMambaWeightlessRMSNorm])
def test_a_module_of_no_known_formula_stays(norm_class: type[nn.Module]) -> None:
    model = frozen(norm_class, torch.float32)
    original = model[0]
    replace_frozen(model)
    assert model[0] is original


def test_a_trained_norm_stays() -> None:
    model = frozen(LlamaRMSNorm, torch.float32).requires_grad_()
    replace_frozen(model)
    assert isinstance(model[0], LlamaRMSNorm)


def test_every_norm_of_a_llama_is_replaced_and_saves_its_input_alone(tiny_base: Path) -> None:
    base = load_base(tiny_base, train_config.BaseConfig(str(tiny_base)), train_config.LoRAConfig())
    norms = [path for path, module in base.model.named_modules() if isinstance(module, FrozenRMSNorm)]
    assert len(norms) == 2 * 2 + 1
    saved: list[tuple[int, ...]] = []
    norm = base.model.get_submodule(norms[0])
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16, requires_grad=True)

    def pack(tensor: Any) -> Any:
        saved.append((tensor.numel(), tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert saved == [(5 * 64, 2), (5, 4), (64, 2)]
