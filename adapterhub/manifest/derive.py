"""Derivation of an `AdapterManifest` from an adapter's own files and from what its owner declares.

It is a pure function of a folder: no clock, host or tool version. Records that cannot be derived (a training, the parents of a
merge) are taken from the adapter.json in the folder, which is refused if it contradicts the files next to it. Shapes come from
the header of the weights, so that 200 MB of weights do not take 200 MB of memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import adapterhub_schemas
from adapterhub.digest import Digest, sha256_file
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import AdaLora, Adapter, Hadamard, Kronecker, Vera
from adapterhub_converters.adapter_files import ADAPTER_JSON, ADAPTER_TOML, determines_function, resolve_adapter
from adapterhub_converters.containers import json_file, toml_file
from adapterhub_converters.errors import IntegrityError, NotFoundError, NotUnderstoodError, UsageError
from adapterhub_converters.formats import adapter_claims, peft
from adapterhub_converters.formats.adapter_claims import AdapterClaims
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_dataclass import dataclass

from . import card as cards
from .base_name import base_name, public_repo
from .card import Card
from .document import OWNER, AdapterManifest, BaseInfo, FileEntry, ModuleShape, Parent, Recipe, Training
from .folder_contents import FolderContents, Inspection, read_folder
from .package_files import Listing
from .package_files import listing as package_listing

if TYPE_CHECKING:
    from adapterhub_converters.adapter import Delta
    from adapterhub_converters.bases import BaseSpec

Files = Mapping[str, tuple[Digest, int]]
"""Path to digest and size in bytes."""

# What adapter.toml may declare; everything else follows from the files.
_DECLARABLE = {
    "name", "description", "license", "task", "base", "training", "supplier", "contact", "released", "expires",
    "download_location", "intended_use", "limitations", "languages", "trigger_words", "tokenizer_digest",
    "chat_template_digest", "evaluations", "data_sources", "energy_kwh", "extensions",
}  # fmt: skip
_DECLARABLE_BASE = {"repo", "revision", "quantization"}
DERIVED = (
    "method", "r", "alpha", "rslora", "modules", "targets", "replaced", "dtype", "parameters", "format", "understood", "reason",
    "numbers",
)  # fmt: skip
"""Fields of a manifest that follow from the weights."""
WRONG_FACTS = "wrong-facts"
"""The code of the error for an adapter.json whose fields do not."""


def describe(
    folder: Path,
    *,
    base: BaseSpec | None = None,
    training: Training | None = None,
    parents: Sequence[Parent] = (),
    recipe: Recipe | None = None,
    declared: Mapping[str, Any] | None = None,
    files: Files | None = None,
    inspected: Inspection | None = None,
    card: Card | None = None,
) -> AdapterManifest:
    """Return the manifest of the adapter in `folder`, ignoring any adapter.json there.

    Args:
        folder: One adapter in any format that can be read.
        base: The base it was trained on, if available.
        training: The trainer's record.
        parents: The adapters it was made from.
        recipe: How it was made from them.
        declared: The content of adapter.toml; None to read that file.
        files: Digests and sizes of the folder's files, if the caller has them already.
        inspected: The result of `inspect_adapter`, likewise.
        card: The model card, likewise.

    Raises:
        UsageError: adapter.toml is malformed, or JSON cannot hold one of its values.
        FormatError: A declared value does not have the type that the schema requires.
    """
    if files is None:
        contents = read_folder(folder)
        files, card, inspected = contents.files, card or contents.card, inspected or inspect_contents(contents)
    card = card or cards.read(folder)
    adapter_format, adapter = (inspected or inspect_adapter(folder))[:2]
    manifest = AdapterManifest(
        name=None,
        base=_base(adapter, base, card),
        task=adapter.meta.task_type,
        **_weight_facts(adapter, adapter_format),
        files=_entries(files),
        training=training,
        parents=tuple(parents),
        recipe=recipe,
    )
    manifest = cards.with_card(manifest, card)
    return declare(manifest, read_declared(folder) if declared is None else declared, folder)


@dataclass(frozen=True)
class Draft:
    """The manifest of a folder before its files are hashed; everything else in the folder has been read once.

    Attributes:
        listing: The files that belong to the adapter.
        inspected: Its format and its adapter; the numbers in its tensors may be absent.
        recorded: The adapter.json in the folder, None if there is none; `text` is its text.
        declared: The content of adapter.toml.
        base: The base model to pin, if one was given. Recorded values take precedence over it.
        digests: Digests of files that were hashed on the way.
        card: The model card, whose values apply where nothing else declares them.
    """

    folder: Path
    listing: Listing
    inspected: Inspection
    recorded: AdapterManifest | None
    text: str
    declared: Mapping[str, Any]
    base: BaseSpec | None = None
    digests: Mapping[Path, Digest] = field(default_factory=dict)
    card: Card = field(default_factory=Card)

    def manifest(self, files: Files | None = None) -> AdapterManifest:
        """Return the manifest to publish.

        Args:
            files: Path to digest and size; None for a manifest that lists no files, which is enough to compare it with a
                policy.
        """
        files = {} if files is None else files
        if self.recorded is None:
            return describe(
                self.folder, base=self.base, declared=self.declared, files=files, inspected=self.inspected, card=self.card
            )
        manifest = dataclasses.replace(self.recorded, files=_entries(files))
        if self.base is not None:
            manifest = dataclasses.replace(
                manifest, base=manifest.base.filled_from(_base(self.inspected.adapter, self.base, self.card))
            )
        manifest = cards.with_card(manifest, self.card)
        return declare(manifest, self.declared, self.folder) if self.declared else manifest

    def finalize(self, files: Files) -> tuple[AdapterManifest, bytes]:
        """Return the manifest to publish, and the bytes of its document.

        These are the bytes of the adapter.json in the folder if it is complete. Files and declarations that it lacks are added,
        and the entries of edited files are updated.

        Raises:
            IntegrityError: The adapter.json contradicts the weights or the config: its records belong to another adapter.
        """
        if self.recorded is not None:
            _check_recorded(self.recorded, files, self.inspected, self.folder)
        manifest = self.manifest(files)
        if manifest == self.recorded:
            return manifest, self.text.encode()
        return manifest.renewed(), manifest.dump()


def draft(
    folder: Path,
    *,
    listing: Listing | None = None,
    inspected: Inspection | None = None,
    text: str | None = None,
    base: BaseSpec | None = None,
    digests: Mapping[Path, Digest] | None = None,
    card: Card | None = None,
) -> Draft:
    """Read a folder and return the draft of its manifest; every other argument is for a caller that has the part already.

    Args:
        folder: One adapter in any format that can be read.
        listing: The files that belong to the adapter.
        inspected: The result of `inspect_adapter`.
        text: The text of its adapter.json; empty to derive everything from the files, whatever an adapter.json there contains.
        base: The base model to pin.
        digests: Digests of files that were hashed already.
        card: The model card.
    """
    if listing is None or inspected is None or text is None or card is None:
        contents = read_folder(folder, hashes=False)
        listing, inspected = listing or contents.listing, inspected or inspect_contents(contents)
        text, card = contents.manifest_text if text is None else text, card or contents.card
    if text is None:
        text = json_file.read_text(folder / ADAPTER_JSON)
    recorded = AdapterManifest.parse(text, f"{folder}/{ADAPTER_JSON}") if text else None
    declared = read_declared(folder)
    return Draft(
        folder,
        listing,
        inspected,
        recorded,
        text,
        declared,
        base,
        digests or {},
        card,
    )


def draft_contents(contents: FolderContents, *, inspected: Inspection | None = None, base: BaseSpec | None = None) -> Draft:
    """Return the draft of a folder that was read; `inspected` and `base` are as in `draft`."""
    return draft(
        contents.folder,
        listing=contents.listing,
        inspected=inspected or inspect_contents(contents),
        text=contents.manifest_text,
        base=base,
        card=contents.card,
    )


def finalize(folder: Path, files: Files | None = None, inspected: Inspection | None = None) -> tuple[AdapterManifest, bytes]:
    """Return the manifest of a folder and the bytes of its document, as `Draft.finalize` does; hash the files unless given."""
    if files is not None:
        return draft(folder, inspected=inspected).finalize(files)
    contents = read_folder(folder)
    return draft_contents(contents, inspected=inspected).finalize(contents.files)


def _check_recorded(recorded: AdapterManifest, files: Files, inspected: Inspection, folder: Path) -> None:
    location = f"{folder}/{ADAPTER_JSON}"
    hint = "Delete adapter.json to derive it again, without its training record"
    # A card, a tokenizer or adapter.toml may be edited: their digests are updated.
    for entry in recorded.files:
        if determines_function(entry.path) and files.get(entry.path) != (entry.digest, entry.size):
            problem = "has other bytes than it records" if entry.path in files else "is missing, which it records"
            raise IntegrityError(location, f"{entry.path} {problem}", hint)
    check_facts(recorded, inspected, location, hint, folder=folder)


def check_facts(recorded: AdapterManifest, inspected: Inspection, location: str, hint: str = "", *, folder: Path) -> None:
    """Raise IntegrityError if an adapter.json contradicts the weights, which are in `folder`."""
    adapter_format, adapter = inspected[:2]
    if recorded.understood is False and isinstance(adapter, Adapter):
        # Recorded by a version that did not know the kind: it has what the config claims.
        adapter = adapter_claims.read(resolve_adapter(folder), NotUnderstoodError(location, ""))
    older_facts = _older_weight_facts(adapter) if isinstance(adapter, Adapter) else {}
    for key, value in _weight_facts(adapter, adapter_format).items():
        # The reason is worded by the version that wrote it.
        if key != "reason" and getattr(recorded, key) not in (value, older_facts.get(key, value)):
            problem = f'"{key}" is {_short(recorded.to_dict()[key])}, but the weights have {_short(value)}'
            raise IntegrityError(location, problem, hint, code=WRONG_FACTS)


def manifest_matching_weights(
    folder: Path, *, inspected: Inspection | None = None, location: str = ""
) -> AdapterManifest | None:
    """Return the adapter.json of a folder after comparing it with the headers of the weights; None if there is none.

    Raises:
        IntegrityError: It is not about these weights.
    """
    recorded = AdapterManifest.read(folder)
    if recorded is not None:
        check_facts_of_author(recorded, inspected or inspect_adapter(folder), location or str(folder), folder=folder)
    return recorded


def check_facts_of_author(recorded: AdapterManifest, inspected: Inspection, location: str, *, folder: Path) -> None:
    """Raise IntegrityError as `check_facts` does, with the hint for an adapter from somebody else."""
    check_facts(recorded, inspected, f"{location}: {ADAPTER_JSON}", "Get the adapter from its author again", folder=folder)


def _short(value: object) -> str:
    return json.dumps(value, default=dataclasses.asdict)[:60]


def digests(folder: Path, count_bytes: Callable[[int], object] | None = None) -> dict[str, tuple[Digest, int]]:
    """Return path to digest and size of the adapter's files, including adapter.json.

    Args:
        folder: The adapter's own folder.
        count_bytes: Called with the number of bytes read since the last call.
    """
    return {
        path: (sha256_file(folder / path, count_bytes), (folder / path).stat().st_size)
        for path in package_listing(folder).files
    }


def sizes(folder: Path) -> dict[str, int]:
    """Return path to size of the adapter's files, without reading them."""
    return {path: (folder / path).stat().st_size for path in package_listing(folder).files}


