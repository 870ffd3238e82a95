"""Reading of a GGUF file as an `Adapter`: the source's own if its config is in the file, else what llama.cpp computes.

A file written by another program is read under the names that its base has in Hugging Face. What llama.cpp stacks or fuses
is split again: experts into modules or into one parameter, as the base has them; q, k and v from one tensor or into one. All of
this is exact, in factors that may be larger than necessary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, FactorPair, LowRank, LowRankEmbedding, Meta, StackedLowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture import FUSED
from adapterhub_converters.architectures.architecture_lookup import Architecture, Order
from adapterhub_converters.containers import gguf_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import FormatError, NotUnderstoodError, RefusedError
from adapterhub_converters.formats import source_config
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_dataclass import dataclass

from . import adapter_checks
from .tensor_layout import HUB, INVOCATION, Arrays, Layout, Size, arrange, assemble, file_digest, take_apart

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_FLOATS = ("F32", "F16", "BF16")
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""llama.cpp's name of a module to its `lora_a` and `lora_b`."""


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a GGUF file of the type `adapter`; a malformed GGUF counts, because reading it gives the reason."""
    if candidate.gguf is None:
        return candidate.is_gguf
    return candidate.gguf.text("general.type") == "adapter"


def read(path: Path | Candidate, *, base: BaseSpec | None = None, ordered: bool = True) -> Adapter:
    """Return the adapter in a GGUF file: the source's own if its config is in the file, else under the base's names.

    Without a source's config, an architecture that permutes q and k needs `base` for its number of heads. If `ordered` is
    false, the file is read without it: rows of `lora_B` may then be in llama.cpp's order, which suffices for shapes and
    ranges of numbers.
    """
    candidate = Candidate.of(path)
    location = str(candidate.path)
    with candidate.open_gguf() as file:
        header = file.header
        _check_kind(header, location)
        alpha = _alpha(header, location)
        tensors = {name: file.tensor(name) for name in file.tensors}
    pairs = _pairs(tensors, location)
    invocation = _invocation(header, location)
    digest = file_digest(header.text("general.architecture"), alpha, tensors, invocation)
    if source_config.matches_payload(header.metadata, digest):
        return _restore(header, alpha, pairs, location)
    adapter = _read_foreign(header, alpha, pairs, base, location, ordered=ordered)
    return replace(adapter, meta=replace(adapter.meta, invocation=invocation))


def is_conditional(path: Path) -> bool:
    """Return whether a GGUF has an aLoRA, which acts only after certain tokens."""
    with GGUFFile(path) as file:
        return bool(_invocation(file.header, str(path)))


def _check_kind(header: gguf_file.GGUFHeader, location: str) -> None:
    general, kind = header.text("general.type"), header.text("adapter.type")
    if general != "adapter" or not kind:
        key, value, present = ("adapter.type", "lora", kind) if general == "adapter" else ("general.type", "adapter", general)
        raise FormatError(location, f"not a LoRA adapter: {key} is {present[:40]!r}, not {value!r}")
    if kind != "lora":
        raise NotUnderstoodError(location, f"adapter.type is {kind[:40]!r}, and only 'lora' is supported")
    if not header.tensors:
        problem = "there are no tensors in it: the program that wrote it left out all of them"
        raise FormatError(location, problem, "Convert the adapter again")


def _alpha(header: gguf_file.GGUFHeader, location: str) -> float:
    """Return the file's alpha; 0 if it has none, as in llama.cpp."""
    kind = header.kinds.get("adapter.lora.alpha", "FLOAT32")
    if kind != "FLOAT32":
        raise FormatError(location, f"adapter.lora.alpha is a {kind}; llama.cpp aborts on anything but FLOAT32")
    alpha = float(header.metadata.get("adapter.lora.alpha", 0.0))
    if not math.isfinite(alpha):
        raise FormatError(location, f"adapter.lora.alpha is {alpha}")
    return alpha


