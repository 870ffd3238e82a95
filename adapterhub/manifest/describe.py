"""adapter.json: the facts of an adapter, derived from its own files and from what its owner declares.

A pure function of a folder: no clock, host or tool version. What was recorded once (a training, the parents of a
merge) rides along; what can be derived is derived, and a document that contradicts the files beside it is refused.
Shapes come from the header of the weights, so that 200 MB of weights need no 200 MB of memory.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import adapterhub_schemas
from adapterhub.digest import Digest, sha256_file
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import peft

from .document import SCHEMA_ID, SCHEMA_VERSION, upgrade
from .package_files import Listing
from .package_files import listing as package_listing

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

NAME = "adapter.json"
DECLARED = "adapter.toml"

Facts = dict[str, Any]
Files = Mapping[str, tuple[Digest, int]]
"""Path to digest and size in bytes."""
Seen = tuple[str, Adapter]
"""The format of a folder's adapter, and the adapter; the numbers in its tensors may be absent."""

_DECLARABLE = {"name", "description", "license", "task", "base", "training"}
_DECLARABLE_BASE = {"repo", "revision", "quantization"}


def describe(
    folder: Path,
    *,
    base: BaseSpec | None = None,
    training: Mapping[str, Any] | None = None,
    parents: Sequence[Mapping[str, Any]] = (),
    recipe: Mapping[str, Any] | None = None,
    declared: Mapping[str, Any] | None = None,
    files: Files | None = None,
    seen: Seen | None = None,
) -> Facts:
    """The facts of the adapter in `folder`; an adapter.json in it is ignored.

    Args:
        folder: One adapter in any format that is read.
        base: The base it was trained on, if it is at hand.
        training: What the trainer recorded, under the names of the schema.
        parents: The adapters it was made from.
        recipe: How, under the names of the schema.
        declared: What adapter.toml would say; None to read that file.
        files: Digests and sizes of the folder's files, where the caller has them already.
        seen: What `look` said of the folder, likewise.
    """
    adapter_format, adapter = seen or look(folder)
    facts = {
        "$schema": SCHEMA_ID,
        "schema_version": SCHEMA_VERSION,
        "name": None,
        "base": _base(adapter, base),
        "task": adapter.meta.task_type,
        **_weights(adapter, adapter_format),
        "files": _files(digests(folder) if files is None else files),
        "license": None,
        "description": None,
        "training": dict(training) if training else None,
        "parents": [dict(parent) for parent in parents],
        **({"recipe": dict(recipe)} if recipe else {}),
    }
    facts = _overlay(facts, read_declared(folder) if declared is None else declared, f"{folder}/{DECLARED}")
    return check(facts, f"{folder}/{NAME}")


@dataclass(frozen=True)
class Draft:
    """The adapter.json of a folder before its files are hashed: all else of the folder has been read, once.

    Attributes:
        listing: The files that belong to the adapter.
        seen: Its format and its adapter; the numbers in its tensors may be absent.
        known: The adapter.json in the folder, None where there is none; `text` is its text.
        declared: The contents of adapter.toml.
        base: The base model to pin, if one was given. What is recorded already is kept.
        digests: Those of files that were hashed on the way.
    """

    folder: Path
    listing: Listing
    seen: Seen
    known: Facts | None
    text: str
    declared: Mapping[str, Any]
    base: BaseSpec | None = None
    digests: Mapping[Path, Digest] = field(default_factory=dict)

    def facts(self, files: Files | None = None) -> Facts:
        """The facts to publish; without `files` (path to digest and size) they name none, which is enough for a policy."""
        files = {} if files is None else files
        if self.known is None:
            return describe(self.folder, base=self.base, declared=self.declared, files=files, seen=self.seen)
        known = {**self.known, "files": _files(files)}
        if self.base is not None:
            recorded = {key: value for key, value in self.known["base"].items() if value}
            known["base"] = {**_base(self.seen[1], self.base), **recorded}
        return _overlay(known, self.declared, f"{self.folder}/{DECLARED}")

    def settle(self, files: Files) -> tuple[Facts, bytes]:
        """The facts to publish, and the bytes of their document.

        The adapter.json in the folder, byte for byte, if it is complete. Files and declarations that it lacks are added to
        it. One that contradicts the files is an IntegrityError: what it records belongs to other weights.
        """
        where = f"{self.folder}/{NAME}"
        if self.known is not None:
            _check_true(self.known, files, self.seen, where)
        facts = self.facts(files)
        if facts == self.known:
            return facts, self.text.encode()
        return check(facts, where), dump(facts)