def _entries(files: Files) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path, *entry) for path, entry in sorted(files.items()) if path != ADAPTER_JSON)


# ---- derived from the weights


def inspect_contents(contents: FolderContents) -> Inspection:
    """Return what `inspect_adapter` does, without opening a PEFT adapter's files again."""
    return inspect_adapter(contents.folder, contents)


def inspect_adapter(folder: Path, contents: FolderContents | None = None) -> Inspection:
    """Return the format and the adapter of a folder; of a PEFT folder only the shapes, without the numbers in its tensors."""
    try:
        return _read_known_format(folder, contents)
    except NotUnderstoodError as error:
        # An unknown kind can still be packaged, described by what its config claims.
        adapter = adapter_claims.read(resolve_adapter(folder), error)
        return Inspection(adapter.format, adapter)


def _read_known_format(folder: Path, contents: FolderContents | None) -> Inspection:
    candidate = Candidate(folder, config=contents.texts.get(peft.CONFIG) if contents else None)
    if contents is not None and peft.sniff(candidate):
        weights = peft.weight_files(folder)
        if contents.headers.keys() >= set(weights):
            headers = {path: contents.headers[path] for path in weights}
            return Inspection("peft", peft.parse_shapes(contents.texts[peft.CONFIG], headers, location=str(folder)))
    if peft.sniff(candidate):
        return Inspection("peft", peft.read_shapes(candidate))
    from adapterhub_converters.formats import convert  # late: a PEFT adapter needs no other reader

    candidate = candidate.adapter
    return Inspection(convert.sniff(candidate), *convert.read_unordered(candidate))  # no fact depends on the order of rows


