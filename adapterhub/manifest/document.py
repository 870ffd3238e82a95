"""`AdapterManifest`: adapter.json as a typed value, read, checked and written, across the versions of its schema.

There are two ways to read one. `AdapterManifest.parse` checks the text against the JSON Schema and refuses what does not fit.
`AdapterManifest.salvage` takes the fields that fit from an unchecked document, so that a version that was copied from elsewhere
can be listed.

Field names are those of the schema (`schemas/adapterhub_schemas/adapter.schema.json`), which explains each.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

import adapterhub_schemas
from adapterhub.digest import Digest
from adapterhub_converters import display
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

SCHEMA_VERSION = 2
SCHEMA_ID = f"urn:adapterhub:schema:adapter:{SCHEMA_VERSION}"
# British in schema 1, American since.
_RENAMED = {"licence": "license", "quantisation": "quantization"}  # codespell:ignore


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its path with forward slashes, the sha256 of its bytes, its size in bytes."""

    path: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Rank and alpha of one module."""

    r: int
    alpha: float


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The model that the adapter was trained on; a field is None if it is not known."""

    repo: str | None = None
    revision: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    fingerprint: Digest | None = None
    tokenizer_digest: Digest | None = None
    chat_template_digest: Digest | None = None
    quantization: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the base's config.json that change what it computes, under their own names."""

    def filled_from(self, fallback: BaseInfo) -> BaseInfo:
        """Return this base, with the fields of `fallback` where it has none."""
        return BaseInfo(**{item.name: getattr(self, item.name) or getattr(fallback, item.name) for item in fields(self)})


