"""kohya's sd-scripts, LyCORIS, musubi-tuner and ComfyUI: one safetensors file, an alpha beside every pair of factors.

`lora_unet_…_to_q.lora_down.weight` is `lora_A`, `.lora_up.weight` `lora_B`, `.alpha` a number whose 0 means the rank
(sd-scripts, `networks/lora.py`). The names have lost their dots: the base's own modules, or the closed tables of
`tables`, give them back, and where two readings fit there is none. ComfyUI's and XLabs' names have theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import (
    Adapter,
    CpConv,
    Delta,
    Factored,
    Hadamard,
    Kept,
    Kronecker,
    Loss,
    LossReport,
    LowRank,
    LowRankConv,
)
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, RefusedError, refused

from . import factors, naming, pipeline, tables
from .table import Reading


def sniff(path: Path) -> bool:
    """Whether `path` is a safetensors file with kohya's, LyCORIS' or ComfyUI's names of tensors."""
    if not path.is_file():
        return False
    try:
        with SafetensorsFile(path) as file:
            return any(_is_ours(name) for name in file.tensors)
    except FormatError:
        return False


def _is_ours(name: str) -> bool:
    return naming.is_ours(name) and (factors.split_name(name) is not None or name.startswith(naming.TRAINERS))


def read(path: Path, *, base: BaseSpec | None = None) -> Adapter:
    """The adapter in a file. Targets begin with the model of the pipeline, unless `base` is one model alone."""
    with SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    where = str(path)
    grouped, notes = _grouped(tensors, where)
    outlines = {stem: factors.outline(part) for stem, part in grouped.items()}
    found, names = naming.targets(outlines, metadata, base, where)
    deltas, failed = _deltas(grouped, found, base, where)
    if failed:
        raise refused(where, failed)
    meta = dataclasses.replace(Adapter({}).meta, parts=_parts(deltas), header=pipeline.carried_header(metadata, names))
    adapter = pipeline.with_source(Adapter(deltas, meta=meta, notes=tuple(notes)), metadata, tensors, where)
    return pipeline.fitted(adapter, base, where)


def _parts(targets: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({pipeline.part_of(target) for target in targets}))


def _grouped(tensors: Mapping[str, np.ndarray], where: str) -> tuple[dict[str, factors.Parts], list[str]]:
    """The tensors of each module by what they are; differences of zero, which add nothing, are left out and said."""
    grouped: dict[str, factors.Parts] = {}
    unknown, zeros = [], 0
    for name, array in tensors.items():
        found = factors.split_name(name)
        if found is None:
            unknown.append(f"tensor {name!r}: is of no kind that is read yet")
        elif found[1] in ("diff", "diff_b") and not np.any(array):
            zeros += 1
        elif found[1] in grouped.setdefault(found[0], {}):
            raise FormatError(where, f"tensor {name!r} is there under two names")
        else:
            grouped[found[0]][found[1]] = array
    if unknown:
        raise refused(where, unknown)
    notes = [f"{zeros} differences are zeros and add nothing"] if zeros else []
    if none := sum("alpha" in part and not np.any(part["alpha"]) for part in grouped.values()):
        notes.append(f"{none} alphas are 0 and read as the rank, as sd-scripts reads them; to ComfyUI they are 0")
    if silent := sum("alpha" not in part and "A" in part for part in grouped.values()):
        notes.append(f"{silent} modules say no alpha: it is the rank, as sd-scripts and ComfyUI take it")
    return grouped, notes


def _deltas(
    grouped: Mapping[str, factors.Parts], found: Mapping[str, Reading], base: BaseSpec | None, where: str
) -> tuple[dict[str, Delta], list[str]]:
    deltas: dict[str, Delta] = {}
    failed: list[str] = []
    for stem, part in grouped.items():
        reading = found[stem]
        target = reading.targets[0]
        shape = pipeline.weight_shape(base, target)
        kernel = shape[2:] if shape else tables.kernel(target)
        try:
            delta = _as_base(factors.delta_of(target if len(reading.targets) == 1 else stem, part, kernel, where), shape)
            own = factors.apart(stem, delta, reading, where)
        except RefusedError as error:
            failed.append(error.what)
            continue
        if both := sorted(set(own) & set(deltas)):
            raise FormatError(where, f"{both[0]} is there under two names, {stem!r} is one of them")
        deltas |= own
    return deltas, failed


def _as_base(delta: Delta, shape: tuple[int, ...] | None) -> Delta:
    """A pair that was saved as a 1 by 1 convolution, of a module that is none."""
    if not isinstance(delta, LowRankConv) or shape is None or len(shape) != 2 or any(size != 1 for size in delta.shape[2:]):
        return delta
    magnitude = None if delta.magnitude is None else delta.magnitude.reshape(-1)
    lora_A, lora_B = delta.lora_A.reshape(delta.r, -1), delta.lora_B.reshape(-1, delta.r)
    return LowRank(lora_A, lora_B, delta.alpha, magnitude=magnitude, bias=delta.bias)


