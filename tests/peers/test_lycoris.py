"""LyCORIS' algorithms with all their options: what it computes is what the base computes with the weights of our reading."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import NotUnderstoodError, RefusedError
from adapterhub_converters.formats import convert
from tests.conftest import need_module
from tests.support.environments import unpacked_wheel
from tests.support.images import merged

pytestmark = pytest.mark.peer
need_module("torch")
WHEELS = {"lycoris-lora==4.1.3": "lycoris/", "einops==0.8.1": "einops/", "toml==0.10.2": "toml/"}
# By the module that is trained: its name in a kohya file, and here.
NAMES = {
    "linear": ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
    "conv": ("lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"),
    "layer norm": ("lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1",
                   "unet.mid_block.attentions.0.transformer_blocks.0.norm1"),
    "group norm": ("lora_unet_mid_block_resnets_0_norm1", "unet.mid_block.resnets.0.norm1"),
}  # fmt: skip
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"alpha": 3}, {"alpha": 0}, {"rs_lora": True}, {"use_scalar": True}, {"weight_decompose": True}, {"use_tucker": True},
    {"bypass_mode": True}, {"use_tucker": True, "weight_decompose": True, "rs_lora": True, "use_scalar": True},
)  # fmt: skip
# If both its matrices are whole, LyCORIS trains LoKr with a scale of sqrt(dim) by rs_lora, and itself loads it with 1.
LOKR: tuple[dict[str, Any], ...] = (
    *(option | ({"lora_dim": 2} if "rs_lora" in option else {}) for option in OPTIONS),
    {"decompose_both": True}, {"full_matrix": True}, {"factor": 2}, {"full_matrix": True, "weight_decompose": True},
    {"unbalanced_factorization": True}, {"decompose_both": True, "use_tucker": True, "weight_decompose": True},
    {"full_matrix": True, "use_scalar": True},
)  # fmt: skip
CASES = [
    *(("LoConModule", module, option) for module in ("linear", "conv") for option in OPTIONS),
    *(("LohaModule", module, option) for module in ("linear", "conv") for option in OPTIONS),
    *(("LokrModule", module, option) for module in ("linear", "conv") for option in LOKR),
    *(("FullModule", module, {}) for module in ("linear", "conv")),
    *(("NormModule", module, {}) for module in ("layer norm", "group norm")),
]
REFUSED = {
    "ButterflyOFTModule": "OFT", "DiagOFTModule": "OFT", "GLoRAModule": "GLoRA", "IA3Module": "IA3", "TLoraModule": "T-LoRA",
}  # fmt: skip


@pytest.fixture(scope="module")
def lycoris() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for requirement, folder in WHEELS.items():
            patch.syspath_prepend(str(unpacked_wheel(requirement, folder)))
        import lycoris.modules

        yield lycoris.modules


def trained(lycoris: Any, kind: str, module: str, option: dict[str, Any]) -> tuple[Any, Any]:
    """A module of LyCORIS with random numbers, and the module of the base."""
    import torch

    torch.manual_seed(0)
    modules = {
        "linear": lambda: torch.nn.Linear(24, 32),
        "conv": lambda: torch.nn.Conv2d(24, 32, 3, padding=1),
        "layer norm": lambda: torch.nn.LayerNorm(24),
        "group norm": lambda: torch.nn.GroupNorm(4, 24),
    }
    base = modules[module]()
    options = {"multiplier": 1.0, "lora_dim": 4, "alpha": 2.0} | option
    ours = getattr(lycoris, kind)("x", copy.deepcopy(base), **options)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if not name.startswith("org_module"):
                parameter.copy_(parameter.abs() + 0.5 if "dora" in name else torch.randn(parameter.shape) * 0.3)
    if kind == "FullModule":
        ours.apply_to()  # it saves the difference to the weight that it took over
    return ours, base


def saved(path: Path, ours: Any, stem: str) -> Path:
    tensors = {f"{stem}.{name}": tensor.detach().numpy().copy() for name, tensor in ours.state_dict().items()}
    safetensors_file.write(path, tensors, {"modelspec.architecture": "stable-diffusion-v1/lora"})
    return path


def computed(layer: Any, module: str) -> np.ndarray:
    """What a layer computes of random inputs."""
    import torch

    shape = (5, 24, 6, 6) if module in ("conv", "group norm") else (5, 24)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: np.ndarray = layer.eval()(inputs).numpy()
    return result


def with_weights(base: Any, weight: np.ndarray, bias: np.ndarray) -> Any:
    """The module of the base with another weight and bias."""
    import torch

    changed = copy.deepcopy(base)
    changed.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return changed


@pytest.mark.parametrize(("kind", "module", "option"), CASES, ids=str)
def test_it_computes_what_lycoris_computes(
    lycoris: Any, tmp_path: Path, kind: str, module: str, option: dict[str, Any]
) -> None:
    stem, target = NAMES[module]
    ours, base = trained(lycoris, kind, module, option)
    path = saved(tmp_path / "x.safetensors", ours, stem)
    weight, bias = (tensor.detach().numpy() for tensor in (base.weight, base.bias))
    # Not its own merge, which multiplies LoHa by the scale twice.
    expected = computed(ours, module)
    weights_and_bias = merged(convert.read(path), target, weight, bias)
    np.testing.assert_allclose(computed(with_weights(base, *weights_and_bias), module), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - computed(with_weights(base, weight, bias), module)).max() > 0.01
    # To diffusers and back, except what diffusers has no word for.
    if "norm" not in module and kind != "FullModule":
        convert.convert(path, tmp_path / "d.safetensors", to="diffusers")
        again, _ = merged(convert.read(tmp_path / "d.safetensors"), target, weight, bias)
        np.testing.assert_allclose(again, weights_and_bias[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoConModule", "LohaModule", "LokrModule"])
def test_a_scale_of_inputs_is_refused_by_name(lycoris: Any, tmp_path: Path, kind: str) -> None:
    ours, _ = trained(lycoris, kind, "linear", {"weight_decompose": True, "wd_on_out": False})
    with pytest.raises(RefusedError, match=r"a DoRA scale of shape \(1, 24\) is not one number for each of 32 outputs"):
        convert.read(saved(tmp_path / "x.safetensors", ours, NAMES["linear"][0]))


@pytest.mark.parametrize("kind", REFUSED)
def test_other_algorithms_are_refused_by_name(lycoris: Any, tmp_path: Path, kind: str) -> None:
    ours, _ = trained(lycoris, kind, "linear", {})
    with pytest.raises(NotUnderstoodError) as caught:
        convert.read(saved(tmp_path / "x.safetensors", ours, NAMES["linear"][0]))
    assert any(f"({REFUSED[kind]})" in reason for reason in caught.value.items)
