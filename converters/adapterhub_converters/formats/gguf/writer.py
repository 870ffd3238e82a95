"""Writing of an `Adapter` as a GGUF file from which llama.cpp computes the same function.

llama.cpp multiplies factors of any type whose blocks divide a row (`src/llama-adapter.cpp` does not check the type). A row that
they do not divide is stored in float16, as llama.cpp's `convert_lora_to_gguf.py` does, or in float32 if float16 would overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, FactorPair, Loss, LossReport, TensorLoss, factor_pairs, without_invocation
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture import FUSED_IN
from adapterhub_converters.architectures.architecture_lookup import Architecture
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.errors import MissingExtraError, ParameterError, RefusedError, refused_error
from adapterhub_converters.formats import DTYPES, file_alpha, source_config
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import adapter_checks
from .tensor_layout import HUB, INVOCATION, Layout, arrange, assemble, file_digest, size_of

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_ALORA = "an aLoRA: llama-server applies it from its invocation tokens on, other programs to every token"
NEGLIGIBLE_ALPHA = 1e-38
"""An alpha without effect: llama.cpp reads 0 as a scale of 1, and this vanishes in any float32 sum."""


def write(
    adapter: Adapter,
    path: Path,
    *,
    base: BaseSpec | None = None,
    dtype: str = "source",
    prompt: TrainedPrompt = PROMPT_OF_BASE,
) -> LossReport:
    """Write the file `path` for the base's architecture.

    Args:
        adapter: An adapter whose deltas are all plain pairs.
        path: A new file.
        base: The base; its config is enough.
        dtype: One of `formats.DTYPES`: the type to store all tensors as; `source` keeps theirs.
        prompt: How the adapter was trained to be asked, which llama.cpp ignores and `TrainedPrompt.read` finds.

    Raises:
        RefusedError: There is no base, or llama.cpp would compute the adapter incorrectly.
    """
    if base is None:
        problem = "a GGUF adapter depends on the base's architecture and heads"
        raise RefusedError("gguf", problem, "Name its base model", code="base-required")
    architecture = base.llama_cpp_architecture()
    problems = adapter_checks.problems(adapter, base, architecture)
    if problems:
        raise refused_error("gguf", problems)
    pairs = factor_pairs(without_invocation(adapter))
    orders = {target: architecture.order(target, base.config, base.source) for target in sorted(pairs, key=_file_order)}
    sizes = {target: size_of(pairs[target], order) for target, order in orders.items()}
    n_experts, rows = adapter_checks.expert_count(base, architecture), adapter_checks.base_rows(base)
    layout = arrange(architecture, sizes, n_experts, rows, base.source)
    plan = _plan_alpha(pairs, layout)
    writing = _FileContents(pairs, layout, plan, architecture, orders=orders, dtype=dtype)
    metadata = _metadata(adapter, base, architecture, plan.common) | prompt.metadata()
    notes = [*adapter.notes, *plan.notes, *_assumption_notes(base, layout)]
    notes += [_ALORA] if adapter.meta.invocation else []
    try:
        config = source_config.keys(adapter, writing.lines, source_config.NO_DIGEST, writing.ulps)
    except RefusedError as error:
        config = {}
        notes.append(f"the source's config is not stored, so the way back is not exact: {error}")
    metadata |= {key: gguf_types.string_value(text) for key, text in config.items()}
    with ThreadPoolExecutor(1) as executor:  # hashing takes as long as writing, and neither holds the interpreter's lock
        digest = executor.submit(file_digest, architecture.gguf, plan.common, writing.read_back, adapter.meta.invocation)
        late = (lambda: {source_config.PAYLOAD: gguf_types.string_value(digest.result())}) if config else None
        gguf_output.write(path, metadata, writing.tensors, late)
    return LossReport(tuple(writing.losses), tuple(notes))


class _FileContents:
    """The tensors of a file, the loss of each of the source's tensors, and the records from which the source is recovered."""

    def __init__(
        self,
        deltas: Mapping[str, FactorPair],
        layout: Layout,
        plan: file_alpha.Plan,
        architecture: Architecture,
        *,
        orders: Mapping[str, architecture_lookup.Order],
        dtype: str,
    ) -> None:
        self.tensors: dict[str, np.ndarray | gguf_output.QuantizedTensor] = {}
        self.read_back: dict[str, np.ndarray] = {}
        self.losses: list[TensorLoss] = []
        self.lines: list[source_config.Line] = []
        self.ulps: list[np.ndarray] = []
        self._stored: dict[str, StoredTensor] = {}
        self._layout, self._plan = layout, plan
        folded = {
            target: file_alpha.fold(f"{target}.lora_B", deltas[target].lora_B, plan.factors[target]) for target in layout.parts
        }
        arrays = {
            target: architecture_lookup.reorder_pair(
                (deltas[target].lora_A, fold.lora_B), orders[target], across=architecture.orders_columns(target)
            )
            for target, fold in folded.items()
        }
        for target, parts in layout.parts.items():
            for part in parts:
                if f"{part.stem}.weight.lora_a" not in self.tensors:
                    self._store(part.stem, assemble(layout, part.stem, arrays), dtype)
            self._add_line(target, deltas[target], folded[target], orders[target])

    def _store(self, stem: str, pair: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
        for half, array in zip("ab", pair, strict=True):
            name = f"{stem}.weight.lora_{half}"
            oriented = np.ascontiguousarray(array.T) if name == "token_embd.weight.lora_a" else array
            stored = as_dtype(name, oriented, dtype)
            self.tensors[name], self.read_back[name], self._stored[name] = stored.data, stored.read_back, stored

    def _add_line(
        self, target: str, delta: FactorPair, folded: file_alpha.FoldedFactor, order: architecture_lookup.Order
    ) -> None:
        layout, stem = self._layout, self._layout.parts[target][0].stem
        halves = [self._worst_half(target, half) for half in "ab"]
        a_type, b_type = (dtypes.name_of(array.dtype) for array in (delta.lora_A, delta.lora_B))
        ulps = folded.ulps
        # What was rounded in the file cannot be undone: record the type that a reader gets.
        if halves[0].error:
            a_type = dtypes.name_of(halves[0].read_back.dtype)
        if halves[1].error:
            b_type = dtypes.name_of(halves[1].read_back.dtype) if self._plan.factors[target] == 1.0 else "F32"
            ulps = None
        size = size_of(delta)
        block = None
        if not layout.is_whole(target) or a_type != dtypes.name_of(halves[0].read_back.dtype):
            block = source_config.Block(size.r, size.rows, size.experts, a_type, layout.rank_of(target))
        factor = self._plan.factors[target]
        self.lines.append(source_config.Line(stem, target, factor, b_type, order, ulps is not None, block))
        self.ulps += [] if ulps is None else [ulps]
        self.losses += [
            _with_storage(TensorLoss(f"{target}.lora_A", Loss.EXACT), halves[0]),
            _with_storage(folded.loss, halves[1]),
        ]

    def _worst_half(self, target: str, half: str) -> StoredTensor:
        # A delta that was spread over several tensors lost as much as the worst of them.
        stored = [self._stored[f"{part.stem}.weight.lora_{half}"] for part in self._layout.parts[target]]
        return max(stored, key=lambda tensor: tensor.error)


def _with_storage(line: TensorLoss, stored: StoredTensor) -> TensorLoss:
    note = "; ".join(filter(None, (line.note, stored.note)))
    return TensorLoss(line.name, Loss.ROUNDED if stored.error else line.loss, note)


def _assumption_notes(base: BaseSpec, layout: Layout) -> Iterator[str]:
    """Yield a note on what is assumed of the base's GGUF when that file itself is not given."""
    if base.kind != "gguf" and any(stem.rpartition(".")[2] in FUSED_IN for stem in layout.members):
        yield (
            "for a GGUF of the base in which q, k, v, gate and up are separate tensors, as llama.cpp's converter writes it; "
            "if yours fuses them, give it as the base"
        )


def _file_order(target: str) -> tuple[int, str]:
    layer = architecture_lookup.layer_of(target)
    return (-1 if layer is None else layer, target)


def _plan_alpha(deltas: Mapping[str, FactorPair], layout: Layout) -> file_alpha.Plan:
    alphas = {target: deltas[target].scaling * layout.rank_of(target) for target in layout.parts}
    no_effect = file_alpha.Plan(
        NEGLIGIBLE_ALPHA, dict.fromkeys(alphas, 1.0), ("alpha is 0: the file has 1e-38, which has no effect",)
    )
    return file_alpha.plan(alphas, np.dtype(np.float32), "alpha") or no_effect


def _metadata(adapter: Adapter, base: BaseSpec, architecture: Architecture, alpha: float) -> dict[str, MetadataValue]:
    metadata = {
        "general.architecture": gguf_types.string_value(architecture.gguf),
        "general.type": gguf_types.string_value("adapter"),
        "adapter.type": gguf_types.string_value("lora"),
        "adapter.lora.alpha": gguf_types.f32_value(alpha),
    }
    if adapter.meta.invocation:
        metadata[INVOCATION] = MetadataValue("[UINT32]", list(adapter.meta.invocation))
    name = adapter.meta.base_model or base.repo
    if name:
        metadata["general.base_model.count"] = gguf_types.u32_value(1)
        metadata["general.base_model.0.name"] = gguf_types.string_value(name)
        if _is_repo(name):
            metadata["general.base_model.0.repo_url"] = gguf_types.string_value(HUB + name)
    if base.fingerprint:
        metadata["adapterhub.base.fingerprint"] = gguf_types.string_value(base.fingerprint)
    return metadata


def _is_repo(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(part for part in name.split("/"))


# ---- Types of numbers


_BLOCK = 32  # elements; of Q8_0 and Q4_0


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor as the file stores it, the floats that a reader gets back, and the largest absolute error of any element."""

    data: np.ndarray | gguf_output.QuantizedTensor
    read_back: np.ndarray
    error: float
    note: str = ""


def as_dtype(name: str, array: np.ndarray, dtype: str) -> StoredTensor:
    """Return `array` as `dtype`, one of `formats.DTYPES`; RefusedError if a number would become infinite."""
    if dtype not in DTYPES:
        raise ParameterError("dtype", f"GGUF has no {dtype!r}", f"One of {', '.join(DTYPES)}")
    if dtype == "source" or dtypes.name_of(array.dtype) == dtype.upper():
        return StoredTensor(array, array, 0.0)
    if dtype in ("q8_0", "q4_0"):
        # Quantized rows consist of whole blocks; other rows fall back to 16 bits.
        if array.shape[-1] % _BLOCK == 0:
            return _quantize(name, array, dtype.upper())
        reason = f"rows of {array.shape[-1]} are not a multiple of {dtype.upper()}'s blocks ({_BLOCK}): "
        try:
            stored = as_dtype(name, array, "f16")
        except RefusedError:
            stored = as_dtype(name, array, "f32")
        return StoredTensor(
            stored.data, stored.read_back, stored.error, reason + (stored.note or f"stays {dtypes.name_of(array.dtype)}")
        )
    with np.errstate(over="ignore", under="ignore"):
        result = array.astype(dtypes.NUMPY[dtype.upper()])
    return _with_error(name, array, result, result, dtype.upper())


def _with_error(
    name: str, array: np.ndarray, data: np.ndarray | gguf_output.QuantizedTensor, read_back: np.ndarray, kind: str
) -> StoredTensor:
    exact, approximate = array.astype(np.float64), read_back.astype(np.float64)
    finite = np.isfinite(exact)
    if not np.isfinite(approximate[finite]).all():
        largest = float(np.abs(exact[finite]).max())
        raise RefusedError(name, f"{largest:g} does not fit into {kind}", "Choose another dtype, such as bf16 or f32")
    error = float(np.abs(exact[finite] - approximate[finite]).max(initial=0.0))
    return StoredTensor(data, read_back, error, f"as {kind}" + (f", largest error {error:.3g}" if error else ", exactly"))


def _quantize(name: str, array: np.ndarray, kind: str) -> StoredTensor:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MissingExtraError(name, f"writing {kind} needs the gguf package", "Run `pip install gguf`") from error
    if not np.isfinite(array).all():
        raise RefusedError(name, f"{kind} cannot hold NaN or Inf", code="non-finite")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        raw = quants.quantize(np.ascontiguousarray(array, np.float32), GGMLQuantizationType[kind])
        read_back = quants.dequantize(raw, GGMLQuantizationType[kind])
    return _with_error(name, array, gguf_output.QuantizedTensor(kind, array.shape, raw), read_back, kind)
