"""What may be asked of a merge into a base, and what is said of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_converters import display

from .measure import Change

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""What `--dtype` may say, and the names of these types in files."""
REQUANTIZE = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0", "q5_1": "Q5_1"}
"""What `--requantize` may say of a GGUF likewise."""
NF4 = "nf4"
"""What it may say of a Hugging Face folder."""


@dataclass(frozen=True)
class Options:
    """What a merge into a base is asked for beside base and adapters.

    Attributes:
        dtype: The type of floats to write, `bf16`, `f16` or `f32`; that of the base when None.
        requantize: A quantized type to write, of `REQUANTIZE` or `NF4`.
        shard_size: Bytes of tensors in a file at most; None leaves the base's files as they are.
        dequantize: Whether a base that is quantized in Hugging Face's form may become one in floats.
        as_trained: Whether the weights are first rounded as they were seen in training.
        trained_in: The quantization seen in training, `nf4`; None when there was none or none is recorded.
        force: Whether a quantized result may lose what is the adapter's.
        lineage: What the result is made of, as JSON: written into it.
    """

    dtype: str | None = None
    requantize: str | None = None
    shard_size: int | None = None
    dequantize: bool = False
    as_trained: bool = False
    trained_in: str | None = None
    force: bool = False
    lineage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class FuseReport:
    """What a merge does; sizes in bytes.

    Attributes:
        out: The new folder or file; None when nothing was written.
        touched: Tensor name to its change.
        tensors: How many tensors the base has.
        size: Of all weights written.
        touched_size: Of the tensors changed.
        copied: Other files that came along.
        skipped: Files that did not, each with the reason.
        notes: One line each.
        warnings: What may not be what was meant, one line each.
    """

    out: Path | None
    touched: Mapping[str, Change]
    tensors: int
    size: int
    touched_size: int
    copied: tuple[str, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<FuseReport {self.out}: {self.tensors} tensors, {len(self.touched)} changed, {self.size:,} bytes>"

    def _repr_html_(self) -> str:
        rows = [(name, change.relative, change.kept) for name, change in self.touched.items()]
        return display.table(rows, head=("tensor", "relative change", "kept"), caption=repr(self))
