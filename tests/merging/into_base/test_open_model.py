"""Whole models are read in floats: folders whose weights are quantized or integers are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from adapterhub.merging.into_base.extraction import ExtractionOptions, WeightExtraction, extract
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from tests.merging.into_base.test_extraction import tuned_from
from tests.merging.into_base.test_model_merge import K, Q, base_in, tensors_of

QW, KW, TABLE = f"{Q}.weight", f"{K}.weight", "model.embed_tokens.weight"


def extraction_of(name: str, weights: tuple[WeightExtraction, ...]) -> WeightExtraction:
    return next(weight for weight in weights if weight.name == name)


def test_a_quantized_model_and_a_file_are_refused_by_name(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    shutil.copytree(base, tmp_path / "int8")
    config = json.loads((base / "config.json").read_text())
    quantized_config = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "int8" / "config.json").write_text(json.dumps(quantized_config))
    with pytest.raises(
        RefusedError, match="change in training is smaller than their rounding. Name the model in 16 or 32 bits"
    ):
        extract(base, tmp_path / "int8", ExtractionOptions(2))
    with pytest.raises(RefusedError, match="is a file, not a Hugging Face folder"):
        extract(base / "model.safetensors", base, ExtractionOptions(2))


def test_a_weight_in_integers_is_refused_by_name(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    tuned = tuned_from(base, tmp_path / "tuned", {})
    safetensors_file.write(tuned / "model.safetensors", {**tensors_of(tuned), QW: np.ones((16, 16), np.int8)}, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"is I8 in \S+/tuned, not a type of floats. Name the model in 16 or 32 bits"):
        extract(base, tuned, ExtractionOptions(rank=2))
