"""Files of kohya's sd-scripts, LyCORIS, musubi-tuner and ComfyUI: one safetensors file with an alpha for each pair of factors.

`lora_unet_…_to_q.lora_down.weight` is `lora_A`, `.lora_up.weight` is `lora_B`, and `.alpha` is a number, where 0
means the rank (sd-scripts, `networks/lora.py`). The names have lost their dots, which are recovered by the base's own modules
or by the closed tables of `family_tables` (`naming`, which has the prefixes); names with two readings are refused. ComfyUI's
and XLabs' names have their dots.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from adapterhub_converters import dtypes, safe_regex
from adapterhub_converters.adapter import (
    BUNDLED,
    Adapter,
    CpConv,
    Delta,
    Factored,
    Hadamard,
    Kronecker,
    Loss,
    LossReport,
    LowRank,
    LowRankConv,
    Meta,
    TensorLoss,
    as_pairs,
)
from adapterhub_converters.containers import safetensors_file, safetensors_header
from adapterhub_converters.errors import FormatError, NotUnderstoodError, RefusedError, refused_error
from adapterhub_converters.formats import peft, pipeline
from adapterhub_converters.formats.candidate import Candidate

from . import factors, family_tables, joined_modules, naming, origin, preserved_header
from .name_table import Reading

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_T = TypeVar("_T")
# For the checks of every adapter, which reach this module through the table of formats.
split_name = factors.split_name
is_image_module = naming.is_image_module


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with tensor names of kohya, LyCORIS or ComfyUI."""
    beside_config = candidate.path.name == peft.WEIGHTS and (candidate.path.parent / peft.CONFIG).is_file()
    return not beside_config and any(map(_is_kohya_name, candidate.tensors))


def describe_header(meta: Meta, metadata: Mapping[str, str]) -> Meta:
    """Return `meta` with what the header of a file alone says of its base, its family and its program."""
    return origin.describe(meta, metadata, "", ())


def _is_kohya_name(name: str) -> bool:
    if not naming.may_be_trainer_name(name):  # quick, for the many tensors of a language model's adapter
        return False
    stem_and_part = factors.split_name(name)
    return name.startswith(naming.TRAINERS) if stem_and_part is None else naming.is_trainer_name(stem_and_part[0])


def read(path: Path | Candidate, *, base: BaseSpec | None = None) -> Adapter:
    """Return the adapter in a file. Targets begin with the model of the pipeline, unless `base` is a single model."""
    candidate = Candidate.of(path)
    with candidate.open_safetensors() as file:
        stored = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    location = str(candidate.path)
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(BUNDLED)}
    parts_by_stem, notes = _group_tensors(tensors, location)
    if whole_count := _count_without_root(parts_by_stem, metadata):
        notes.append(
            f"{whole_count} LoKr modules have whole matrices: as in LyCORIS, they are read without the factor of rs_lora"
        )
    outlines = {stem: factors.weight_outline(part) for stem, part in parts_by_stem.items()}
    readings, names = naming.targets(outlines, metadata, base, location)
    _refuse_interleaved(tensors, names, location)
    reader = _Reader(base, location)
    for stem, part in parts_by_stem.items():
        reader.add(stem, part, readings[stem])
    deltas = reader.deltas()
    parts = tuple(sorted({pipeline.part_of(name) for name in (*deltas, *reader.added, *reader.replaced)}))
    meta = dataclasses.replace(Adapter({}).meta, parts=parts, header=preserved_header.carried_header(metadata, names))
    file_adapter = Adapter(deltas, reader.replaced, meta=meta, notes=tuple(notes), added=reader.added)
    adapter = preserved_header.with_source(file_adapter, metadata, tensors, location)
    described = origin.describe(adapter.meta, metadata, names, (*deltas, *map(naming.module_of, reader.added)))
    fitted = naming.fit_to_base(dataclasses.replace(adapter, meta=described), base, location)
    return factors.with_bundled(fitted, stored)