def draft(
    folder: Path,
    *,
    listing: Listing | None = None,
    seen: Seen | None = None,
    text: str | None = None,
    base: BaseSpec | None = None,
    digests: Mapping[Path, Digest] | None = None,
) -> Draft:
    """Read a folder for its adapter.json; `listing`, `seen` and `text`, its adapter.json, where the caller has them already."""
    where = f"{folder}/{NAME}"
    seen = seen or look(folder)
    if text is None:
        try:
            text = json_file.read_text(folder / NAME)
        except NotFoundError:
            text = ""
    known = parse(text, where) if text else None
    declared = read_declared(folder)
    return Draft(folder, listing or package_listing(folder), seen, known, text, declared, base, digests or {})


def settle(folder: Path, files: Files | None = None, seen: Seen | None = None) -> tuple[Facts, bytes]:
    """`Draft.settle` of a folder; `files` are hashed unless they are given."""
    return draft(folder, seen=seen).settle(digests(folder) if files is None else files)


def _check_true(known: Facts, files: Files, seen: Seen, where: str) -> None:
    hint = "Delete adapter.json to derive it anew; its training record goes with it"
    # adapter.toml may be edited: what it says is merged in again.
    for entry in known["files"]:
        if entry["path"] != DECLARED and files.get(entry["path"]) != (entry["digest"], entry["size"]):
            kind = "has changed since" if entry["path"] in files else "is gone"
            raise IntegrityError(where, f"{entry['path']} {kind}, so these are not the facts of this folder", hint)
    adapter_format, adapter = seen
    for key, value in _weights(adapter, adapter_format).items():
        if known[key] != value:
            raise IntegrityError(where, f'"{key}" is {_short(known[key])}, but the weights say {_short(value)}', hint)


def _short(value: object) -> str:
    return json.dumps(value)[:60]


def digests(folder: Path, more: Callable[[int], object] | None = None) -> dict[str, tuple[Digest, int]]:
    """Path to digest and size of the adapter's files, adapter.json included; `more` is told how many bytes were read."""
    return {path: (sha256_file(folder / path, more), (folder / path).stat().st_size) for path in package_listing(folder).files}


def _files(files: Files) -> list[dict[str, Any]]:
    return [{"path": path, "digest": digest, "size": size} for path, (digest, size) in sorted(files.items()) if path != NAME]


# ---- what the weights say


def look(folder: Path) -> Seen:
    """The format and the adapter of a folder; of a PEFT folder the shapes only, as its tensors are not looked at."""
    if peft.sniff(folder):
        return "peft", peft.read_shapes(folder)
    return _look_whole(folder)


def look_whole(folder: Path) -> Adapter:
    """The adapter of a folder, with the numbers in its tensors."""
    return _look_whole(folder)[1]


def _look_whole(folder: Path) -> Seen:
    candidates = [folder, *sorted(folder.glob("*.gguf")), *sorted(folder.glob("*.safetensors"))]
    from adapterhub_converters.formats import convert

    # raw takes any file, so it is asked last, about one that is alone; it reads those that say their alpha.
    known = {name: module for name, module in convert.FORMATS.items() if name != "raw"}
    found = [(name, path) for path in candidates for name, module in known.items() if module.sniff(path)]
    if not found and len(candidates) == 2 and convert.FORMATS["raw"].sniff(candidates[1]):
        found = [("raw", candidates[1])]
    if not found:
        raise NotFoundError(
            str(folder), f"no adapter in it: neither {peft.CONFIG} nor a file that is one", "Name an adapter's folder"
        )
    if len(found) > 1:
        names = " and ".join(path.name for _, path in found[:2])
        raise RefusedError(str(folder), f"{names} are two adapters", "Give each a folder of its own")
    name, path = found[0]
    return name, convert.FORMATS[name].read(path)


def _weights(adapter: Adapter, adapter_format: str) -> dict[str, Any]:
    r, alpha = _usual(adapter.deltas.values())
    names = {dtypes.name_of(tensor.dtype) for _, tensor in adapter.tensors()}
    dora = any(getattr(delta, "magnitude", None) is not None for delta in adapter.deltas.values())
    return {
        "method": "dora" if dora else "lora" if adapter.deltas else "full",
        "r": r,
        "alpha": alpha,
        "rslora": any(delta.rslora for delta in adapter.deltas.values()),
        "modules": {
            target: {"r": delta.r, "alpha": _number(delta.alpha)}
            for target, delta in sorted(adapter.deltas.items())
            if (delta.r, delta.alpha) != (r, alpha)
        },
        "targets": sorted({target.rpartition(".")[2] for target in adapter.deltas}),
        "replaced": sorted([*adapter.replaced, *adapter.rows, *adapter.copies]),
        "dtype": names.pop() if len(names) == 1 else "mixed",
        "parameters": adapter.parameters,
        "format": adapter_format,
    }


