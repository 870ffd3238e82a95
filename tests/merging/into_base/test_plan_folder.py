"""Merges into a folder that cannot be right are refused before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Meta, Rows
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError
from tests.merging.into_base.test_model_merge import PLAIN, TABLE, K, Q, base_in, embedding, low_rank, tensors_of


def replaced(**tensors: np.ndarray) -> Adapter:
    return Adapter({}, replaced={name.replace("__", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("adapters", "base", "says"),
    [
        ([], {}, "no adapter to merge"),
        ([(Adapter({"model.layers.9.q": low_rank()}), 1)], {}, "model.layers.9.q.weight: not in the base"),
        ([(Adapter({Q: low_rank(16, 12)}), 1)], {}, "changes a weight of shape (16, 12), the base's"),
        ([(Adapter({"model.embed_tokens": embedding(44)}), 1)], {}, "after the vocabulary was resized"),
        (
            [(Adapter({"model.embed_tokens": embedding()}), 1)],
            {"drop": "lm_head.weight", "architectures": ["OtherForCausalLM"]},
            "are one tensor (model.embed_tokens.weight)",
        ),
        ([(replaced(lm_head__weight=TABLE), 0.5)], {}, "weight 0.5 has no meaning for it"),
        ([(replaced(lm_head__weight=TABLE[:5]), 1)], {}, "its tables do not agree: lm_head.weight 5, model"),
        ([(replaced(lm_head__weight=TABLE), 1), (Adapter({"lm_head": low_rank(40)}), 1)], {}, "another changes it too"),
        ([(Adapter({"lm_head": low_rank(40)}), 1), (replaced(lm_head__weight=TABLE), 1)], {}, "another changes it too"),
        ([(Adapter({}, rows={"lm_head": Rows((40,), TABLE[:1])}), 1)], {}, "do not fit the base's lm_head.weight"),
        ([(Adapter({K: low_rank(8, bias=np.ones(8, np.float32))}), 1)], {}, "the base has none"),
        ([(Adapter({Q: low_rank(magnitude=np.ones(16, np.float32))}), 0.5)], {}, "DoRA is not a sum"),
        ([(Adapter({Q: low_rank(magnitude=np.ones(4, np.float32))}), 1)], {}, "a DoRA magnitude of 4 numbers for 16"),
        ([(Adapter({Q: low_rank(transposed_base=True)}), 1)], {}, "is not known to store it transposed"),
        ([(dataclasses.replace(PLAIN, meta=Meta(init="olora")), 1)], {}, "initialized by olora"),
        ([(Adapter({Q: low_rank(scale=np.nan)}), 1)], {}, f"{Q}.lora_B: contains NaN or Inf"),
        ([(PLAIN, float("nan"))], {}, "nan is not a finite number"),
        ([(PLAIN, 1)], {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized (gptq)"),
        ([(PLAIN, 1)], {"dtype": np.dtype("i1")}, "is I8, not bfloat16, float16 or float32. Dequantize it first"),
        ([(PLAIN, 1e6)], {"dtype": dtypes.F16}, "is over 65504, the largest float16 number. Write bfloat16 instead"),
        ([(PLAIN, 1)], {"dtype": dtypes.F16, "scale": np.inf}, "the base has NaN or Inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_refused(tmp_path: Path, adapters: Any, base: dict[str, Any], says: str) -> None:
    folder = base_in(tmp_path / "base", **base)
    with pytest.raises(AdapterhubError) as caught:
        merge_into_base(adapters, folder, tmp_path / "out")
    assert says in str(caught.value)
    assert caught.value.exit_code == 6
    assert (caught.value.code == "sum-too-large") == ("Write bfloat16 instead" in says)
    assert (caught.value.code == "quantized-base") == ("the weights are quantized" in says)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_type_of_gguf_for_a_folder_is_refused_by_its_code(tmp_path: Path) -> None:
    says = "q8_0: is a type of GGUF files, and the output is a Hugging Face folder. Merge into a .gguf, or choose nf4"
    with pytest.raises(AdapterhubError, match=says) as caught:
        merge_into_base([(PLAIN, 1)], base_in(tmp_path / "base"), tmp_path / "out", options=Options(requantize="q8_0"))
    assert (caught.value.code, caught.value.exit_code) == ("gguf-type-for-folder", 6)


def test_a_name_that_could_be_two_tensors(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    tensors = {f"{part}.{name}": tensor for part in ("text", "vision") for name, tensor in tensors_of(base).items()}
    safetensors_file.write(base / "model.safetensors", tensors)
    with pytest.raises(AdapterhubError, match=r"could be text\..* or vision\."):
        merge_into_base([(PLAIN, 1)], base, tmp_path / "out")
