"""`AdapterManifest`: adapter.json as a typed value, read, checked and written, across the versions of its schema.

There are two ways to read one. `AdapterManifest.parse` checks the text against the JSON Schema and refuses what does not fit.
`AdapterManifest.salvage` takes the fields that fit from an unchecked document, so that a version that was copied from elsewhere
can be listed.

Field names are those of the schema (`schemas/adapterhub_schemas/adapter.schema.json`), which explains each.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import adapterhub_schemas
from adapterhub.digest import Digest
from adapterhub_converters import display
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import canonical_json, record_json, schema_versions

TRAINER, OWNER = "trainer", "owner"


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
class KeptCheckpoint:
    """The state of a training after `step` steps: the digest and the size, in bytes, of a file that was kept."""

    step: int
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Training:
    """The record of a training; a field is None if it was not recorded.

    `recorder` says who vouches for all of it: `TRAINER`, `OWNER`, or the name of an importing tool.
    """

    config: Mapping[str, Any] | None = None
    data: tuple[TrainingData, ...] | None = None
    weights: tuple[FileEntry, ...] | None = None
    seed: int | None = None
    versions: Mapping[str, str] | None = None
    metrics: Mapping[str, Any] | None = None
    curve: tuple[LossPoint, ...] | None = None
    checkpoints: tuple[KeptCheckpoint, ...] | None = None
    created: str | None = None
    recorder: str | None = None


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

    The document always has `rank`, which may be null.
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


@dataclass(frozen=True, slots=True)
class DeclaredEvaluation:
    """One declared result of an evaluation; `digest` is of the data's bytes, and `recorder` is who says so."""

    metric: str
    value: float
    dataset: str | None = None
    split: str | None = None
    digest: Digest | None = None
    harness: str | None = None
    recorder: str | None = None


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where data of the fine-tuning came from; days are ISO 8601."""

    kind: str
    name: str | None = None
    address: str | None = None
    license: str | None = None
    collected_from: str | None = None
    collected_until: str | None = None
    rights_reserved: str | None = None
    personal_data: bool | None = None


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
        supplier: The person or organization that publishes it; `contact` is an address to write to.
        released: The day of its release, and `expires`, the first on which it is not to be used any longer; ISO 8601.
        download_location: A URI.
        intended_use: What it is for, and `limitations`, what it is not for.
        languages: BCP 47 tags.
        trigger_words: Words in a prompt that it was trained to react to.
        tokenizer_digest: Of the tokenizer.json that it needs instead of its base's.
        chat_template_digest: Of the exact text of the chat template that it needs instead of its base's.
        evaluations: Declared results.
        data_sources: Where the data of the fine-tuning came from.
        energy_kwh: Of the training.
        extensions: What others record, by reversed names of domains.
        version: The version of the document that it was read from. The digest of the adapter is derived by that version's rule.
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
    supplier: str | None = None
    contact: str | None = None
    released: str | None = None
    expires: str | None = None
    download_location: str | None = None
    intended_use: str | None = None
    limitations: str | None = None
    languages: tuple[str, ...] | None = None
    trigger_words: tuple[str, ...] | None = None
    tokenizer_digest: Digest | None = None
    chat_template_digest: Digest | None = None
    evaluations: tuple[DeclaredEvaluation, ...] | None = None
    data_sources: tuple[DataSource, ...] | None = None
    energy_kwh: float | None = None
    extensions: Mapping[str, Any] | None = None
    version: str = field(default=schema_versions.CURRENT, compare=False)

    # ---- reading

    @classmethod
    def parse(cls, text: str | bytes, location: str) -> AdapterManifest:
        """Return the manifest in the text of an adapter.json.

        Raises:
            FormatError: It is not JSON, or does not fit the schema; the message names the first field that does not.
            RefusedError: A newer adapterhub wrote it.
        """
        try:
            return cls.from_dict(json_file.parse_object(text, location), location)
        except UsageError as error:  # of a value that JSON holds, and not exactly
            raise FormatError(location, error.what, error.hint) from error

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], location: str) -> AdapterManifest:
        """Return the manifest in a JSON object, checked as by `parse`; UsageError for values that JSON cannot hold."""
        schema_versions.check(document, location)
        upgraded = schema_versions.upgrade(document)
        # Only for its error: a document built in Python may have NaN or an object in it. Drafts may have any integer.
        if schema_versions.version_of(document) not in schema_versions.DRAFTS:
            _dump(document)
        _check(upgraded, location)
        return cls._build(upgraded, document)

    @classmethod
    def salvage(cls, document: Mapping[str, Any]) -> AdapterManifest:
        """Return the usable part of a document that was never checked.

        A field that is missing or has the wrong type is None, or empty if it cannot be None. Digests, names and numbers are not
        checked, so no value may be used as a path.
        """
        return cls._build(schema_versions.upgrade(document), document)

    @classmethod
    def _build(cls, upgraded: Mapping[str, Any], document: Mapping[str, Any]) -> AdapterManifest:
        version = schema_versions.version_of(document)
        return typing.cast(AdapterManifest, record_json.build(cls, {**upgraded, "version": version}))

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
        document = record_json.plain(self, _NULLABLE_FIELDS)
        del document["version"]
        return {"$schema": schema_versions.SCHEMA_ID, "schema_version": schema_versions.CURRENT, **document}

    def dump(self) -> bytes:
        """Return the bytes of the document in its canonical form and the current version; the errors are those of `renewed`."""
        return _dump(self.renewed().to_dict())

    def renewed(self) -> AdapterManifest:
        """Return the manifest as one of the current version, which `dump` writes.

        Raises RefusedError if a newer adapterhub wrote it: its fields that are not known here would be lost.
        """
        if schema_versions.is_newer_minor(self.version):
            problem = (
                f"schema_version {self.version} is newer than the {schema_versions.CURRENT} written here, which would lose"
            )
            raise RefusedError(ADAPTER_JSON, f"{problem} fields of it", "Upgrade adapterhub", code="newer-version")
        return dataclasses.replace(self, version=schema_versions.CURRENT)

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
        rows = [(key, display.cell_value(value)) for key, value in document.items() if value not in (None, [], {})]
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


def _dump(document: Mapping[str, Any]) -> bytes:
    try:
        return canonical_json.indented(document)
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


# As in `record_json`; every other field without a value is absent.
_NULLABLE_FIELDS: Mapping[type, tuple[str, ...]] = {
    AdapterManifest: ("name", "task", "r", "alpha", "license", "description", "training"),
    BaseInfo: tuple(item.name for item in fields(BaseInfo)),
    Recipe: ("rank",),
}