def _invocation(header: gguf_file.GGUFHeader, location: str) -> tuple[int, ...]:
    """Return the ids of an aLoRA's invocation tokens, empty for a plain LoRA; FormatError for a type that llama.cpp refuses."""
    kind = header.kinds.get(INVOCATION, "[UINT32]")
    if kind != "[UINT32]":
        raise FormatError(location, f"{INVOCATION} is a {kind}, but llama.cpp reads only a [UINT32]")
    tokens = tuple(map(int, header.metadata.get(INVOCATION, ())))
    # llama.cpp's token ids are signed 32-bit integers.
    if any(token >= 2**31 for token in tokens):
        raise FormatError(location, f"{INVOCATION} has an id that no token can have")
    return tokens


def _restore(header: gguf_file.GGUFHeader, alpha: float, pairs: Pairs, location: str) -> Adapter:
    lines = source_config.parse_lines(header.metadata, location)
    architecture = _source_architecture(header, lines, location)
    for line in lines:
        if line.stem not in pairs:
            raise FormatError(location, "adapterhub.source.tensors does not match the file")
        if not architecture.stems(line.target):
            problem = f"adapterhub.source.tensors has {line.target!r}, of which llama.cpp's {architecture.gguf} has no tensor"
            raise FormatError(location, problem, source_config.CONVERT_AGAIN)
    # The source's config is untrusted: every line of it is checked against the architecture before it is used.
    factors = _source_factors(architecture, lines, pairs, location)

    def pair(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        lora_A, lora_B = factors[line.target]
        if not architecture.allows(line.target, line.order):
            raise FormatError(location, f"{line.target}: the source's config gives its rows the order {line.order}")
        across = architecture.orders_columns(line.target)
        if not architecture_lookup.order_fits(line.order, lora_A.shape[-1] if across else lora_B.shape[-2]):
            raise FormatError(location, f"{line.stem}: lora_b {lora_B.shape} does not match {line.order} heads")
        return architecture_lookup.restore_pair((lora_A, lora_B), line.order, across=across)

    return source_config.restore_adapter(header.metadata, lines, pair, lambda r: alpha / r if alpha else 1.0, location)


def _source_factors(architecture: Architecture, lines: Sequence[source_config.Line], pairs: Arrays, location: str) -> Arrays:
    """Return the factors of each line, in llama.cpp's order; FormatError if the layout of the file differs."""
    sizes = {line.target: _size(line, *pairs[line.stem]) for line in lines}
    # The file itself tells the number of experts, so that reading it needs no base.
    n_experts = max((pair[0].shape[0] for pair in pairs.values() if pair[0].ndim == 3), default=0)
    rows = {stem: lora_b.shape[-2] for stem, (_, lora_b) in pairs.items()}
    layout = arrange(architecture, sizes, n_experts, rows, location)
    if set(layout.members) != set(pairs) or any(line.stem != layout.parts[line.target][0].stem for line in lines):
        raise FormatError(location, "adapterhub.source.tensors does not match the file")
    for stem, (lora_a, lora_b) in pairs.items():
        stack = (layout.experts[stem],) if layout.experts[stem] else ()
        r, row_count = layout.rank[stem], layout.rows[stem]
        if lora_a.shape[:-1] != (*stack, r) or lora_b.shape != (*stack, row_count, r):
            raise FormatError(location, f"{stem}: {lora_a.shape} and {lora_b.shape} do not match the source's config")
    factors = {line.target: _line_factors(layout, line, sizes[line.target], pairs, location) for line in lines}
    # Reassembling proves that the file has nothing besides the source's factors.
    for stem in layout.members:
        reassembled = assemble(layout, stem, factors)
        if any(not _have_equal_bytes(rebuilt, stored) for rebuilt, stored in zip(reassembled, pairs[stem], strict=True)):
            raise FormatError(location, f"{stem} contains more than the source's config has")
    return factors


def _size(line: source_config.Line, lora_a: np.ndarray, lora_b: np.ndarray) -> Size:
    if line.block:
        return Size(line.block.r, line.block.rows, line.block.experts, architecture_lookup.piece_rows(line.order))
    return Size(lora_b.shape[-1], lora_b.shape[-2], lora_a.shape[0] if lora_a.ndim == 3 else 0)


def _line_factors(
    layout: Layout, line: source_config.Line, size: Size, pairs: Arrays, location: str
) -> tuple[np.ndarray, np.ndarray]:
    lora_A, lora_B = take_apart(layout, line.target, size, pairs)
    if line.block is None or line.block.rank != layout.rank_of(line.target):
        if line.block:
            raise FormatError(location, f"{line.target}: its rank in the file is {layout.rank_of(line.target)}")
        return lora_A, lora_B
    with np.errstate(over="ignore"):
        return lora_A.astype(dtypes.NUMPY[line.block.dtype_A], copy=False), lora_B


def _have_equal_bytes(array: np.ndarray, reference: np.ndarray) -> bool:
    return (
        array is reference or array.astype(reference.dtype, copy=False).tobytes() == np.ascontiguousarray(reference).tobytes()
    )


def _architecture(header: gguf_file.GGUFHeader, location: str) -> Architecture:
    experts = any("_exps." in name or "ffn_gate_inp." in name for name in header.tensors)
    return architecture_lookup.by_gguf(header.text("general.architecture"), location, experts=experts)


def _source_architecture(header: gguf_file.GGUFHeader, lines: Sequence[source_config.Line], location: str) -> Architecture:
    """Return the row of the file's architecture that has every module of the source's config in the order given there."""
    usual = _architecture(header, location)
    rows = (usual, *architecture_lookup.rows_of_gguf(usual.gguf))
    has_all = (row for row in rows if all(row.stems(line.target) and row.allows(line.target, line.order) for line in lines))
    return next(has_all, usual)


def _read_foreign(
    header: gguf_file.GGUFHeader, alpha: float, pairs: Pairs, base: BaseSpec | None, location: str, *, ordered: bool
) -> Adapter:
    architecture = _architecture(header, location)
    if base is not None:
        base_architecture = base.llama_cpp_architecture()
        if base_architecture.gguf != architecture.gguf:
            raise RefusedError(location, f"made for {architecture.gguf}, but the base is {base.architecture} ({base.source})")
        architecture = base_architecture
    deltas = _ForeignFile(_split_gate_up(pairs, architecture, location), alpha, architecture, base, location, ordered).deltas()
    for target, delta in deltas.items():
        for problem in adapter_checks.base_mismatches(target, delta, base, architecture) if base else ():
            raise RefusedError(location, f"{target}: {problem}")
    return Adapter(dict(deltas), meta=Meta(base_model=_base_model(header)), notes=tuple(_notes(header)))


def _notes(header: gguf_file.GGUFHeader) -> Iterator[str]:
    if source_config.has_source_config(header.metadata):
        yield source_config.IGNORED
    quantized = sorted({info.type_name for info in header.tensors.values()} - set(_FLOATS))
    if quantized:
        yield f"stored as {', '.join(quantized)}: the factors are dequantized to float32"


def _pairs(tensors: Mapping[str, np.ndarray], location: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        full, _, half = name.rpartition(".")
        stem = full.removesuffix(".weight")
        if half not in ("lora_a", "lora_b") or stem == full:
            raise RefusedError(location, f"tensor {name!r} is not part of a low-rank pair; llama.cpp ignores or refuses it")
        if array.dtype.kind in "iu":
            raise FormatError(location, f"tensor {name!r} contains integers, and factors are floats")
        if array.ndim != (3 if stem.endswith("_exps") else 2) or 0 in array.shape:
            raise RefusedError(location, f"tensor {name!r} has shape {array.shape}, which llama.cpp does not multiply")
        halves.setdefault(stem, {})[half] = array
    for stem, pair in halves.items():
        if len(pair) < 2:
            raise FormatError(location, f"{stem!r} has {next(iter(pair))} alone; its counterpart is missing")
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for stem, pair in halves.items():
        lora_a, lora_b = pair["lora_a"], pair["lora_b"]
        if stem == "token_embd":
            # llama.cpp looks rows of this factor up by token, so the file has it transposed.
            lora_a = np.ascontiguousarray(lora_a.T)
        if lora_a.shape[:-2] != lora_b.shape[:-2] or lora_a.shape[-2] != lora_b.shape[-1]:
            raise FormatError(location, f"{stem}: lora_a {lora_a.shape} and lora_b {lora_b.shape} do not share a rank")
        pairs[stem] = lora_a, lora_b
    return pairs


def _base_model(header: gguf_file.GGUFHeader) -> str | None:
    url = header.text("general.base_model.0.repo_url")
    return url.removeprefix(HUB) if url.startswith(HUB) else header.text("general.base_model.0.name") or None


# ---- Files of other programs


def _split_gate_up(pairs: Pairs, architecture: Architecture, location: str) -> Pairs:
    """Return the pairs, with each joint pair of gate and up split in two that share `lora_a`, if the architecture has both."""
    split_pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for stem, (lora_a, lora_b) in pairs.items():
        prefix, _, name = stem.rpartition(".")
        if name != "ffn_gate_up_exps" or architecture.has_tensor(stem):
            split_pairs[stem] = lora_a, lora_b
            continue
        if lora_b.shape[-2] % 2:
            raise FormatError(location, f"{stem}: {lora_b.shape[-2]} rows cannot be split into gate and up")
        for part, rows in zip(FUSED[name], np.split(lora_b, 2, axis=-2), strict=True):
            if f"{prefix}.{part}" in pairs:
                raise FormatError(location, f"{stem}: there is a pair of {part} too")
            split_pairs[f"{prefix}.{part}"] = lora_a, np.ascontiguousarray(rows)
    return split_pairs


@dataclass(frozen=True)
class _ForeignFile:
    """The deltas of a file without a source's config; an alpha of 0 means a scale of 1."""

    pairs: Pairs
    alpha: float
    architecture: Architecture
    base: BaseSpec | None
    location: str
    ordered: bool = True

    def deltas(self) -> dict[str, FactorPair]:
        """Map each target to its delta; RefusedError names a tensor that has no verified name."""
        deltas: dict[str, FactorPair] = {}
        for stem in self.pairs:
            if module := self.architecture.module(stem):
                deltas[module] = self._module_delta(stem, module)
            elif self.architecture.stacked_module(stem):
                deltas |= self._expert_deltas(stem)
            elif module := self.architecture.split_module(stem):
                deltas[module] = self._joined_module(module)
            elif stem.endswith(".attn_qkv") and self.architecture.module(f"{stem.removesuffix('qkv')}q"):
                deltas |= self._qkv_deltas(stem)
            else:
                models = f"Hugging Face's {self.architecture.gguf} models"
                raise RefusedError(self.location, f"tensor {stem!r} has no verified name in {models}")
        return deltas

    def _scale(self, stem: str) -> float:
        """Return the alpha of a pair; if the file has none, the rank, as llama.cpp then scales by 1."""
        return self.alpha or float(self.pairs[stem][1].shape[-1])

    def _order(self, module: str) -> Order:
        """Return the order of a module's rows in llama.cpp; 0 if they are to be left in that order."""
        return self.architecture.order(module, self._config(), self.location) if self.ordered or self.base else 0

    def _config(self) -> Mapping[str, Any]:
        return self.base.config if self.base else {}

    def _module_delta(self, stem: str, module: str) -> FactorPair:
        lora_a, lora_b = self.pairs[stem]
        order = self._order(module)
        across = self.architecture.orders_columns(module)
        if not architecture_lookup.order_fits(order, lora_a.shape[-1] if across else len(lora_b)):
            raise FormatError(self.location, f"{stem}: {len(lora_b)} rows do not match {order} heads")
        if stem == "token_embd":
            return LowRankEmbedding(lora_a, lora_b, self._scale(stem))
        transposed = self.architecture.transposed and stem.startswith("blk.")
        pair = architecture_lookup.restore_pair((lora_a, lora_b), order, across=across)
        return LowRank(*pair, self._scale(stem), transposed_base=transposed)

    def _joined_module(self, module: str) -> LowRank:
        """Return the delta of a module whose rows are in several tensors, which share `lora_a` or have blocks of columns."""
        stems = self.architecture.stems(module)
        if missing := next((stem for stem in stems if stem not in self.pairs), None):
            raise RefusedError(self.location, f"{module}: {missing} is missing, which has some of its rows")
        pairs = [self.pairs[stem] for stem in stems]
        r = pairs[0][1].shape[-1]
        if any(lora_a.shape != pairs[0][0].shape for lora_a, _ in pairs):
            raise RefusedError(self.location, f"{' and '.join(stems)} differ in rank, so one delta cannot have one scale")
        if all(np.array_equal(lora_a, pairs[0][0]) for lora_a, _ in pairs):
            joined = pairs[0][0], np.concatenate([lora_b for _, lora_b in pairs])
        else:
            lora_B = np.zeros((sum(len(lora_b) for _, lora_b in pairs), len(pairs) * r), pairs[0][1].dtype)
            first_row = 0
            for number, (_, lora_b) in enumerate(pairs):
                lora_B[first_row : first_row + len(lora_b), number * r : (number + 1) * r] = lora_b
                first_row += len(lora_b)
            joined = np.concatenate([lora_a for lora_a, _ in pairs]), lora_B
        order = self._order(module)
        if not architecture_lookup.order_fits(order, len(joined[1])):
            raise FormatError(self.location, f"{module}: {len(joined[1])} rows do not match {order} heads")
        # alpha grows with the rank, so that alpha / r stays as it was.
        scale = self._scale(stems[0]) * joined[1].shape[-1] / r
        return LowRank(*architecture_lookup.restore_pair(joined, order, across=False), scale)

    def _qkv_deltas(self, stem: str) -> dict[str, FactorPair]:
        """Return the deltas of q, k and v from a tensor that fuses them, with their rows of `lora_b` and a shared `lora_a`."""
        lora_a, lora_b = self.pairs[stem]
        heads, kv_heads = (self._config().get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or len(lora_b) % (heads + 2 * kv_heads):
            problem = f"{stem}: where q ends and k begins depends on the number of heads"
            raise RefusedError(self.location, problem, "Name its base model", code="base-required")
        size = len(lora_b) // (heads + 2 * kv_heads)
        deltas: dict[str, FactorPair] = {}
        for name, rows in zip("qkv", np.split(lora_b, [heads * size, (heads + kv_heads) * size]), strict=True):
            module = str(self.architecture.module(f"{stem.removesuffix('qkv')}{name}"))
            order = self._order(module)
            deltas[module] = LowRank(
                lora_a, np.ascontiguousarray(architecture_lookup.unpermute_rows(rows, order)), self._scale(stem)
            )
        return deltas

    def _expert_deltas(self, stem: str) -> dict[str, FactorPair]:
        lora_a, lora_b = self.pairs[stem]
        stacked_module, single_module = str(self.architecture.stacked_module(stem)), self.architecture.listed_module(stem, 0)
        if single_module and not (self.base and stacked_module in self.base.tensors):
            return {
                str(self.architecture.listed_module(stem, expert)): LowRank(lora_a[expert], lora_b[expert], self._scale(stem))
                for expert in range(len(lora_a))
                if lora_a[expert].any() or lora_b[expert].any()  # both 0: an expert without a delta
            }
        stems = self.architecture.stems(stacked_module)
        if stem != next(candidate for candidate in stems if candidate in self.pairs):
            return {}  # read with the first
        return {stacked_module: self._joined_parameter(stems)}

    def _joined_parameter(self, stems: Sequence[str]) -> StackedLowRank:
        """Return one parameter of all experts, joined from its parts' tensors.

        It has the rows of all parts, and the sum of their ranks unless they share `lora_a`.
        """
        present = {stem: self.pairs[stem] for stem in stems if stem in self.pairs}
        first = next(iter(present))
        lora_a, lora_b = present[first]
        shared = all(np.array_equal(pair[0], lora_a) for pair in present.values())
        if len({(pair[0].shape, pair[1].shape) for pair in present.values()}) > 1:
            problem = f"{' and '.join(present)} differ in rank or shape, so one delta of both cannot have one scale"
            raise RefusedError(self.location, problem)
        n_experts, count, r = lora_b.shape
        blocks = 1 if shared else len(present)
        interleaved = bool(self.architecture.experts and self.architecture.experts.interleaved)
        lora_B = np.zeros((n_experts, len(stems) * count, blocks * r), lora_b.dtype)
        for block, stem in enumerate(present):
            number = stems.index(stem)
            start, step = (number, len(stems)) if interleaved else (number * count, 1)
            columns = slice(0, r) if shared else slice(block * r, (block + 1) * r)
            lora_B[:, start::step][:, :count, columns] = present[stem][1]
        lora_A = lora_a if shared else np.concatenate([pair[0] for pair in present.values()], axis=1)
        transposed = bool(self.architecture.experts and self.architecture.experts.transposed)
        # alpha grows with the rank, so that alpha / r stays as it was.
        return StackedLowRank(lora_A, lora_B, self._scale(first) * blocks, transposed_base=transposed)
