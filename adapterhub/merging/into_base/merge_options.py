"""Options of a merge into a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass

from .importance import Importance

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""From values of `dtype` to the names of these types in files."""
REQUANTIZE = {
    "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k": "Q5_K", "q4_k": "Q4_K", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0",
    "q5_1": "Q5_1",
}  # fmt: skip
"""From values of `requantize` for a GGUF to the names of these types in files."""
NF4 = "nf4"
"""The value of `requantize` for a Hugging Face folder."""


@dataclass(frozen=True)
class Options:
    """Options of a merge into a base.

    Attributes:
        dtype: The type of floats to write, `bf16`, `f16` or `f32`; None for that of the base.
        requantize: A quantized type to write, one of `REQUANTIZE`, `mixtures.MIXTURES` or `NF4`.
        shard_size: The largest number of bytes of tensors in a file; None to keep the base's files.
        dequantize: Allow a quantized Hugging Face base to become a model in floats.
        as_trained: First round the weights as training saw them.
        trained_in: The quantization that training saw, `nf4`; None if the base was not quantized or nothing is recorded.
        importance: How much the columns of each tensor count when it is quantized; for a folder that becomes a GGUF.
        force: Allow a quantized result to lose most of the adapter.
        chat_template: The chat template to write in place of the base's; None to keep that.
        end_token: The id of a token that ends answers besides those at which the base stops; None for no other.
        lineage: The sources of the result, a JSON object; written into it.
    """

    dtype: str | None = None
    requantize: str | None = None
    shard_size: int | None = None
    dequantize: bool = False
    as_trained: bool = False
    trained_in: str | None = None
    importance: Importance | None = None
    force: bool = False
    chat_template: str | None = None
    end_token: int | None = None
    lineage: Mapping[str, Any] = field(default_factory=dict)