@dataclass(frozen=True, slots=True)
class TrainingData:
    """A file or a published data set that the adapter was trained on or evaluated with."""

    path: str | None = None
    name: str | None = None
    split: str | None = None
    digest: Digest | None = None
    size: int | None = None
    documents: int | None = None
    tokens: int | None = None
    license: str | None = None


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Losses after `step` steps, in nats per token."""

    step: int
    loss: float | None = None
    heldout_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """The record of a training; a field is None if it was not recorded."""

    config: Mapping[str, Any] | None = None
    data: tuple[TrainingData, ...] | None = None
    weights: tuple[FileEntry, ...] | None = None
    seed: int | None = None
    versions: Mapping[str, str] | None = None
    metrics: Mapping[str, Any] | None = None
    curve: tuple[LossPoint, ...] | None = None
    created: str | None = None


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that this one was made from, by the digest of its OCI manifest."""

    digest: Digest
    ref: str | None = None
    weight: float | None = None
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The merge or the conversion that made the adapter from its parents.

    The document always has `rank`, and for a conversion also `base`: null and absent mean the same.
    """

    kind: str
    """`merge` or `convert`."""
    rank: int | None = None
    method: str | None = None
    energy: float | None = None
    budget: int | None = None
    seed: int | None = None
    parameters: Mapping[str, float | str] | None = None
    to: str | None = None
    dtype: str | None = None
    allow_approx: bool | None = None
    allow_drop: tuple[str, ...] | None = None
    base: Digest | None = None
    loss: Mapping[str, int] | None = None


@dataclass(frozen=True, repr=False)
class AdapterManifest:
    """The content of adapter.json.

    Attributes:
        name: The owner's name for the adapter.
        base: The model it was trained on.
        method: `lora`, `dora`, `full` for replaced parameters alone, or the name of another kind of adapter.
        task: PEFT's task type, unless declared otherwise.
        r: The rank of most modules; None without a low-rank delta.
        alpha: The alpha of most modules, likewise.
        rslora: True if any module scales by alpha / sqrt(r).
        modules: Full path to rank and alpha, for modules that differ from `r` and `alpha`.
        targets: Last names of the modules that have a delta, sorted; `to_out.0` if the last one is a number.
        replaced: Full paths of replaced parameters, and of tables with replaced rows, sorted.
        dtype: As safetensors spells it, or `mixed`.
        parameters: The count of numbers in the adapter.
        format: The format of the files.
        files: Every file except adapter.json, sorted by path.
        license: An SPDX expression.
        description: One paragraph.
        training: The record of its training, if there is one.
        parents: The adapters it was made from.
        recipe: How it was made from them.
        understood: False for a kind of adapter that adapterhub does not know, whose fields are what its config claims; else
            None.
        reason: Why it is not understood.
        numbers: The numbers that describe a kind other than LoRA, by the keys of its config.
    """

    name: str | None
    base: BaseInfo
    method: str
    task: str | None
    r: int | None
    alpha: float | None
    rslora: bool
    modules: Mapping[str, ModuleShape]
    targets: tuple[str, ...]
    replaced: tuple[str, ...]
    dtype: str
    parameters: int
    format: str
    files: tuple[FileEntry, ...]
    license: str | None = None
    description: str | None = None
    training: Training | None = None
    parents: tuple[Parent, ...] = ()
    recipe: Recipe | None = None
    understood: bool | None = None
    reason: str | None = None
    numbers: Mapping[str, Any] | None = None

    # ---- reading

    @classmethod
    def parse(cls, text: str | bytes, location: str) -> AdapterManifest:
        """Return the manifest in the text of an adapter.json.

        Raises:
            FormatError: It is not JSON, or does not fit the schema; the message names the first field that does not.
            RefusedError: A newer adapterhub wrote it.
        """
        return cls.from_dict(json_file.parse_object(text, location), location)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], location: str) -> AdapterManifest:
        """Return the manifest in a JSON object, checked as by `parse`; UsageError for values that JSON cannot hold."""
        version = document.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            problem = f"schema_version {version} is newer than the {SCHEMA_VERSION} known here"
            raise RefusedError(location, problem, "Upgrade adapterhub", code="newer-version")
        document = upgrade(document)
        # Only for its error: a document built in Python may have NaN or an object in it.
        _dump(document)
        _check(document, location)
        return typing.cast(AdapterManifest, _build(cls, document))

    @classmethod
    def salvage(cls, document: Mapping[str, Any]) -> AdapterManifest:
        """Return the usable part of a document that was never checked.

        A field that is missing or has the wrong type is None, or empty if it cannot be None. Digests, names and numbers are not
        checked, so no value may be used as a path.
        """
        return typing.cast(AdapterManifest, _build(cls, upgrade(document)))

    @classmethod
    def read(cls, folder: Path) -> AdapterManifest | None:
        """Return the adapter.json of a folder, checked; None if there is none."""
        try:
            text = json_file.read_text(folder / ADAPTER_JSON)
        except NotFoundError:
            return None
        return cls.parse(text, f"{folder}/{ADAPTER_JSON}")

    # ---- writing

    def to_dict(self) -> dict[str, Any]:
        """Return the document as JSON has it, under the names of the schema."""
        return {"$schema": SCHEMA_ID, "schema_version": SCHEMA_VERSION, **_plain(self)}

    def dump(self) -> bytes:
        """Return the bytes of the document in its canonical form: sorted keys, indented by two spaces, a newline at the end."""
        return _dump(self.to_dict())

    def write(self, folder: Path) -> None:
        """Write adapter.json into `folder`, after checking the manifest against the schema."""
        _check(self.to_dict(), f"{folder}/{ADAPTER_JSON}")
        json_file.write_text(folder / ADAPTER_JSON, self.dump().decode())

    # ---- shown

    def __repr__(self) -> str:
        size = f"r {self.rank}" if self.rank else f"{self.parameters:,} parameters"
        return f"<AdapterManifest {self.name or self.base.repo or self.format}: {self.method}, {size}>"

    def _repr_html_(self) -> str:
        return self.to_html(repr(self))

    def to_html(self, caption: str) -> str:
        """Return an HTML table of what is recorded; the files are counted."""
        document = {key: value for key, value in self.to_dict().items() if key not in ("$schema", "schema_version", "files")}
        size = display.format_size(sum(entry.size for entry in self.files))
        document["files"] = f"{display.format_plural(len(self.files), 'file')}, {size}" if self.files else None
        rows = [(key, _html_value(value)) for key, value in document.items() if value not in (None, [], {})]
        return display.table(rows, head=("field", "value"), caption=caption)

    # ---- questions

    @property
    def max_rank(self) -> int:
        """The highest rank of any module, which is the adapter's where it has one number; 0 without a low-rank delta."""
        return max(self._module_ranks, default=0)

    @property
    def least_rank(self) -> int:
        """The lowest rank of any module; 0 without a low-rank delta."""
        return min(self._module_ranks, default=0)

    @property
    def rank(self) -> str:
        """The rank as text: `16`, or `4 to 16` where ranks differ; empty without a low-rank delta."""
        return rank_text(self.least_rank, self.max_rank)

    @property
    def _module_ranks(self) -> list[int]:
        return [rank for rank in (self.r, *(module.r for module in self.modules.values())) if rank]


