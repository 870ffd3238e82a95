"""Read the files of an adapter in any format into `Contents`, from their headers, and collect every problem on the way.

The readers in `adapterhub_converters` stop at the first error, because their result would be wrong. A check needs all errors,
and all good tensors of a file with a bad one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.folder_contents import Inspection
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import BUNDLED, Adapter, LowRank, LowRankEmbedding, plain_pairs
from adapterhub_converters.adapter_files import is_pickle_name, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.containers.safetensors_header import SafetensorsHeader, TensorKind
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, NotUnderstoodError, RefusedError
from adapterhub_converters.formats import FORMATS, adapter_claims, peft
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.formats.peft.tensor_keys import identify, with_adapter_name

from .contents import PART_NAMES, Contents, Parts
from .report import Problem

if TYPE_CHECKING:
    import numpy as np

    from adapterhub_converters.bases import BaseSpec


def read_contents(
    path: Path | Candidate, *, base: BaseSpec | None, inspected: Inspection | None = None
) -> tuple[Contents | None, list[Problem]]:
    """Read an adapter in any format, except for one that the caller has `inspected` as a whole, with its numbers.

    Returns:
        The contents, which the caller closes, or None if the files are not well-formed; and the problems found so far.

    Raises:
        NotFoundError: There is no adapter at `path`.
    """
    candidate = Candidate.of(path)
    given_path, problems = candidate.path, list(_pickles(candidate.path))
    candidate = candidate.adapter
    path = candidate.path
    try:
        try:
            if inspected is not None and (adapter := inspected.complete_adapter) is not None:
                return _whole_contents(candidate, inspected.format, adapter), problems
            contents = _read(candidate, base, pickle=any(problem.code == "pickle" for problem in problems))
        except NotUnderstoodError as error:
            contents = _read_unknown(path, error)
    except AdapterhubError as error:
        # A path without an adapter is the caller's mistake; a missing file inside of one is a finding.
        if isinstance(error, NotFoundError) and error.where in (str(path), str(given_path)):
            raise
        problem = unreadable_file(path, error)
        if error.code == "alpha-or-rslora-required":  # also of a file of another name, which the config would be next to
            problem = Problem("missing-file", peft.CONFIG, "", "is missing, and nothing else records its alpha", cause=error)
        elif isinstance(error, RefusedError) and not (path / peft.CONFIG).exists():
            code = "does-not-fit" if base else "needs-base" if error.code == "base-required" else problem.code
            problem = problem._replace(code=code)
        return None, [*problems, problem]
    return contents, problems


def _read(candidate: Candidate, base: BaseSpec | None, *, pickle: bool) -> Contents | None:
    """Return the contents of an adapter of a known kind; None if there are only pickles."""
    if peft.sniff(candidate):
        return _read_peft(candidate, base)
    kind = _sniff(candidate, pickle=pickle)
    return None if kind is None else _read_whole(candidate, kind, base)


def _read_unknown(path: Path, error: NotUnderstoodError) -> Contents:
    """Return the contents of an adapter of an unknown kind: its tensors, with those named as halves of pairs combined."""
    from adapterhub_converters.containers.gguf_file import GGUFFile  # late, like other readers

    split_name = FORMATS["kohya"].implementation.split_name
    facts = adapter_claims.read(path, error)
    files = adapter_claims.weight_files(path)
    contents = Contents(path, facts.format, files[0].name, unread=facts)
    if facts.format == "gguf":
        with GGUFFile(path) as file:
            contents.other_tensors = {n: TensorKind(t.type_name, t.shape, t.size) for n, t in file.tensors.items()}
        return contents
    try:
        for weight_file in files:
            contents.files[weight_file] = opened = SafetensorsFile(weight_file, location=weight_file.name)
            contents.heads[weight_file] = opened.head
            for name, kind in zip(opened.header.names, opened.header.kinds, strict=True):
                module, part = split_name(name) or (name, "")
                if part in ("A", "B"):
                    contents.pairs[module] = {**contents.pairs.get(module, {}), part: kind}
                else:
                    contents.other_tensors[name] = kind
    except BaseException:
        contents.close()
        raise
    pairs = [module for module, parts in contents.pairs.items() if len(parts) == 2]
    for module in [
        module_name for module_name in pairs if any(len(kind.shape) != 2 for kind in contents.pairs[module_name].values())
    ]:
        for part, kind in contents.pairs.pop(module).items():  # of a convolution, or of all experts
            contents.other_tensors[f"{module}.{PART_NAMES[part]}"] = kind
    return contents


def _sniff(candidate: Candidate, *, pickle: bool) -> str | None:
    """Return the format of an adapter other than PEFT's; None if there are only pickles."""
    from adapterhub_converters.formats import convert  # late: all readers are a fifth of the time that a check takes

    try:
        return convert.sniff(candidate)
    except (NotFoundError, FormatError) as error:
        if pickle and error.code == "no-adapter":
            return None
        raise


