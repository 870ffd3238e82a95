"""The files of an mlx-lm folder, and the digest of everything that determines its function."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterhub_converters.adapter_files import ADAPTER_CONFIG, MLX_WEIGHTS
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate

CONFIG = ADAPTER_CONFIG
WEIGHTS = MLX_WEIGHTS
RANKS = "adapterhub.mlx.ranks"
"""Our own key in the header's metadata, for the ranks that were padded with zeros, by module."""


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a folder with an adapter of mlx-lm or mlx-vlm."""
    text = candidate.config
    if '"peft_type"' in text:
        return False
    by_vlm = '"rank"' in text and '"alpha"' in text and (candidate.path / WEIGHTS).is_file()
    return '"lora_parameters"' in text or '"fine_tune_type"' in text or by_vlm


def payload_digest(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Return the digest of everything that determines what mlx-lm computes, and of the ranks that were padded."""
    facts = {key: config.get(key) for key in ("fine_tune_type", "num_layers", "lora_parameters")}
    padded_ranks = [metadata[RANKS]] if RANKS in metadata else []
    return source_config.payload_digest(dict(sorted(tensors.items())), json.dumps(facts, sort_keys=True), *padded_ranks)