def _usual(deltas: Any) -> tuple[int | None, float | int | None]:
    """The rank and alpha that most modules have together; of two as common, the larger."""
    counts: Counter[tuple[int, float]] = Counter((delta.r, delta.alpha) for delta in deltas)
    if not counts:
        return None, None
    r, alpha = max(counts, key=lambda pair: (counts[pair], pair))
    return r, _number(alpha)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


# ---- what is said of it


def _base(adapter: Adapter, spec: BaseSpec | None) -> dict[str, Any]:
    repo = _published(adapter.meta.base_model) or _published(spec.repo if spec else None)
    return {
        "repo": repo,
        # A commit means nothing of a model with another name.
        "revision": adapter.meta.revision or (spec.revision if spec and spec.repo == repo else None),
        "architecture": (spec.architecture or None) if spec else None,
        "model_type": (spec.model_type or None) if spec else None,
        "fingerprint": spec.fingerprint if spec else None,
        "tokenizer_digest": spec.tokenizer_digest if spec else None,
        "chat_template_digest": spec.chat_template_digest if spec else None,
        "quantization": spec.quantization if spec else None,
        "config": dict(spec.config) if spec else {},
    }


def _published(name: str | None) -> str | None:
    # A path of one machine means nothing on another, and would make the digest depend on who trained.
    return name if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") else None


def read_declared(folder: Path) -> dict[str, Any]:
    """What adapter.toml declares; an empty dict without one. A key that means nothing is a UsageError by name."""
    where = f"{folder}/{DECLARED}"
    try:
        declared = tomllib.loads(json_file.read_text(folder / DECLARED))
    except NotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise UsageError(where, f"not valid TOML ({error})") from error
    return declared


def _overlay(facts: Facts, declared: Mapping[str, Any], where: str) -> Facts:
    """The facts with what is declared in place of what was derived or recorded."""
    training_keys = set(adapterhub_schemas.load("adapter")["properties"]["training"]["properties"])
    _check_keys(declared, _DECLARABLE, "", where)
    base, training = declared.get("base", {}), declared.get("training", {})
    for name, table, known in (("base", base, _DECLARABLE_BASE), ("training", training, training_keys)):
        if not isinstance(table, Mapping):
            raise UsageError(where, f"{name} is not a table", f"Write it as [{name}]")
        _check_keys(table, known, f"{name}.", where)
    plain = {key: value for key, value in declared.items() if key not in ("base", "training")}
    merged = {**facts, **plain, "base": {**facts["base"], **base}}
    if training:
        merged["training"] = _plain({**(facts["training"] or {}), **training})
    return merged


def _check_keys(table: Mapping[str, Any], known: set[str], prefix: str, where: str) -> None:
    for key in sorted(set(table) - known):
        close = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known are {', '.join(sorted(known))}"
        raise UsageError(where, f"unknown key {prefix}{key}", hint)


def _plain(value: Any) -> Any:
    """TOML values as JSON has them: times become text, in UTC where they say where they are."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime) and value.tzinfo:
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


# ---- the document


def dump(facts: Mapping[str, Any]) -> bytes:
    """The one spelling of a document: keys sorted, two spaces, one newline at the end."""
    try:
        text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(NAME, f"a value that JSON cannot hold ({error})", "Record finite numbers and text only") from error


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write adapter.json into `folder`, checked first."""
    check(dict(facts), f"{folder}/{NAME}")
    json_file.write_text(folder / NAME, dump(facts).decode())


def read_facts(folder: Path) -> Facts | None:
    """The adapter.json of a folder, checked against the schema; None when there is none."""
    try:
        text = json_file.read_text(folder / NAME)
    except NotFoundError:
        return None
    return parse(text, f"{folder}/{NAME}")


def parse(text: str, where: str) -> Facts:
    """The checked facts in the text of an adapter.json. Those of a newer adapterhub are refused, not guessed at."""
    document = json_file.parse_object(text, where)
    version = document.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise RefusedError(
            where, f"schema_version {version} is newer than the {SCHEMA_VERSION} known here", "Upgrade adapterhub"
        )
    return check(upgrade(document), where)


def check(facts: Facts, where: str) -> Facts:
    """`facts` again if they are what the schema says, else a FormatError that names the first field that isn't."""
    import jsonschema

    dump(facts)
    validator = jsonschema.Draft202012Validator(adapterhub_schemas.load("adapter"))
    error = jsonschema.exceptions.best_match(validator.iter_errors(facts))
    if error is not None:
        field = ".".join(map(str, error.absolute_path))
        message = error.message if len(error.message) < 160 else f"{error.message[:120]} …"
        raise FormatError(where, f"{field}: {message}" if field else message)
    return facts