def rank_text(least: int | None, largest: int | None) -> str:
    """Return a range of ranks as text: `16`, or `4 to 16`; empty without a rank."""
    if not largest:
        return ""
    return f"{least} to {largest}" if least and least != largest else str(largest)


def upgrade(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of schema 1 as one of schema 2, and any other document unchanged; nothing else is checked."""
    if type(document.get("schema_version")) is not int or document["schema_version"] != 1:
        return dict(document)
    # The renamed keys occur in these places only.
    upgraded = _with_new_spelling(document)
    if isinstance(document.get("base"), dict):
        upgraded["base"] = _with_new_spelling(document["base"])
    training = document.get("training")
    if isinstance(training, dict) and isinstance(training.get("data"), list):
        data = [_with_new_spelling(entry) if isinstance(entry, dict) else entry for entry in training["data"]]
        upgraded["training"] = {**training, "data": data}
    if "$schema" in document:
        upgraded["$schema"] = str(document["$schema"]).replace("adapter:1", "adapter:2")
    return {**upgraded, "schema_version": SCHEMA_VERSION}


def _with_new_spelling(table: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in table.items()}


def _dump(document: Mapping[str, Any]) -> bytes:
    try:
        # Digests depend on this form. Python would write NaN and Infinity, which are not JSON.
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (ValueError, TypeError, RecursionError) as error:
        hint = "Record finite numbers and text only"
        raise UsageError(ADAPTER_JSON, f"a value that JSON cannot hold ({error})", hint) from error


def _check(document: Mapping[str, Any], location: str) -> None:
    violation = adapterhub_schemas.violation(document, "adapter")
    if violation is not None:
        keys, message = violation
        path = ".".join(map(str, keys))
        # jsonschema quotes the whole value in its messages.
        message = message if len(message) < 160 else f"{message[:120]} …"
        raise FormatError(location, f"{path}: {message}" if path else message)


# ---- between JSON and dataclasses, by the types of the fields

# Fields that the document always has: null, rather than absent, if they are None. Digests depend on it.
_NULLABLE_FIELDS: Mapping[type, tuple[str, ...]] = {
    AdapterManifest: ("name", "task", "r", "alpha", "license", "description", "training"),
    BaseInfo: tuple(item.name for item in fields(BaseInfo)),
    Recipe: ("rank",),
}


_SHOWN_ITEMS = 20  # of a list in a notebook, such as a curve of losses


def _html_value(value: Any) -> Any:
    """Return a part of a document as a number or a text for a cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_html_value(item)}" for key, item in value.items() if item not in (None, [], {}))
    if isinstance(value, list | tuple):
        more = [f"and {len(value) - _SHOWN_ITEMS:,} more"] if len(value) > _SHOWN_ITEMS else []
        return ", ".join([*(str(_html_value(item)) for item in value[:_SHOWN_ITEMS]), *more])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not is_dataclass(value):
        return value
    null = _NULLABLE_FIELDS.get(type(value), ())
    if isinstance(value, Recipe) and value.kind == "convert":
        null = (*null, "base")
    return {name: _plain(item) for name, item in _items(value) if item is not None or name in null}


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    return ((item.name, getattr(value, item.name)) for item in fields(value))


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: Any, value: Any) -> Any:
    """Return `value` as the type `kind`; None or empty if it has another type. In a list or a map, items that fit are kept."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:
        return next(
            (_build(member, value) for member in arguments if member is not types.NoneType and _fits(member, value)), None
        )
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value if _fits(arguments[0], item)) if _fits(kind, value) else ()
    if origin is Mapping:
        items = value.items() if _fits(kind, value) else ()
        return {key: _build(arguments[1], item) for key, item in items if _fits(arguments[1], item)}
    if is_dataclass(kind):
        table = value if isinstance(value, Mapping) else {}
        record_type: Any = kind
        return record_type(**{name: _build(hint, table.get(name)) for name, hint in _hints(record_type).items()})
    return value if _fits(kind, value) else kind()


def _fits(kind: Any, value: object) -> bool:
    """Return True if a JSON value has the outer type `kind`; as in JSON Schema, 8.0 is an integer, and true is not a number."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if origin is types.UnionType:
        return any(_fits(member, value) for member in typing.get_args(kind))
    if kind in (int, float):
        number = json_file.is_number(value)
        return number and (kind is float or float(typing.cast(float, value)).is_integer())
    if origin is Mapping or is_dataclass(kind):
        return isinstance(value, Mapping)
    return isinstance(value, list) if origin is tuple else isinstance(value, kind)