def _weight_facts(adapter: Adapter | AdapterClaims, adapter_format: str) -> dict[str, Any]:
    """Return the fields listed in DERIVED, by name."""
    if isinstance(adapter, AdapterClaims):
        return _claims(adapter)
    names = {dtypes.name_of(dtype) for dtype in {tensor.dtype for tensor, _ in adapter.counted_tensors()}}
    shapes = {id(delta): _shape(delta) for delta, _ in adapter.distinct_deltas}
    return {
        "method": _method(adapter),
        **_ranks({target: shapes[id(delta)] for target, delta in adapter.deltas.items()}),
        "rslora": any(delta.rslora for delta, _ in adapter.distinct_deltas),
        "targets": tuple(sorted({_last_name(target) for target in (*adapter.deltas, *adapter.tuned)})),
        "replaced": tuple(sorted([*adapter.replaced, *adapter.rows, *adapter.copies, *adapter.added])),
        "dtype": names.pop() if len(names) == 1 else "mixed",
        "parameters": adapter.parameters,
        "format": adapter_format,
        "understood": None,
        "reason": None,
        "numbers": dict(adapter.meta.numbers) or None,
    }


def _claims(adapter: AdapterClaims) -> dict[str, Any]:
    """Return the fields listed in DERIVED for an adapter that is not understood: what its config claims."""
    return {
        "method": adapter.method,
        "r": adapter.r,
        "alpha": None if adapter.alpha is None else _number(adapter.alpha),
        "rslora": False,
        "modules": {},
        "targets": adapter.targets,
        "replaced": (),
        "dtype": adapter.dtype,
        "parameters": adapter.parameters,
        "format": adapter.format,
        "understood": False,
        "reason": adapter.reason,
        "numbers": None,
    }