# ---- the way there


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`; RefusedError names what kohya's words do not say."""
    if problems := list(pipeline.problems(adapter, "kohya's", _problem)):
        raise refused("kohya", problems)
    plain, kept = _plain(adapter)
    named = pipeline.named(plain, base, "kohya")
    names = dict(zip(named.deltas, adapter.deltas, strict=True))
    groups, table = naming.groups(named, base)
    outlines: dict[str, tuple[int, int] | None] = {}
    tensors: dict[str, np.ndarray] = {}
    for stem, (members, reading) in sorted(groups.items()):
        delta = factors.together(stem, members, reading)
        found, alpha = factors.tensors_of(delta)
        outlines[stem] = (delta.shape[0], delta.shape[1])
        tensors |= {f"{stem}.{name}": np.ascontiguousarray(array) for name, array in found.items()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = factors.alpha_tensor(alpha, next(iter(found.values())).dtype)
        alone = len(members) == 1 and len(reading.targets) == 1
        for target, member in members.items():
            kept += _kept(names[target], member, None if alone else stem, _is_rounded(alpha, tensors, stem))
    ride = {} if kept_rounded(kept) else pipeline.source_keys(adapter, names, tensors)
    if ride:  # all that was rewritten comes back to the bit
        kept = [dataclasses.replace(line, loss=Loss.EXACT, note="") for line in kept]
    header, notes = _header(adapter, tensors, path)
    header |= naming.header(outlines, header, table)
    safetensors_file.write(path, tensors, header | ride)
    return LossReport(tuple(sorted(kept, key=lambda line: line.name)), (*plain.notes, *notes))


def kept_rounded(kept: Iterable[Kept]) -> bool:
    """Whether a tensor's own numbers were rounded, so that nothing brings them back; an alpha comes back with the config."""
    return any(line.loss >= Loss.ROUNDED and line.note != _ALPHA for line in kept)


_ALPHA = "its alpha is rounded to float32"


def _problem(delta: Delta) -> str:
    kind = type(delta).__name__
    if not isinstance(delta, LowRank | LowRankConv | Factored):
        return f"a delta of the kind {kind} cannot be said in kohya's words"
    if isinstance(delta, Factored) and not _is_native(delta) and not delta.is_low_rank:
        return f"a delta of the kind {kind}, and no low-rank pair, cannot be said in kohya's words"
    return ""


def _is_native(delta: Delta) -> bool:
    """Whether kohya's words, or LyCORIS', say it as it is; with both factors of LoKr whole they say no scale."""
    whole = isinstance(delta, Kronecker) and {"lokr_w1", "lokr_w2"} <= set(delta.tensors)
    return isinstance(delta, LowRank | LowRankConv | Hadamard | Kronecker | CpConv) and not (whole and delta.scaling != 1)


def _plain(adapter: Adapter) -> tuple[Adapter, list[Kept]]:
    """The adapter with what kohya's words lack as the pairs they equal."""
    changed: dict[str, Delta] = {
        t: d.as_low_rank() for t, d in adapter.deltas.items() if isinstance(d, Factored) and not _is_native(d)
    }
    if not changed:
        return adapter, []
    note = "factors are products, rounded once in float32"
    kept = [Kept(f"{target}.{part}", Loss.ROUNDED, note) for target in changed for part, _ in adapter.deltas[target].parts()]
    return dataclasses.replace(adapter, deltas={**adapter.deltas, **changed}), kept


def _kept(own: str, delta: Delta, stem: str | None, rounded: bool) -> list[Kept]:
    found = []
    for name, _ in delta.parts():
        label = f"{own}.{'lora_B.bias' if name == 'bias' else name}"
        if name == "bias" and delta.scaling != 1:
            found.append(Kept(label, Loss.ROUNDED, "times the scale in float32", 2.0**-24))
        elif name == "lora_B" and rounded:
            found.append(Kept(label, Loss.ROUNDED, _ALPHA, 2.0**-24))
        else:
            found.append(Kept(label, Loss.REWRITTEN, f"in {stem}") if stem else Kept(label, Loss.EXACT))
    return found


def _is_rounded(alpha: float | None, tensors: Mapping[str, np.ndarray], stem: str) -> bool:
    return alpha is not None and abs(alpha) > factors.TINY and float(tensors[f"{stem}.alpha"]) != alpha


def _header(adapter: Adapter, tensors: Mapping[str, np.ndarray], path: Path) -> tuple[dict[str, str], list[str]]:
    """The source's own header, without hashes of another payload."""
    header = pipeline.header_again(adapter, str(path))
    hashes = [key for key in header if key.startswith("sshs_")]
    if not hashes or header.get("sshs_model_hash") == _payload_hash(tensors):
        return header, []
    kept = {key: text for key, text in header.items() if key not in hashes}
    return kept, [f"{' and '.join(hashes)} in the header are of other bytes, and left out"]


def _payload_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """What sd-scripts calls the hash of a model: of all bytes after the header (`addnet_hash_safetensors`)."""
    digest = hashlib.sha256()
    for name, _, _ in safetensors_file.layout((n, dtypes.name_of(a.dtype), a.shape) for n, a in tensors.items()):
        digest.update(safetensors_file.byte_view(np.ascontiguousarray(tensors[name])))
    return digest.hexdigest()