def unreadable_file(path: Path, error: AdapterhubError) -> Problem:
    """Return the problem of a file that cannot be used; raise `error` itself if it is not about the file."""
    codes: list[tuple[type[AdapterhubError], str]] = [
        (FormatError, "malformed"),
        (NotFoundError, "missing-file"),
        (RefusedError, "unsupported"),
    ]
    code = next((code for kind, code in codes if isinstance(error, kind)), None)
    if code is None:
        raise error
    code = error.code if error.code == "whole-model" else code
    # A folder named "adapter" is no part of "adapter_model.safetensors".
    folder, inside = error.where[: len(str(path))], error.where[len(str(path)) :]
    location = inside[1:] if folder == str(path) and inside[:1] in ("", "/", "\\") else error.where
    # An error about an option of the config names it behind the file.
    option = location.removeprefix(f"{peft.CONFIG}: ") if location.startswith(f"{peft.CONFIG}: ") else ""
    if option:
        return Problem("unsupported", peft.CONFIG, option, error.what, error.hint, cause=error)
    return Problem(code, location or path.name, "", error.what, error.hint, cause=error)


def _pickles(path: Path) -> Iterator[Problem]:
    """Yield the pickles that a program may load in place of the weights."""
    if not path.is_dir():
        return
    safe = any(is_weights(item.name) for item in path.iterdir())
    for item in sorted(path.iterdir()):
        if is_pickle_name(item.name) and item.name.startswith(("adapter", "pytorch_model")):
            if safe:
                yield Problem("stray-pickle", item.name, "", "a pickle can run code when it is loaded", "Delete it")
            else:
                hint = "Save the adapter again with safe_serialization=True"
                yield Problem("pickle", item.name, "", "a pickle can run code when it is loaded", hint)


def _read_peft(candidate: Candidate, base: BaseSpec | None) -> Contents:
    """Return the contents of a PEFT adapter, with its files open."""
    path, text = candidate.path, candidate.config
    contents = Contents(path, "peft", peft.WEIGHTS, json_file.parse_object(text, peft.CONFIG), config_text=text)
    contents.record_text(path / peft.CONFIG, text)
    if not any((path / name).is_file() for name in (peft.WEIGHTS, peft.INDEX)):
        raise NotFoundError(peft.WEIGHTS, "no such file", code="no-such-file")
    with contextlib.suppress(FormatError):  # which is one of several problems with the config
        peft.check_config(contents.config, peft.CONFIG)
    try:
        for shard in peft.weight_files(path):
            contents.files[shard] = file = candidate.file(shard.name).open_safetensors(shard.name)
            contents.heads[shard] = file.head
            if not contents.is_tuned:
                _add_tensors(contents, file.header)
        if contents.is_tuned:
            headers = {shard: file.header for shard, file in contents.files.items()}
            _set_tuned(contents, peft.parse_shapes(text, headers, location=str(path), base=base))
        elif _has_other_deltas(contents):
            headers = {shard: file.header for shard, file in contents.files.items()}
            _set_other_deltas(contents, peft.parse_shapes(text, headers, location=str(path), base=base))
    except BaseException:
        contents.close()
        raise
    return contents


def _has_other_deltas(contents: Contents) -> bool:
    """Return whether an adapter has deltas that are not a pair of matrices."""
    # Not by `distinct_parts`, as some pairs may be taken out.
    different_parts = {id(parts): parts for parts in contents.pairs.values()}.values()
    convolution = any(all(part in parts and len(parts[part].shape) > 2 for part in ("A", "B")) for parts in different_parts)
    other_tuner = contents.config.get("peft_type") in ("ADALORA", "LOHA", "LOKR", "VERA")
    return convolution or other_tuner or any(contents.config.get(key) for key in ("target_parameters", "use_qalora"))


def _set_tuned(contents: Contents, adapter: Adapter) -> None:
    """Set the changes by a tuner other than LoRA, whose tensors have other names."""
    contents.tuned = adapter.tuned
    contents.replaced = {name: _kind(array) for name, array in adapter.replaced.items()}
    contents.added = {name: _kind(array) for name, array in adapter.added.items()}
    for target, rows in adapter.rows.items():
        contents.rows[target], contents.row_ids[target] = _kind(rows.values), rows.ids
    for target, change in contents.tuned.items():
        contents.other_tensors |= {f"{target}.{part}": _kind(array) for part, array in change.parts()}
    contents.other_tensors |= {name: _kind(array) for name, array in adapter.shared.items()}


def _set_other_deltas(contents: Contents, adapter: Adapter) -> None:
    """Set the deltas that are not a pair of matrices, and take their tensors out of the pairs."""
    contents.notes = adapter.notes
    contents.other_deltas = {
        t: delta for t, delta in adapter.deltas.items() if not isinstance(delta, LowRank | LowRankEmbedding)
    }
    for target in [t for t in contents.pairs if t in contents.other_deltas or t not in adapter.deltas]:
        parts = contents.pairs.pop(target)
        contents.other_tensors |= {f"{target}.{PART_NAMES.get(part, part)}": tensor for part, tensor in parts.items()}


