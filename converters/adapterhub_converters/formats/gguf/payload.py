"""What of a GGUF adapter decides what llama.cpp computes, and so what the source's config belongs to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapterhub_converters.formats import source_config

HUB = "https://huggingface.co/"


def digest(architecture: str, alpha: float, tensors: Mapping[str, np.ndarray]) -> str:
    """Digest of all that decides what llama.cpp computes."""
    return source_config.payload_digest(tensors, architecture, np.float32(alpha).tobytes().hex())
