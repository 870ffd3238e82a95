"""GGUF LoRA adapters, as llama.cpp loads them.

llama.cpp keeps one alpha per file and multiplies `lora_b @ lora_a` by alpha / r, r being that tensor's own rank; an
alpha of 0 or none means 1 (`src/llama-adapter.h`, `get_scale`). PEFT has an alpha per module and rsLoRA, so the file
gets the alpha that most modules need and the others have the difference multiplied into `lora_b`. What llama.cpp would
ignore, abort on or scale wrongly is refused by name.

The source's config, which GGUF cannot say, rides along under `adapterhub.*` keys with the digest of the tensors and
alpha it belongs to. As long as they are unchanged, reading gives back the source's own bytes and needs no base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from . import dtypes, gguf_checks, gguf_dtypes, gguf_file, gguf_foreign, gguf_layout, names, rider, scales
from .adapter import Adapter, FactorPair, Kept, Loss, LossReport, Meta, factor_pairs
from .base import BaseSpec
from .errors import FormatError, RefusedError, refused
from .gguf_file import GGUFFile, Value
from .gguf_layout import Layout, Size
from .names import Architecture

NEVER = 1e-38
"""An alpha that does nothing: llama.cpp reads 0 as a scale of 1, and this vanishes in any sum of float32."""
_FLOATS = ("F32", "F16", "BF16")


def sniff(path: Path) -> bool:
    """Whether `path` is a GGUF file that calls itself an adapter; a malformed GGUF counts, for reading says why."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            if file.read(4) != gguf_file.MAGIC:
                return False
    except OSError:
        return False
    try:
        with GGUFFile(path) as opened:
            return opened.header.text("general.type") == "adapter"
    except FormatError:
        return True


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None, dtype: str = "source") -> LossReport:
    """Write the file `path` for the base's architecture; RefusedError names whatever llama.cpp would get wrong.

    `dtype` is one of `gguf_dtypes.CHOICES`: what all tensors are stored as, by default as they are.
    """
    if base is None:
        raise RefusedError("gguf", "a GGUF adapter depends on the base's architecture and heads", "Pass --base")
    architecture = names.by_class(base.architecture, base.where)
    problems = gguf_checks.problems(adapter, base, architecture)
    if problems:
        raise refused("gguf", problems)
    sizes = {
        target: gguf_layout.size_of(delta)
        for target, delta in sorted(factor_pairs(adapter).items(), key=lambda item: _file_order(item[0]))
    }
    n_experts, rows = gguf_checks.experts_of(base, architecture), gguf_checks.rows_of(base, architecture)
    layout = gguf_layout.arranged(architecture, sizes, n_experts, rows, base.where)
    plan = _plan(adapter, layout)
    orders = {target: architecture.order(target, base.config, base.where) for target in sizes}
    writing = _Writing(adapter, layout, plan, orders=orders, dtype=dtype)
    metadata = _metadata(adapter, base, architecture, plan.common)
    digest = _payload_digest(architecture.gguf, plan.common, writing.seen)
    notes = [*adapter.notes, *plan.notes]
    try:
        riding = rider.keys(adapter, writing.lines, digest, writing.ulps)
    except RefusedError as error:
        riding = {}
        notes.append(f"no config rides along for the way back: {error}")
    gguf_file.write(path, metadata | {key: gguf_file.string(text) for key, text in riding.items()}, writing.tensors)
    return LossReport(tuple(writing.kept), tuple(notes))