def _refuse_interleaved(tensors: Iterable[str], names: str, location: str) -> None:
    """Refuse MiniMax-H3's fused queries, keys and values as DiffSynth-Studio trains them: head by head."""
    interleaved = (
        [name for name in tensors if ".default." in name and "qkv_proj" in name] if names.startswith("MiniMax") else []
    )
    if interleaved:
        problem = "the rows of queries, keys and values are interleaved by heads, which is not supported"
        raise refused_error(location, [f"tensor {name!r}: {problem}" for name in interleaved])


def _group_tensors(tensors: Mapping[str, np.ndarray], location: str) -> tuple[dict[str, factors.Parts], list[str]]:
    """Return the tensors of each module by part, without differences of zero, and notes."""
    parts_by_stem: dict[str, factors.Parts] = {}
    unknown, zeros = [], 0
    for name, array in tensors.items():
        stem_and_part = factors.split_name(name)
        if stem_and_part is None:
            unknown.append(factors.unknown_reason(name))
        elif stem_and_part[1] in ("diff", "diff_b") and not np.any(array):
            zeros += 1
        elif stem_and_part[1] in parts_by_stem.setdefault(stem_and_part[0], {}):
            raise FormatError(location, f"tensor {name!r} exists under two names")
        else:
            parts_by_stem[stem_and_part[0]][stem_and_part[1]] = array
    if unknown:
        raise refused_error(location, unknown, "", NotUnderstoodError)
    notes = [f"{zeros} differences are all zeros and have no effect"] if zeros else []
    if zero_count := sum("alpha" in part and not np.any(part["alpha"]) for part in parts_by_stem.values()):
        notes.append(f"{zero_count} alphas are 0 and read as the rank, as by sd-scripts; ComfyUI reads them as 0")
    if lacking_count := sum("alpha" not in part and "A" in part for part in parts_by_stem.values()):
        notes.append(f"{lacking_count} modules have no alpha: it is the rank, as in sd-scripts and ComfyUI")
    return parts_by_stem, notes


def _count_without_root(grouped: Mapping[str, factors.Parts], metadata: Mapping[str, str]) -> int:
    """Return the number of modules that LyCORIS trained with a factor of sqrt(dim), which no program applies on loading."""
    if not _RS_LORA.search(metadata.get("ss_network_args", "")):
        return 0
    return sum({"lokr_w1", "lokr_w2"} <= set(part) for part in grouped.values())


_RS_LORA = safe_regex.Pattern(r'"rs_lora": *"?[Tt]rue')


class _Reader:
    """A collector of what the modules of a file change."""

    def __init__(self, base: BaseSpec | None, location: str) -> None:
        self._base, self._where = base, location
        self.added: dict[str, np.ndarray] = {}
        self.replaced: dict[str, np.ndarray] = {}
        self._deltas: dict[str, Delta] = {}
        self._products: dict[str, tuple[Factored, Reading]] = {}
        self._failed: list[RefusedError] = []

    def add(self, stem: str, part: factors.Parts, reading: Reading) -> None:
        """Add a module of the file."""
        target = reading.targets[0]
        shape = pipeline.weight_shape(self._base, target)
        kernel = shape[2:] if shape else family_tables.kernel(target)
        try:
            is_parameter = reading.parameter or pipeline.is_parameter(self._base, target)
            if (scale := factors.scale_of(part)) is not None and len(reading.targets) == 1:
                factors.check_floats(stem, "scale", scale, self._where)
                self._add_unique(self.replaced, f"{target}.weight", scale, stem)
                return
            delta_parts, differences = factors.differences(part, parameter=is_parameter)
            for kind, values in differences.items():
                factors.check_floats(stem, kind, values, self._where)
                for name, piece in joined_modules.split_difference(stem, values, reading, self._where).items():
                    self._add_unique(self.added, name if is_parameter else f"{name}.{kind}", piece, stem)
            if delta_parts:
                single = target if len(reading.targets) == 1 else stem
                self._add_split(stem, _as_base(factors.delta_of(single, delta_parts, kernel, self._where), shape), reading)
        except RefusedError as error:
            # Collected, so that one error can name all modules.
            self._failed.append(error)

    def deltas(self) -> dict[str, Delta]:
        """Return the deltas of all modules; RefusedError names all modules that could not be read."""
        # All at once, so that the limit on growth covers the sum: small products of large rank become large pairs.
        pairs = as_pairs({stem: delta for stem, (delta, _) in self._products.items()})
        for stem, pair in pairs.items():
            self._add_split(stem, pair, self._products[stem][1])
        if self._failed:
            is_refused = any(type(error) is not NotUnderstoodError for error in self._failed)
            reasons = [error.what for error in self._failed]
            raise refused_error(self._where, reasons, "", RefusedError if is_refused else NotUnderstoodError)
        return self._deltas

    def _add_split(self, stem: str, delta: Delta, reading: Reading) -> None:
        if isinstance(delta, Factored) and not joined_modules.stays_product(delta, reading):
            self._products[stem] = delta, reading
            return
        for target, member in joined_modules.split_delta(stem, delta, reading, self._where).items():
            self._add_unique(self._deltas, target, member, stem)

    def _add_unique(self, collection: dict[str, _T], name: str, value: _T, stem: str) -> None:
        if name in collection:
            raise FormatError(self._where, f"{name} exists under two names; {stem!r} is one of them")
        collection[name] = value