# The methods that are named after a kind of delta.
_METHODS: Mapping[type, str] = {AdaLora: "adalora", Hadamard: "loha", Kronecker: "lokr", Vera: "vera"}


def _method(adapter: Adapter) -> str:
    """Return `lora`, `dora`, `full` without a delta, or the name of another kind if all deltas are of that kind."""
    if adapter.meta.method:
        return adapter.meta.method
    kinds = {_METHODS.get(type(delta), "") for delta, _ in adapter.distinct_deltas}
    if len(kinds) == 1 and (name := kinds.pop()):
        return name
    dora = any(getattr(delta, "magnitude", None) is not None for delta, _ in adapter.distinct_deltas)
    return "dora" if dora else "lora" if adapter.deltas else "full"


def _last_name(target: str) -> str:
    """Return the last component of a path, with the one before it if it is a number: `to_out.0`."""
    prefix, _, last = target.rpartition(".")
    return f"{prefix.rpartition('.')[2]}.{last}" if last.isdecimal() else last


def _older_weight_facts(adapter: Adapter) -> dict[str, Any]:
    """Return what older versions recorded: they took every delta for LoRA, and a number for the name of a module."""
    targets = tuple(sorted({target.rpartition(".")[2] for target in adapter.deltas}))
    if not any(type(delta) in _METHODS for delta in adapter.deltas.values()):
        return {"targets": targets}
    return {
        "method": "lora",
        "targets": targets,
        **_ranks({target: (delta.r, delta.alpha) for target, delta in adapter.deltas.items()}),
    }


def _shape(delta: Delta) -> tuple[int | None, float | None]:
    """Return rank and alpha of a module: LoKr has neither if both its matrices are full, and VeRA always scales by 1."""
    if isinstance(delta, Kronecker):
        return (delta.rank, delta.alpha) if delta.rank else (None, None)
    return delta.r, None if isinstance(delta, Vera) else delta.alpha


