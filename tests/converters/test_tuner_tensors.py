"""Tensors of peft's tuners that are not LoRA: what is missing, left over or of another shape is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft as peft_format

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "shapes", "says"),
    [
        ({"peft_type": "IA3"}, {f"{Q}.lora_A.weight": (2, 8)}, "not a kind of tensor that IA3 has"),
        ({"peft_type": "IA3"}, {f"{Q}.ia3_l": (0, 1)}, "is not a part of ia3"),
        ({"peft_type": "BOFT"}, {f"{Q}.boft_R": (1, 2, 4, 4)}, "boft_R do not make a change by boft"),
        ({"peft_type": "SHIRA"}, {f"{Q}.shira_weight": (4,), f"{Q}.shira_indices": (2, 4)}, "is not a part of shira"),
        ({"peft_type": "VBLORA"}, {f"{Q}.vblora_logits_A": (2, 2, 4), f"{Q}.vblora_logits_B": (2, 2, 4)}, "is missing"),
        (
            {"peft_type": "RANDLORA", "save_projection": False},
            {f"{Q}.randlora_lambda": (2, 4), f"{Q}.randlora_gamma": (4, 8)},
            "random numbers of a seed",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS"},
            {"base_model.model.x.trainable_tokens_delta": (2, 8)},
            "is not a list of token ids",
        ),
        ({"peft_type": "LN_TUNING"}, {f"{Q}.lora_A": (2, 8)}, "not a kind of tensor that LN_TUNING has"),
        ({"peft_type": "FOURIERFT", "random_loc_seed": 2**64}, {f"{Q}.fourierft_spectrum": (4,)}, "not a seed of 64 bits"),
        (
            {"peft_type": "FOURIERFT", "scaling": "wide"},
            {f"{Q}.fourierft_spectrum": (4,)},
            '"scaling" is wide, which has the wrong',
        ),
        ({"peft_type": "WAVEFT", "wavelet_family": "sym4"}, {f"{Q}.waveft_spectrum": (4,)}, "only the wavelets of Daubechies"),
        ({"peft_type": "PEANUT", "act_fn": "mish"}, {f"{Q}.peanut_A.weight": (2, 8)}, '"act_fn" is mish: only relu'),
        ({"peft_type": "SUPERTUNING"}, {f"{Q}.supertuning_values": (4,)}, "save_precomputed_indices=True"),
        ({"peft_type": "UNILORA"}, {"base_model.unilora_theta_d": (8,)}, "save_indices=True"),
        ({"peft_type": "PVERA"}, {f"{Q}.pvera_lambda_b": (8,), f"{Q}.pvera_lambda_d": (4,)}, "base_model.pvera_A is missing"),
        (
            {"peft_type": "TINYLORA"},
            {f"{Q}.tinylora_{part}": (2, 2, 2) for part in "ABP"} | {f"base_model.tinylora_v.{n}": (2,) for n in range(2)},
            "the order of the modules in peft's model",
        ),
        ({"peft_type": "PSOFT"}, {f"{Q}.psoft_R.weight": (1,)}, "whose signs differ between machines"),
        ({"peft_type": "LILY"}, {f"{Q}.lily_A.weight": (2, 8)}, "peft cannot merge it either"),
    ],
)
def test_a_broken_one_is_refused(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], says: str, tmp_path: Path) -> None:
    safetensors_file.write(
        tmp_path / "adapter_model.safetensors", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterhubError, match=says):
        peft_format.read(tmp_path)