class _Writing:
    """The tensors of a file, what becomes of each of the source's, and how to undo it."""

    def __init__(
        self,
        adapter: Adapter,
        layout: Layout,
        plan: scales.Plan,
        *,
        orders: Mapping[str, names.Order],
        dtype: str,
    ) -> None:
        self.tensors: dict[str, np.ndarray | gguf_file.Packed] = {}
        self.seen: dict[str, np.ndarray] = {}
        self.kept: list[Kept] = []
        self.lines: list[rider.Line] = []
        self.ulps: list[np.ndarray] = []
        self._stored: dict[str, gguf_dtypes.Stored] = {}
        self._layout, self._plan = layout, plan
        deltas = factor_pairs(adapter)
        folded = {
            target: scales.folded(f"{target}.lora_B", deltas[target].lora_B, plan.factors[target]) for target in layout.parts
        }
        arrays = {
            target: (deltas[target].lora_A, names.permuted(fold.lora_B, orders[target])) for target, fold in folded.items()
        }
        for target, parts in layout.parts.items():
            for part in parts:
                if f"{part.stem}.weight.lora_a" not in self.tensors:
                    self._store(part.stem, gguf_layout.assembled(layout, part.stem, arrays), dtype)
            self._line(target, deltas[target], folded[target], orders[target])

    def _store(self, stem: str, pair: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
        for half, array in zip("ab", pair, strict=True):
            name = f"{stem}.weight.lora_{half}"
            turned = np.ascontiguousarray(array.T) if name == "token_embd.weight.lora_a" else array
            stored = gguf_dtypes.stored(name, turned, dtype)
            self.tensors[name], self.seen[name], self._stored[name] = stored.data, stored.seen, stored

    def _line(self, target: str, delta: FactorPair, folded: scales.Folded, order: names.Order) -> None:
        layout, stem = self._layout, self._layout.parts[target][0].stem
        halves = [self._worst(target, half) for half in "ab"]
        a_type, b_type = (dtypes.name_of(array.dtype) for array in (delta.lora_A, delta.lora_B))
        ulps = folded.ulps
        if halves[0].error:
            a_type = dtypes.name_of(halves[0].seen.dtype)
        if halves[1].error:
            b_type = dtypes.name_of(halves[1].seen.dtype) if self._plan.factors[target] == 1.0 else "F32"
            ulps = None
        size = gguf_layout.size_of(delta)
        block = None
        if not layout.is_whole(target) or a_type != dtypes.name_of(halves[0].seen.dtype):
            block = rider.Block(size.r, size.rows, size.experts, a_type, layout.rank_of(target))
        factor = self._plan.factors[target]
        self.lines.append(rider.Line(stem, target, factor, b_type, order, ulps is not None, block))
        self.ulps += [] if ulps is None else [ulps]
        self.kept += [_kept(Kept(f"{target}.lora_A", Loss.EXACT), halves[0]), _kept(folded.kept, halves[1])]

    def _worst(self, target: str, half: str) -> gguf_dtypes.Stored:
        stored = [self._stored[f"{part.stem}.weight.lora_{half}"] for part in self._layout.parts[target]]
        return max(stored, key=lambda one: one.error)


def _kept(kept: Kept, stored: gguf_dtypes.Stored) -> Kept:
    note = "; ".join(filter(None, (kept.note, stored.note)))
    return Kept(kept.name, Loss.ROUNDED if stored.error else kept.loss, note)


def _file_order(target: str) -> tuple[int, str]:
    layer = names.layer_of(target)
    return (-1 if layer is None else layer, target)


def _plan(adapter: Adapter, layout: Layout) -> scales.Plan:
    deltas = factor_pairs(adapter)
    needed = {target: deltas[target].scaling * layout.rank_of(target) for target in layout.parts}
    nothing = scales.Plan(NEVER, dict.fromkeys(needed, 1.0), ("alpha is 0: the file says 1e-38, which has no effect",))
    return scales.plan(needed, np.dtype(np.float32), "alpha") or nothing


def _metadata(adapter: Adapter, base: BaseSpec, architecture: Architecture, alpha: float) -> dict[str, Value]:
    metadata = {
        "general.architecture": gguf_file.string(architecture.gguf),
        "general.type": gguf_file.string("adapter"),
        "adapter.type": gguf_file.string("lora"),
        "adapter.lora.alpha": gguf_file.f32(alpha),
    }
    name = adapter.meta.base_model or base.repo
    if name:
        metadata["general.base_model.count"] = gguf_file.u32(1)
        metadata["general.base_model.0.name"] = gguf_file.string(name)
        if _is_repo(name):
            metadata["general.base_model.0.repo_url"] = gguf_file.string(_HUB + name)
    if base.fingerprint:
        metadata["adapterhub.base.fingerprint"] = gguf_file.string(base.fingerprint)
    return metadata


_HUB = "https://huggingface.co/"


def _is_repo(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(part for part in name.split("/"))


def read(path: Path, *, base: BaseSpec | None = None) -> Adapter:
    """The adapter in a GGUF file: the source's own where its config rode along, else under the base's names.

    Without a rider an architecture that permutes q and k needs `base` for its number of heads.
    """
    with GGUFFile(path) as file:
        header = file.header
        _check_kind(header, str(path))
        alpha = _alpha(header, str(path))
        tensors = {name: file.tensor(name) for name in file.tensors}
    digest = _payload_digest(header.text("general.architecture"), alpha, tensors)
    if rider.belongs(header.metadata, digest):
        return _ridden(header, alpha, tensors, str(path))
    return _foreign(header, alpha, tensors, base, str(path))


def _check_kind(header: gguf_file.GGUFHeader, where: str) -> None:
    for key, value in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = header.text(key)
        if found != value:
            raise FormatError(where, f"not a LoRA adapter: {key} is {found[:40]!r}, not {value!r}")
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise RefusedError(where, "aLoRA, which acts only after its invocation tokens, is not read yet")


def _alpha(header: gguf_file.GGUFHeader, where: str) -> float:
    """The file's alpha; 0 when it has none, as llama.cpp takes it."""
    kind = header.kinds.get("adapter.lora.alpha", "FLOAT32")
    if kind != "FLOAT32":
        raise FormatError(where, f"adapter.lora.alpha is a {kind}; llama.cpp aborts on all but FLOAT32")
    alpha = float(header.metadata.get("adapter.lora.alpha", 0.0))
    if not math.isfinite(alpha):
        raise FormatError(where, f"adapter.lora.alpha is {alpha}")
    return alpha


def _payload_digest(architecture: str, alpha: float, tensors: Mapping[str, np.ndarray]) -> str:
    """Digest of all that decides what llama.cpp computes."""
    return rider.payload_digest(tensors, architecture, np.float32(alpha).tobytes().hex())


def _ridden(header: gguf_file.GGUFHeader, alpha: float, tensors: Mapping[str, np.ndarray], where: str) -> Adapter:
    architecture = _architecture(header, where)
    lines = rider.lines_of(header.metadata, where)
    pairs = _pairs(tensors, where)
    for line in lines:
        if line.stem not in pairs:
            raise FormatError(where, "the source's list of tensors is not that of the file")
        if not architecture.stems(line.target):
            raise FormatError(where, f"{line.stem!r} is not what llama.cpp calls {line.target!r}")
    taken = _all_taken(architecture, lines, pairs, where)

    def pair(line: rider.Line) -> tuple[np.ndarray, np.ndarray]:
        lora_A, lora_B = taken[line.target]
        kind = tuple if architecture.grouped else int
        if architecture.is_reordered(line.target) != bool(line.order) or not isinstance(line.order or kind(), kind):
            raise FormatError(where, f"{line.target}: the source's config gives its rows the order {line.order}")
        if not names.divides(line.order, lora_B.shape[-2]):
            raise FormatError(where, f"{line.stem}: lora_b {lora_B.shape} does not have {line.order} heads")
        return lora_A, names.unpermuted(lora_B, line.order)

    return rider.restored(header.metadata, lines, pair, lambda r: alpha / r if alpha else 1.0, where)


def _all_taken(
    architecture: Architecture, lines: Sequence[rider.Line], pairs: gguf_layout.Arrays, where: str
) -> gguf_layout.Arrays:
    """The factors of each line, in llama.cpp's order; FormatError when the file is not laid out as its lines say."""
    sizes = {line.target: _size(line, *pairs[line.stem]) for line in lines}
    n_experts = max((pair[0].shape[0] for pair in pairs.values() if pair[0].ndim == 3), default=0)
    rows = {stem: lora_b.shape[-2] for stem, (_, lora_b) in pairs.items()}
    layout = gguf_layout.arranged(architecture, sizes, n_experts, rows, where)
    if set(layout.members) != set(pairs) or any(line.stem != layout.parts[line.target][0].stem for line in lines):
        raise FormatError(where, "the source's list of tensors is not that of the file")
    for stem, (lora_a, lora_b) in pairs.items():
        stack = (layout.experts[stem],) if layout.experts[stem] else ()
        r, found = layout.rank[stem], layout.rows[stem]
        if lora_a.shape[:-1] != (*stack, r) or lora_b.shape != (*stack, found, r):
            raise FormatError(where, f"{stem}: {lora_a.shape} and {lora_b.shape} do not hold what the source's config says")
    taken = {line.target: _taken(layout, line, sizes[line.target], pairs, where) for line in lines}
    for stem in layout.members:
        again = gguf_layout.assembled(layout, stem, taken)
        if any(not _same(one, other) for one, other in zip(again, pairs[stem], strict=True)):
            raise FormatError(where, f"{stem} holds more than the source's config says")
    return taken


def _size(line: rider.Line, lora_a: np.ndarray, lora_b: np.ndarray) -> Size:
    if line.block:
        return Size(line.block.r, line.block.rows, line.block.experts)
    return Size(lora_b.shape[-1], lora_b.shape[-2], lora_a.shape[0] if lora_a.ndim == 3 else 0)


def _taken(
    layout: Layout, line: rider.Line, size: Size, pairs: gguf_layout.Arrays, where: str
) -> tuple[np.ndarray, np.ndarray]:
    lora_A, lora_B = gguf_layout.taken_apart(layout, line.target, size, pairs)
    if line.block is None or line.block.rank != layout.rank_of(line.target):
        if line.block:
            raise FormatError(where, f"{line.target}: its rank in the file is {layout.rank_of(line.target)}")
        return lora_A, lora_B
    with np.errstate(over="ignore"):
        return lora_A.astype(dtypes.NUMPY[line.block.dtype_A], copy=False), lora_B


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or one.astype(other.dtype, copy=False).tobytes() == np.ascontiguousarray(other).tobytes()


def _architecture(header: gguf_file.GGUFHeader, where: str) -> Architecture:
    experts = any("_exps." in name or "ffn_gate_inp." in name for name in header.tensors)
    return names.by_gguf(header.text("general.architecture"), where, experts=experts)


def _foreign(
    header: gguf_file.GGUFHeader, alpha: float, tensors: Mapping[str, np.ndarray], base: BaseSpec | None, where: str
) -> Adapter:
    architecture = _architecture(header, where)
    if base is not None:
        of_base = names.by_class(base.architecture, base.where)
        if of_base.gguf != architecture.gguf:
            raise RefusedError(where, f"made for {architecture.gguf}, the base is a {base.architecture} ({base.where})")
        architecture = of_base
    deltas = gguf_foreign.deltas(_pairs(tensors, where), alpha, architecture, base, where)
    for target, delta in deltas.items():
        for problem in gguf_checks.against_base(target, delta, base, architecture) if base else ():
            raise RefusedError(where, f"{target}: {problem}")
    return Adapter(dict(deltas), meta=Meta(base_model=_base_model(header)), notes=tuple(_notes(header)))


def _notes(header: gguf_file.GGUFHeader) -> Iterator[str]:
    if rider.there(header.metadata):
        yield rider.IGNORED
    quantised = sorted({info.type_name for info in header.tensors.values()} - set(_FLOATS))
    if quantised:
        yield f"stored as {', '.join(quantised)}: the factors are what that stands for, in float32"


def _pairs(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        full, _, half = name.rpartition(".")
        stem = full.removesuffix(".weight")
        if half not in ("lora_a", "lora_b") or stem == full:
            raise RefusedError(where, f"tensor {name!r} is no half of a low-rank pair; llama.cpp ignores or refuses it")
        if array.dtype.kind in "iu":
            raise FormatError(where, f"tensor {name!r} holds integers, no factor does")
        if array.ndim != (3 if stem.endswith("_exps") else 2) or 0 in array.shape:
            raise RefusedError(where, f"tensor {name!r} of shape {array.shape} is none that llama.cpp multiplies")
        halves.setdefault(stem, {})[half] = array
    for stem, pair in halves.items():
        if len(pair) < 2:
            raise FormatError(where, f"{stem!r} has {next(iter(pair))} alone, its other half is missing")
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for stem, pair in halves.items():
        lora_a, lora_b = pair["lora_a"], pair["lora_b"]
        if stem == "token_embd":
            lora_a = np.ascontiguousarray(lora_a.T)
        if lora_a.shape[:-2] != lora_b.shape[:-2] or lora_a.shape[-2] != lora_b.shape[-1]:
            raise FormatError(where, f"{stem}: lora_a {lora_a.shape} and lora_b {lora_b.shape} do not share a rank")
        pairs[stem] = lora_a, lora_b
    return pairs


def _base_model(header: gguf_file.GGUFHeader) -> str | None:
    url = header.text("general.base_model.0.repo_url")
    return url.removeprefix(_HUB) if url.startswith(_HUB) else header.text("general.base_model.0.name") or None
