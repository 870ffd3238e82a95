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
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from . import dtypes, gguf_checks, gguf_file, names, rider, scales
from .adapter import Adapter, Kept, Loss, LossReport, LowRank, LowRankEmbedding, Meta, Pair, plain_pairs
from .base import BaseSpec
from .errors import FormatError, RefusedError
from .gguf_file import GGUFFile, Value
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


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path` for the base's architecture; RefusedError names whatever llama.cpp would get wrong."""
    if base is None:
        raise RefusedError("gguf", "a GGUF adapter depends on the base's architecture and heads", "Pass --base")
    architecture = names.by_class(base.architecture, base.where)
    problems = gguf_checks.problems(adapter, base, architecture)
    if problems:
        raise RefusedError("gguf", problems[0] + (f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""))
    plan = _plan(adapter)
    tensors: dict[str, np.ndarray] = {}
    kept: list[Kept] = []
    lines: list[rider.Line] = []
    ulps: list[np.ndarray] = []
    for target, delta in sorted(plain_pairs(adapter).items(), key=lambda item: _file_order(item[0])):
        heads = architecture.heads(target, base.config, base.where)
        stem = str(architecture.stem(target))
        folded = scales.folded(f"{target}.lora_B", delta.lora_B, plan.factors[target])
        tensors[f"{stem}.weight.lora_a"] = delta.lora_A.T if isinstance(delta, LowRankEmbedding) else delta.lora_A
        tensors[f"{stem}.weight.lora_b"] = names.permuted(folded.lora_B, heads)
        kept += [Kept(f"{target}.lora_A", Loss.EXACT), folded.kept]
        ulps += [] if folded.ulps is None else [folded.ulps]
        lines.append(
            rider.Line(stem, target, plan.factors[target], dtypes.name_of(delta.lora_B.dtype), heads, folded.ulps is not None)
        )
    metadata = _metadata(adapter, base, architecture, plan.common)
    digest = _payload_digest(architecture.gguf, plan.common, tensors)
    gguf_file.write(
        path,
        metadata | {key: gguf_file.string(text) for key, text in rider.keys(adapter, lines, digest, ulps).items()},
        tensors,
    )
    return LossReport(tuple(kept), (*adapter.notes, *plan.notes))


def _file_order(target: str) -> tuple[int, str]:
    layer = names.layer_of(target)
    return (-1 if layer is None else layer, target)


def _plan(adapter: Adapter) -> scales.Plan:
    needed = {target: delta.scaling * delta.r for target, delta in adapter.deltas.items()}
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
    architecture = names.by_gguf(header.text("general.architecture"), where)
    lines = rider.lines_of(header.metadata, where)
    if {f"{line.stem}.weight.lora_{half}" for line in lines for half in "ab"} != set(tensors):
        raise FormatError(where, "the source's list of tensors is not that of the file")

    def pair(line: rider.Line) -> tuple[np.ndarray, np.ndarray]:
        if architecture.stem(line.target) != line.stem:
            raise FormatError(where, f"{line.stem!r} is not what llama.cpp calls {line.target!r}")
        lora_a, lora_b = (tensors[f"{line.stem}.weight.lora_{half}"] for half in "ab")
        reordered = architecture.heads(line.target, {"num_attention_heads": 1}, where) > 0
        if lora_b.ndim != 2 or reordered != (line.heads > 0) or (reordered and lora_b.shape[0] % (2 * line.heads)):
            raise FormatError(where, f"{line.stem}: lora_b {lora_b.shape} does not have {line.heads} heads")
        lora_A = np.ascontiguousarray(lora_a.T) if line.stem == "token_embd" else lora_a
        return lora_A, names.unpermuted(lora_b, line.heads)

    return rider.restored(header.metadata, lines, pair, lambda r: alpha / r if alpha else 1.0, where)


def _foreign(
    header: gguf_file.GGUFHeader, alpha: float, tensors: Mapping[str, np.ndarray], base: BaseSpec | None, where: str
) -> Adapter:
    architecture = names.by_gguf(header.text("general.architecture"), where)
    if base is not None and names.by_class(base.architecture, base.where) is not architecture:
        raise RefusedError(where, f"made for {architecture.gguf}, the base is a {base.architecture} ({base.where})")
    deltas: dict[str, Pair] = {}
    for stem, (lora_a, lora_b) in _pairs(tensors, where).items():
        target = architecture.module(stem)
        if target is None:
            raise RefusedError(where, f"tensor {stem!r} has no verified name in Hugging Face's {architecture.gguf} models")
        heads = architecture.heads(target, base.config if base else {}, where)
        if heads and lora_b.shape[0] % (2 * heads):
            raise FormatError(where, f"{stem}: {lora_b.shape[0]} rows are not those of {heads} heads")
        delta = _delta(f"{where}: {stem}", lora_a, names.unpermuted(lora_b, heads), alpha, embedding=stem == "token_embd")
        if base is not None:
            for problem in gguf_checks.against_base(target, delta, base):
                raise RefusedError(where, f"{target}: {problem}")
        deltas[target] = delta
    return Adapter(deltas, meta=Meta(base_model=_base_model(header)), notes=tuple(_notes(header)))


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
        if array.ndim != 2 or 0 in array.shape:
            raise RefusedError(where, f"tensor {name!r} of shape {array.shape} (experts?) is not read yet")
        halves.setdefault(stem, {})[half] = array
    for stem, pair in halves.items():
        if len(pair) < 2:
            raise FormatError(where, f"{stem!r} has {next(iter(pair))} alone, its other half is missing")
    return {stem: (pair["lora_a"], pair["lora_b"]) for stem, pair in halves.items()}


def _delta(where: str, lora_a: np.ndarray, lora_b: np.ndarray, alpha: float, *, embedding: bool) -> Pair:
    lora_A = np.ascontiguousarray(lora_a.T) if embedding else lora_a
    r = lora_b.shape[1]
    if lora_A.shape[0] != r:
        raise FormatError(where, f"lora_a {lora_a.shape} and lora_b {lora_b.shape} do not share a rank")
    scale = alpha or float(r)  # an alpha of 0 or none: llama.cpp scales by 1
    return LowRankEmbedding(lora_A, lora_b, scale) if embedding else LowRank(lora_A, lora_b, scale)


def _base_model(header: gguf_file.GGUFHeader) -> str | None:
    url = header.text("general.base_model.0.repo_url")
    return url.removeprefix(_HUB) if url.startswith(_HUB) else header.text("general.base_model.0.name") or None