def _as_base(delta: Delta, shape: tuple[int, ...] | None) -> Delta:
    """Return `delta` as a matrix if it was saved as a 1 by 1 convolution but the base's module is not a convolution."""
    if not isinstance(delta, LowRankConv) or shape is None or len(shape) != 2 or any(size != 1 for size in delta.shape[2:]):
        return delta
    magnitude = None if delta.magnitude is None else delta.magnitude.reshape(-1)
    lora_A, lora_B = delta.lora_A.reshape(delta.r, -1), delta.lora_B.reshape(-1, delta.r)
    return LowRank(lora_A, lora_B, delta.alpha, magnitude=magnitude, bias=delta.bias)


# ---- Writing


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`; RefusedError names what the format cannot express."""
    adapter = naming.in_diffusers_names(adapter, "kohya")
    expressed = dataclasses.replace(adapter, added={}) if adapter.deltas else adapter
    if problems := list(preserved_header.problems(expressed, "kohya's format", _problem)):
        raise refused_error("kohya", problems)
    plain, losses = _with_native_kinds(adapter)
    prefixed = naming.with_model_prefix(plain, base, "kohya")
    names = dict(zip(prefixed.deltas, adapter.deltas, strict=True))
    groups, places, table = naming.group_deltas(prefixed, base)
    outlines: dict[str, tuple[int, int] | None] = {}
    tensors: dict[str, np.ndarray] = {}
    for stem, (members, reading) in sorted(groups.items()):
        delta = joined_modules.join_deltas(stem, members, reading)
        parts, alpha = factors.tensors_of(delta)
        outlines[stem] = (delta.shape[0], delta.shape[1])
        tensors |= {f"{stem}.{name}": np.ascontiguousarray(array) for name, array in parts.items()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = factors.alpha_tensor(alpha, next(iter(parts.values())).dtype)
        is_alone = len(members) == 1 and len(reading.targets) == 1
        for target, member in members.items():
            losses += _losses(names[target], member, None if is_alone else stem, _is_rounded(alpha, tensors, stem))
    for (changed_name, values), (stem, reading) in zip(adapter.added.items(), places.values(), strict=True):
        name = f"{stem}.{'diff_b' if changed_name.endswith('.bias') else 'diff'}"
        if len(reading.targets) > 1 or reading.swapped or name in tensors:
            raise refused_error("kohya", [f"{changed_name}: a part of {stem} alone cannot be expressed in kohya's format"])
        tensors[name] = np.ascontiguousarray(values)
        losses.append(TensorLoss(f"{changed_name} (difference)", Loss.EXACT))
    # The source's config promises an exact way back, which rounding rules out.
    config = {} if is_rounded(losses) else preserved_header.source_keys(adapter, names, tensors)
    if config:  # everything that was rewritten can be recovered bit for bit
        losses = [dataclasses.replace(line, loss=Loss.EXACT, note="") for line in losses]
    header, notes = _header(adapter, tensors, path)
    header |= naming.header(outlines, header, table)
    safetensors_file.write(path, tensors, header | config)
    return LossReport(tuple(sorted(losses, key=lambda line: line.name)), (*plain.notes, *notes))


def is_rounded(losses: Iterable[TensorLoss]) -> bool:
    """Return whether numbers of a tensor were rounded for good; a rounded alpha is recovered from the config."""
    return any(line.loss >= Loss.ROUNDED and line.note != _ALPHA for line in losses)


_ALPHA = "its alpha is rounded to float32"


def _problem(delta: Delta) -> str:
    kind = type(delta).__name__
    if not isinstance(delta, LowRank | LowRankConv | Factored):
        return f"a delta of kind {kind} cannot be expressed in kohya's format"
    if isinstance(delta, Factored) and not _is_native(delta) and not delta.is_low_rank:
        return f"a delta of kind {kind} of unknown shape cannot be expressed in kohya's format"
    return ""


def _is_native(delta: Delta) -> bool:
    """Return whether kohya or LyCORIS can express a delta unchanged; they have no scale for LoKr with two whole matrices."""
    is_full_lokr = isinstance(delta, Kronecker) and {"lokr_w1", "lokr_w2"} <= set(delta.tensors)
    return isinstance(delta, LowRank | LowRankConv | Hadamard | Kronecker | CpConv) and not (
        is_full_lokr and delta.scaling != 1
    )


def _with_native_kinds(adapter: Adapter) -> tuple[Adapter, list[TensorLoss]]:
    """Return the adapter with kinds that the format lacks replaced by equal pairs, and the losses."""
    changed = as_pairs({t: d for t, d in adapter.deltas.items() if isinstance(d, Factored) and not _is_native(d)})
    if not changed:
        return adapter, []
    note = "factors are products, rounded once in float32"
    losses = [
        TensorLoss(f"{target}.{part}", Loss.ROUNDED, note) for target in changed for part, _ in adapter.deltas[target].parts()
    ]
    return dataclasses.replace(adapter, deltas={**adapter.deltas, **changed}), losses


def _losses(target: str, delta: Delta, stem: str | None, rounded: bool) -> list[TensorLoss]:
    losses = []
    for name, _ in delta.parts():
        label = f"{target}.{'lora_B.bias' if name == 'bias' else name}"
        if name == "bias" and delta.scaling != 1:
            losses.append(TensorLoss(label, Loss.ROUNDED, "times the scale in float32", 2.0**-24))
        elif name == "lora_B" and rounded:
            losses.append(TensorLoss(label, Loss.ROUNDED, _ALPHA, 2.0**-24))
        else:
            losses.append(TensorLoss(label, Loss.REWRITTEN, f"in {stem}") if stem else TensorLoss(label, Loss.EXACT))
    return losses


def _is_rounded(alpha: float | None, tensors: Mapping[str, np.ndarray], stem: str) -> bool:
    return alpha is not None and abs(alpha) > factors.TINY_ALPHA and float(tensors[f"{stem}.alpha"]) != alpha


def _header(adapter: Adapter, tensors: Mapping[str, np.ndarray], path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the source's own header without the hashes of another payload, and notes."""
    header = preserved_header.source_header(adapter, str(path))
    hashes = [key for key in header if key.startswith("sshs_")]
    if not hashes or header.get("sshs_model_hash") == _payload_hash(tensors):
        return header, []
    other_entries = {key: text for key, text in header.items() if key not in hashes}
    return other_entries, [f"{' and '.join(hashes)} are left out of the header, as they belong to other bytes"]


def _payload_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """Return sd-scripts' hash of a model: that of all bytes after the header (`addnet_hash_safetensors`)."""
    digest = hashlib.sha256()
    for name, _, _ in safetensors_header.sorted_entries((n, dtypes.name_of(a.dtype), a.shape) for n, a in tensors.items()):
        digest.update(safetensors_file.byte_view(np.ascontiguousarray(tensors[name])))
    return digest.hexdigest()