def _add_tensors(contents: Contents, header: SafetensorsHeader) -> None:
    """Add the tensors of a file to the contents."""
    kind_of_adapter, indices = contents.config.get("peft_type"), _row_ids(contents.config.get("trainable_token_indices"))
    pairs, no_parts = contents.pairs, dict[str, TensorKind]()
    # Equal sequences of parts give one shared mapping, so that a million modules take little memory.
    extended: dict[tuple[int, str, int], Parts] = {}  # by the parts before, which are kept alive, and the new part and its kind
    for key, tensor in zip(header.names, header.kinds, strict=True):
        full, kind, name, part = identify(key)
        if full != key and full != key.removesuffix(".weight"):
            if kind == "pair" and with_adapter_name(full) == key:
                contents.adapter_named.append(key)
            else:
                contents.renamed.append((key, full))
        if kind == "pair" and (part in PART_NAMES or kind_of_adapter != "LORA"):
            parts = pairs.get(name, no_parts)
            step = (id(parts), part, id(tensor))
            if step not in extended:
                extended[step] = {**parts, part: tensor}
            pairs[name] = extended[step]
        elif kind == "rows":
            contents.rows[name] = tensor
            contents.row_ids[name] = indices.get(name) or indices.get(name.rpartition(".")[2]) or indices.get(None, ())
        elif kind == "replaced":
            contents.replaced[name] = tensor
        elif kind == "copy":
            contents.copies[name] = tensor
        elif kind == "shared" and kind_of_adapter == "VERA":
            contents.other_tensors[name] = tensor
        else:
            contents.unknown.append(key)


def _row_ids(indices: object) -> dict[str | None, tuple[int, ...]]:
    """Return the ids of `trainable_token_indices` by table, or by the last part of its name; ids of all tables under None."""
    named: Mapping[str | None, object] = indices if isinstance(indices, dict) else {None: indices}
    return {
        name: tuple([number for number in ids if isinstance(number, int)]) if isinstance(ids, list) else ()
        for name, ids in named.items()
    }


def _read_whole(candidate: Candidate, kind: str, base: BaseSpec | None) -> Contents:
    """Return the contents of an adapter in a format that is read as a whole."""
    from adapterhub_converters.formats import convert

    adapter, ordered = convert.read_unordered(candidate, base=base)
    contents = _whole_contents(candidate, kind, adapter)
    contents.ordered = ordered
    return contents


def _whole_contents(candidate: Candidate, kind: str, adapter: Adapter) -> Contents:
    """Return the contents of an adapter that was read as a whole, and what the candidate knows of its files."""
    from adapterhub_converters.formats import find

    path = candidate.path
    contents = Contents(path, kind, (path.name, *find(kind).files)[-1], adapter=adapter, notes=adapter.notes)
    contents.heads.update(candidate.heads())
    contents.digests.update(candidate.digests())
    if candidate.config:
        contents.record_text(path / peft.CONFIG, candidate.config)
    pairs = {t: d for t, d in adapter.deltas.items() if isinstance(d, LowRank | LowRankEmbedding)}
    for target, delta in plain_pairs(dataclasses.replace(adapter, deltas=pairs, added={}, replaced={})).items():
        contents.pairs[target] = dict(_parts(delta))
    contents.other_deltas = {target: delta for target, delta in adapter.deltas.items() if target not in pairs}
    for target, other_delta in contents.other_deltas.items():
        contents.other_tensors |= {f"{target}.{part}": _kind(array) for part, array in other_delta.parts()}
    for name, array in [*adapter.replaced.items(), *adapter.added.items()]:
        # No base has the embeddings that OneTrainer bundles, so that they are compared with none.
        tensors = contents.other_tensors if name.startswith(BUNDLED) else contents.replaced
        tensors[name] = _kind(array)
    for target, rows in adapter.rows.items():
        contents.rows[target], contents.row_ids[target] = _kind(rows.values), rows.ids
    return contents


def _parts(delta: LowRank | LowRankEmbedding) -> Iterator[tuple[str, TensorKind]]:
    prefix = "embedding_" if isinstance(delta, LowRankEmbedding) else ""
    yield f"{prefix}A", _kind(delta.lora_A)
    yield f"{prefix}B", _kind(delta.lora_B)
    if isinstance(delta, LowRank) and delta.magnitude is not None:
        yield "magnitude", _kind(delta.magnitude)
    if isinstance(delta, LowRank) and delta.bias is not None:
        yield "bias", _kind(delta.bias)


def _kind(array: np.ndarray) -> TensorKind:
    return TensorKind(dtypes.name_of(array.dtype), array.shape, array.nbytes)