def _ranks(shapes: Mapping[str, tuple[int | None, float | None]]) -> dict[str, Any]:
    """Return the rank and alpha of most modules (of two equally common pairs, the larger), and the modules that differ."""
    counts = Counter(shapes.values())
    # Ties are broken by value, so that the result does not depend on the order of the modules.
    shared = max(counts, key=lambda pair: (counts[pair], pair[0] or 0, pair[1] or 0), default=(None, None))
    r, alpha = shared
    modules = {
        target: ModuleShape(r_of_module, _number(alpha_of_module or 0))
        for target, (r_of_module, alpha_of_module) in sorted(item for item in shapes.items() if item[1] != shared)
        if r_of_module is not None
    }
    return {"r": r, "alpha": None if alpha is None else _number(alpha), "modules": modules}


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


# ---- recorded and declared


def _base(adapter: Adapter | AdapterClaims, spec: BaseSpec | None, card: Card) -> BaseInfo:
    """Return the base: its name by the adapter's config, else by its card, else by the base's own record."""
    repo = base_name(configured=adapter.meta.base_model, in_card=cards.base_repo(card), of_base=spec.repo if spec else None)
    # A commit belongs to one repository: it is not recorded for a model with another name.
    revision = adapter.meta.revision or (spec.revision if spec and spec.repo == repo else None)
    if spec is None:
        return BaseInfo(repo, revision, model_type=adapter.meta.family or None)
    return BaseInfo(
        repo=repo,
        revision=revision,
        architecture=spec.architecture or None,
        model_type=spec.model_type or adapter.meta.family or None,
        fingerprint=spec.fingerprint,
        tokenizer_digest=spec.tokenizer_digest,
        chat_template_digest=spec.chat_template_digest,
        quantization=spec.quantization,
        config=dict(spec.config),
    )


def read_declared(folder: Path) -> dict[str, Any]:
    """Return the content of adapter.toml; empty without one."""
    location = f"{folder}/{ADAPTER_TOML}"
    try:
        return toml_file.parse(json_file.read_text(folder / ADAPTER_TOML), location)
    except NotFoundError:
        return {}


def declare(manifest: AdapterManifest, declared: Mapping[str, Any], folder: Path) -> AdapterManifest:
    """Return the manifest with declared values in place of derived or recorded ones, checked against the schema.

    Raises:
        UsageError: A key cannot be declared.
        FormatError: A value is not what the schema requires.
    """
    location = f"{folder}/{ADAPTER_TOML}"
    training_keys = set(adapterhub_schemas.load("adapter")["properties"]["training"]["properties"]) - {"recorder"}
    _check_keys(declared, _DECLARABLE, "", location)
    base, training = declared.get("base", {}), declared.get("training", {})
    for name, table, allowed_keys in (("base", base, _DECLARABLE_BASE), ("training", training, training_keys)):
        if not isinstance(table, Mapping):
            raise UsageError(location, f"{name} is not a table", f"Write it as [{name}]", code="invalid-config")
        _check_keys(table, allowed_keys, f"{name}.", location)
    # Declared values pass through the document, so that the schema checks them as it checks all others. The files do not: they
    # are derived, cannot be declared, and may be ten thousand.
    document = dataclasses.replace(manifest, files=()).to_dict()
    document |= {key: _json(value) for key, value in declared.items() if key not in ("base", "training")}
    document["base"] |= base
    if training:
        recorded = document["training"] or {}
        record = _json({**recorded, **training})
        # Once a part of it is declared otherwise, nobody but the owner vouches for the whole.
        document["training"] = record if record == recorded else {**record, "recorder": OWNER}
    repo = document["base"]["repo"]
    if "repo" in base and not (isinstance(repo, str) and public_repo(repo)):
        problem = f"base.repo is {json.dumps(_json(repo))[:100]}, which is no name on a hub: others do not have a path"
        raise UsageError(location, problem, "Write it as organization/name", code="invalid-config")
    checked = AdapterManifest.from_dict(document, location if declared else f"{folder}/{ADAPTER_JSON}")
    return dataclasses.replace(checked, files=manifest.files, version=manifest.version)


def _check_keys(table: Mapping[str, Any], allowed_keys: set[str], prefix: str, location: str) -> None:
    for key in sorted(set(table) - allowed_keys):
        close = difflib.get_close_matches(key, allowed_keys, 1, 0.5)
        hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known keys: {', '.join(sorted(allowed_keys))}"
        raise UsageError(location, f"unknown key {prefix}{key[:80]}", hint, code="invalid-config")


def _json(value: Any) -> Any:
    """Return TOML values as JSON has them: times become text, in UTC if they have an offset."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, datetime.datetime) and value.tzinfo:
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value
