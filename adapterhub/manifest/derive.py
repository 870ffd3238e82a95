"""Derivation of an `AdapterManifest` from an adapter's own files and from what its owner declares.

It is a pure function of a folder: no clock, host or tool version. Records that cannot be derived (a training, the parents of a
merge) are taken from the adapter.json in the folder, which is refused if it contradicts the files next to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, sha256_file
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.adapter_files import ADAPTER_JSON, determines_function
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import IntegrityError
from adapterhub_converters.formats.adapter_claims import AdapterClaims
from adapterhub_converters.lazy_dataclass import dataclass

from . import card as cards
from .base_name import base_name
from .card import Card
from .declarations import declare, read_declared
from .document import AdapterManifest, BaseInfo, FileEntry, Parent, Recipe, Training
from .folder_contents import FolderContents, Inspection, read_folder
from .package_files import TRAINER_STATE, Listing
from .package_files import listing as package_listing
from .weight_facts import check_facts, inspect_adapter, inspect_contents, weight_facts

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

Files = Mapping[str, tuple[Digest, int]]
"""Path to digest and size in bytes."""


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
        training: The trainer's record; None for what another tool left in the folder, if that is to be read.
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
        training = training or _imported_training(folder, contents.listing, card)
    card = card or cards.read(folder)
    adapter_format, adapter = (inspected or inspect_adapter(folder))[:2]
    manifest = AdapterManifest(
        name=None,
        base=_base(adapter, base, card),
        task=adapter.meta.task_type,
        **weight_facts(adapter, adapter_format),
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

    def base_repo(self) -> str | None:
        """Return the name of the base that `manifest` would record, without deriving the rest."""
        declared = self.declared.get("base")
        return base_name(
            declared=declared.get("repo") if isinstance(declared, Mapping) else None,
            recorded=self.recorded.base.repo if self.recorded else None,
            configured=self.inspected.adapter.meta.base_model,
            in_card=cards.base_repo(self.card),
            of_base=self.base.repo if self.base else None,
        )

    def manifest(self, files: Files | None = None) -> AdapterManifest:
        """Return the manifest to publish.

        Args:
            files: Path to digest and size; None for a manifest that lists no files, which is enough to compare it with a
                policy.
        """
        files = {} if files is None else files
        if self.recorded is None:
            return describe(
                self.folder, base=self.base, declared=self.declared, files=files, inspected=self.inspected, card=self.card,
                training=_imported_training(self.folder, self.listing, self.card),
            )  # fmt: skip
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


def _imported_training(folder: Path, listing: Listing, card: Card) -> Training | None:
    """Return the record that another tool left in a folder; None if there is none."""
    if TRAINER_STATE not in listing.files:
        return None
    from . import imported_training  # late: few folders have one

    return imported_training.read(folder, card)


def _entries(files: Files) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path, *entry) for path, entry in sorted(files.items()) if path != ADAPTER_JSON)


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
