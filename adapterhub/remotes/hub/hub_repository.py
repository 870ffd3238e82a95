"""An adapter in a plain repository on a hub, `hf://org/name`.

The repository holds what peft, transformers and vLLM load: the files of the adapter, its adapter.json, a README.md. The
manifest is not stored but rebuilt from adapter.json, so a version has the same digest as everywhere else. A version is one
commit: everything is read from the commit that was resolved first, and pushing a version moves a branch.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterhub.bases.hub_address import MAIN, Hub
from adapterhub.digest import Digest, is_hex, sha256_bytes
from adapterhub.http.boundary import is_loopback
from adapterhub.http.client import PAUSES
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import MAX_MANIFEST, Descriptor, Manifest
from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.remotes.download import ResumingReader, check_range, read_blob
from adapterhub.remotes.protocol import OpenRemote, PutResult, Reader, Source, check_complete
from adapterhub.trust.bundle import MAX_BUNDLE
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    UsageError,
)

from . import hub_files
from .hub_client import COMMAND_BOUNDS, COMMIT, Bounds, HubAddress, HubClient, Listing, Refs
from .hub_versions import MAX_ADAPTER_JSON, Versions

if TYPE_CHECKING:
    from adapterhub.remotes.oci.oci_repository import OciRepository
    from adapterhub.remotes.remote_address import UserSettings

    from .hub_registry import HubRegistry
    from .hub_writer import HubWriter

_SMALL = 1 << 20  # bytes; a larger file is sent before the commit, a smaller one in it
_MAX_HELD = 64 << 20  # bytes of small files that are held for the commit


def parse(text: str) -> HubAddress:
    """Parse the address of a repository on a hub, with or without a version."""
    return HubAddress.parse(text)


def connect(address: HubAddress, surroundings: UserSettings) -> HubRepository:
    """Open a repository with the user's token for its hub: HF_TOKEN for the hub of HF_ENDPOINT, else a stored login."""
    hub = hub_for(address, surroundings)
    return HubRepository(address, hub.endpoint, hub.checked_token(), proxy=hub.proxy)


def hub_for(address: HubAddress, surroundings: UserSettings) -> Hub:
    """Return the hub of an address, with the token for it."""
    hub = surroundings.hub()
    endpoint = address.endpoint or hub.endpoint
    at_home = origin(endpoint, address.repository, is_user_input=True) == origin(hub.endpoint, hub.endpoint, is_user_input=True)
    # An address that names the user's own hub in full gets the token of HF_TOKEN too.
    if at_home and (hub.token or not address.endpoint):
        return hub
    scheme, host, _ = origin(endpoint, address.repository, is_user_input=True)
    return Hub(endpoint, surroundings.login(address.host, scheme == "http" and not is_loopback(host)), hub.proxy)


class HubRepository(OpenRemote):
    """One repository on a hub, to be closed after use.

    Attributes:
        private: Create the repository as private, if it has to be created.
    """

    kind = "a hub"

    def __init__(
        self,
        address: HubAddress,
        endpoint: str,
        token: str | None = None,
        *,
        pauses: Sequence[float] = PAUSES,
        proxy: ProxyOf = no_proxy,
        bounds: Bounds = COMMAND_BOUNDS,
    ) -> None:
        super().__init__()
        self.address = address
        self.private = False
        self._message = ""
        self._client = HubClient(endpoint, address.name, self.location, token, pauses, proxy, address.login, bounds)
        self._pauses = pauses
        self._lock = threading.RLock()  # several blobs are put at once
        self._versions = Versions(self._client, address, self.notes)
        self._refs: Refs | None = None
        self._has_looked = False

    @property
    def location(self) -> str:
        """The address without a version."""
        return self.address.repository

    @cached_property
    def _writer(self) -> HubWriter:
        from .hub_writer import HubWriter

        return HubWriter(self._client)

    @cached_property
    def _registry(self) -> HubRegistry | None:
        """The registry in a hub of ours; None on other hubs, where a version is a commit."""
        from .hub_registry import HubRegistry

        registry = HubRegistry.find(self.address, self._client)
        if registry and self.private:
            # Before anything else makes the repository, which would be with the hub's default visibility.
            self._ensure_repository()
        return registry

    def _own_registry(self) -> HubRegistry | None:
        """Do as `_registry`, for several threads."""
        with self._lock:
            return self._registry

    def close(self) -> None:
        """Close the connections."""
        if registry := vars(self).get("_registry"):
            registry.close()
        self._client.wire.close()

    def stop(self, *, on: bool = True) -> None:
        """Make waiting threads fail at once, until called again with `on` False."""
        self._client.wire.stop(on=on)
        if registry := vars(self).get("_registry"):
            registry.stop(on=on)

    def make_private(self) -> None:
        """Create the repository as private, if it has to be created."""
        self.private = True

    def annotate(self, message: str) -> None:
        """Record a message as the description of the commit, or in the log of a hub of ours."""
        self._message = message

    def expect(self, digest: str) -> None:
        """Write the tag only if it is at this digest; other hubs than ours cannot."""
        if (registry := self._own_registry()) is None:
            super().expect(digest)
        else:
            registry.expected_digest = digest

    def record_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record results of other programs with the version; other hubs than ours cannot."""
        if (registry := self._own_registry()) is None:
            super().record_metrics(metrics)
        else:
            registry.metrics = metrics

    def tag_too(self, tags: Sequence[str]) -> bool:
        """Point more tags at the version, together with the one of the address; other hubs than ours cannot."""
        if not tags or (registry := self._own_registry()) is None:
            return not tags
        registry.extra_tags = tuple(tags)
        return True

    def check_push(self, manifest: Manifest | None, tag: str | None) -> bool:
        """Ask a hub of ours, before bytes are sent, whether it would refuse a version and its tags; return whether it says."""
        registry = self._own_registry()
        return registry is not None and registry.check_push(manifest, tag)

    def as_referring_target(self) -> OciRepository | None:
        """Return the repository as one of an OCI registry, which only a hub of ours is too."""
        registry = self._own_registry()
        return registry.oci if registry else None

    def file_signature(self, digest: Digest) -> bytes | None:
        """Return the `model.sig` in the commit of a version, where model_signing puts it; a hub of ours attaches it instead."""
        if self._own_registry() is not None:
            return None
        listing = self._versions.find(digest).listing
        entry = listing.files.get(SIGNATURE)
        if entry is None or (entry.size or 0) > MAX_BUNDLE:
            return None
        return self._versions.read_small_file(listing, SIGNATURE, MAX_BUNDLE + 1)

    def put_file_signature(self, manifest: Manifest, raw: bytes) -> bool:
        """Commit `model.sig` to the branch at the address if that is at the version, whose digest stays the same."""
        branch = self.address.reference
        if self._own_registry() is not None or branch not in self._client.refs().branches:
            return False
        listing = self._client.listing(branch)
        if self._versions.version_at(listing).manifest.digest != manifest.digest:
            return False
        if not hub_files.matches_entry(listing.files.get(SIGNATURE), raw):
            changes = {SIGNATURE: raw}
            self.commit_id = self._writer.create_commit(branch, listing.commit, f"Signature of {manifest.digest}", changes)
        if hub_files.CARD in listing.files:
            card = self._client.read_small_file(listing.commit, hub_files.CARD, 2 * hub_files.MAX_CARD)
            if sha256_bytes(card) not in [layer.digest for layer in manifest.layers if layer.path == hub_files.CARD]:
                problem = "is completed on the hub, so that other programs find it changed since it was signed"
                self.notes.append(f"{hub_files.CARD} {problem}")
        return True

    def untag(self, tag: str) -> None:
        """Remove a tag from a hub of ours."""
        if (registry := self._own_registry()) is None:
            super().untag(tag)
        else:
            registry.untag(tag)

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """Return the manifest of a branch, tag, commit, range or digest; without adapter.json, one of the files as they are."""
        version = self._versions.find(reference)
        self.commit_id = version.listing.commit
        return version.manifest

    def resolve(self, reference: str) -> Digest:
        """Return the digest of what a reference names now; from a hub of ours by one request, which counts as no download."""
        # Versions that were read before would answer for the hub.
        return Versions(self._client, self.address, []).resolve(reference)

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a file for reading from `start` on; a completed README reads as the adapter's own."""
        data = self._versions.content.get(blob.digest)
        if data is None:
            if blob.digest not in self._versions.places:
                raise NotFoundError(self.location, f"no file with the digest {blob.digest}")
            commit, path = self._versions.places[blob.digest]
            if path == hub_files.CARD and blob.size <= hub_files.MAX_CARD:
                data = self._read_readme(commit, blob)
        if data is not None or start >= blob.size:
            yield io.BytesIO((data or b"")[start:])
            return
        label = f"{self.location}: {path}"
        with self._client.open_file(commit, path, start) as body:
            check_range(body, blob, start, label)
            yield body

    def _read_readme(self, commit: str, blob: Descriptor) -> bytes:
        """Return the adapter's README: the file on the hub, or that file without what `complete_card` added."""
        card = self._client.read_small_file(commit, hub_files.CARD, 2 * hub_files.MAX_CARD)
        for data in (card, hub_files.original_readme(card)):
            if sha256_bytes(data) == blob.digest:
                self._versions.content[blob.digest] = data
                return data
        problem = f"has changed on the hub since {ADAPTER_JSON} was written"
        hint = "Push the adapter again, or make the same change in it"
        raise IntegrityError(f"{self.location}: {hub_files.CARD}", problem, hint)

    def tags(self) -> list[str]:
        """Return all branches and tags, sorted."""
        refs = self._client.refs()
        self.commits = {**refs.tags, **refs.branches}
        return sorted(self.commits)

    def open_digest(self, digest: Digest) -> Any:
        """Open a blob or manifest by digest as an unbuffered file of unverified bytes; None if absent."""
        self._read_current()
        for version in self._versions:
            if version.manifest.digest == digest:
                return io.BytesIO(version.manifest.raw)
            for blob in (*version.manifest.layers, version.manifest.config):
                if blob.digest == digest:
                    return ResumingReader(self, blob, pauses=self._pauses)
        return None

    def _read_current(self) -> None:
        """Read the version at the address, or at `main` if the address has none yet; once."""
        if self._has_looked:
            return
        self._has_looked = True
        for reference in dict.fromkeys((self.address.reference, MAIN)):
            # A push may replace whatever is there, so a damaged version is no error here.
            with contextlib.suppress(NotFoundError, IntegrityError, RefusedError):
                listing = self._client.listing(reference)
                for path, entry in listing.files.items():
                    if entry.digest:
                        self._versions.places[entry.digest] = listing.commit, path
                        self._versions.large.add(entry.digest)
                if ADAPTER_JSON in listing.files:
                    self._versions.version_at(listing)
                return

    # ---- writing

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether a blob needs no upload: the hub has it as a large file, or its verified bytes are on either side."""
        if registry := self._own_registry():
            return registry.has_blob(blob)
        with self._lock:
            self._read_current()
            if blob.digest in self._versions.large or blob.digest in self._versions.content:
                return True
            if blob.digest not in self._versions.places or blob.size > _SMALL:
                return False
            try:
                self._read_small(blob)
            except (IntegrityError, NotFoundError):
                return False
            return True

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Upload a large file; hold a small one, to be sent with the commit. Return the number of bytes sent or held."""
        if registry := self._own_registry():
            return registry.put_blob(blob, source)
        with self._lock:
            large = self._is_large(blob)
            if large:
                self._ensure_repository()
                writer = self._writer
        if large:
            # Upload outside the lock: several large files are sent at the same time.
            sent = writer.upload(blob, source)
            self._versions.large.add(blob.digest)
            return sent
        data = read_blob(source, blob, pauses=self._pauses)
        with self._lock:
            self._versions.content[blob.digest] = data
        return blob.size

    def _is_large(self, blob: Descriptor) -> bool:
        """Return whether a file is uploaded before the commit rather than sent in it."""
        if not blob.size:
            return False
        # The files that are read whole anyway have limits of their own; the others also count toward the memory for held files.
        limit = {ADAPTER_JSON: MAX_ADAPTER_JSON, hub_files.CARD: hub_files.MAX_CARD, "": MAX_MANIFEST}.get(blob.path, _SMALL)
        held_bytes = sum(map(len, self._versions.content.values()))
        return is_weights(blob.path) or blob.size > limit or (held_bytes + blob.size > _MAX_HELD and limit == _SMALL)

    def _read_small(self, blob: Descriptor) -> bytes:
        """Return the bytes of a small file."""
        if blob.digest not in self._versions.content:
            self._versions.content[blob.digest] = read_blob(self, blob, pauses=self._pauses)
        return self._versions.content[blob.digest]

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        """Point a branch at a version, by one commit on top of the one that was read; a new branch starts at `main`.

        A hub of ours gets a version and a tag.

        Raises:
            ConflictError: Somebody else committed in the meantime.
            RefusedError: The manifest cannot be rebuilt from the files, or `tag` is a tag, which does not move.
        """
        if registry := self._own_registry():
            return registry.put_manifest(manifest, tag, self._message)
        adapter_manifest = self._adapter_manifest(manifest)
        branch = tag or MAIN
        if is_hex(branch, COMMIT):
            raise UsageError(self.address.with_reference(branch), "a commit cannot be pushed to", "Push to a branch")
        self._refs = None
        refs = self._ensure_repository()
        if branch in refs.tags and branch not in refs.branches:
            self._check_tag(branch, manifest)
            return PutResult(new=False, moved=False)
        is_new_branch = branch not in refs.branches and not branch.startswith("refs/")
        start, changes = self._parent_and_changes(branch, manifest, adapter_manifest, is_new_branch=is_new_branch)
        if changes and SIGNATURE in start.files:
            changes[SIGNATURE] = None  # it is about the files that were there
        # The branch must exist before the commit, and must not stay behind if the commit fails.
        if is_new_branch:
            self._create_branch(branch, start.commit)
        try:
            self.commit_id = self._commit(branch, start, manifest, adapter_manifest, changes) if changes else start.commit
        except BaseException:
            if is_new_branch:
                self._delete_branch(branch, start.commit)
            raise
        return PutResult(new=bool(changes), moved=is_new_branch or bool(changes))

    def _create_branch(self, name: str, commit: str) -> None:
        """Create a branch at a commit; it may exist there already if an answer was lost."""
        try:
            self._writer.create_branch(name, commit)
        except ConflictError:
            if self._client.refs().branches.get(name) != commit:
                raise

    def _delete_branch(self, name: str, commit: str) -> None:
        """Delete a branch, unless somebody has committed to it."""
        with contextlib.suppress(AdapterhubError):
            if self._client.refs().branches.get(name) == commit:
                self._writer.delete_branch(name)

    def _adapter_manifest(self, manifest: Manifest) -> AdapterManifest:
        """Return the adapter.json of a version, whose files must all be here and which must give the same OCI manifest again.

        Raises:
            RefusedError: The version has no adapter.json, or its manifest cannot be rebuilt from its files.
        """
        check_complete(manifest.layers, self.has_blob, self.location)
        if manifest.adapter_json is None:
            raise RefusedError(self.location, f"it has no {ADAPTER_JSON}", "Pull it into a folder, then push the folder")
        raw = self._read_small(manifest.adapter_json)
        if hub_files.assemble_manifest(raw, f"{self.location}: {ADAPTER_JSON}").digest != manifest.digest:
            problem = "its manifest cannot be rebuilt from its files, and a hub keeps only files"
            raise RefusedError(self.location, problem, "Pull it into a folder, then push the folder")
        return AdapterManifest.parse(raw, self.location)

    def _ensure_repository(self) -> Refs:
        """Return the refs of the repository, which is created if it does not exist."""
        if self._refs is None:
            try:
                self._refs = self._client.refs()
            except NotFoundError:
                if self._writer.create(private=self.private):
                    readers = "private" if self.private else "with the hub's default visibility"
                    self.notes.append(f"created the repository {self.location}, {readers}")
                self._refs = self._client.refs()
        return self._refs

    def _check_tag(self, tag: str, manifest: Manifest) -> None:
        """Raise a RefusedError unless a tag on the hub is at this version already."""
        version = self._versions.version_at(self._client.listing(tag))
        if version.manifest.digest != manifest.digest:
            hint = "Push to a branch, or remove the tag on the hub"
            raise RefusedError(self.address.with_reference(tag), "is a tag, which does not move", hint)
        self.commit_id = version.listing.commit

    def _parent_and_changes(
        self, branch: str, manifest: Manifest, adapter_manifest: AdapterManifest, *, is_new_branch: bool
    ) -> tuple[Listing, _Changes]:
        """Return the parent commit and the changes to it. A new branch starts at a commit that already has the version."""
        if is_new_branch:
            for version in self._versions:
                if version.manifest.digest == manifest.digest and not self._changes(
                    version.listing, manifest, adapter_manifest
                ):
                    return version.listing, {}
        start = self._client.listing(MAIN if is_new_branch else branch)
        return start, self._changes(start, manifest, adapter_manifest)

    def _changes(self, listing: Listing, manifest: Manifest, adapter_manifest: AdapterManifest) -> _Changes:
        """Return the differences between a commit and a version, as `HubWriter.commit` takes them."""
        changes: _Changes = {}
        for layer in manifest.layers:
            entry = listing.files.get(layer.path)
            if layer.digest in self._versions.large:
                if entry is None or entry.digest != layer.digest:
                    changes[layer.path] = layer
                continue
            data = self._read_small(layer)
            if layer.path == hub_files.CARD and not listing.ours:
                data = hub_files.complete_card(data, adapter_manifest)
            if not hub_files.matches_entry(entry, data):
                changes[layer.path] = data
        paths = {layer.path for layer in manifest.layers}
        if hub_files.CARD not in paths and not listing.ours:
            card = self._card(listing, adapter_manifest)
            if not hub_files.matches_entry(listing.files.get(hub_files.CARD), card):
                changes[hub_files.CARD] = card
        stale = self._listed_paths(listing) & set(listing.files) - paths - (set() if listing.ours else {hub_files.CARD})
        return {**changes, **dict.fromkeys(sorted(stale))}

    def _card(self, listing: Listing, manifest: AdapterManifest) -> bytes:
        """Return the card of an adapter without a README: the hub's, completed, if people wrote it, else a new one."""
        if hub_files.CARD in listing.files:
            existing_card = self._versions.read_small_file(listing, hub_files.CARD, 2 * hub_files.MAX_CARD)
            if not hub_files.is_written_card(existing_card):
                return hub_files.complete_card(hub_files.original_readme(existing_card), manifest)
        return hub_files.write_card(self.address.title, manifest)

    def _listed_paths(self, listing: Listing) -> set[str]:
        """Return the files that a commit's adapter.json lists: the next version deletes those that it lacks, and no others."""
        if ADAPTER_JSON not in listing.files:
            return set()
        try:
            raw = self._versions.read_small_file(listing, ADAPTER_JSON, MAX_ADAPTER_JSON)
            return set(hub_files.listed_files(json_file.parse_object(raw, self.location), self.location))
        except FormatError:
            return set()

    def _commit(
        self, branch: str, start: Listing, manifest: Manifest, adapter_manifest: AdapterManifest, changes: _Changes
    ) -> str:
        """Commit the changes, and verify the commit by reading it back."""
        try:
            commit = self._writer.create_commit(branch, start.commit, f"Version {manifest.digest}", changes, self._message)
        except ConflictError:
            # The conflict may be with our own commit, if a request was repeated because its answer was lost.
            head = self._client.listing(branch)
            if self._changes(head, manifest, adapter_manifest):
                raise
            commit = head.commit
        self.notes += [f"{hub_files.CARD}: {text}" for text in self._writer.warnings]
        listing = self._client.listing(commit)
        differences = self._changes(listing, manifest, adapter_manifest)
        if differences or self._versions.version_at(listing).manifest.digest != manifest.digest:
            problem = f"the hub has other bytes than were sent: {next(iter(differences), ADAPTER_JSON)}"
            raise IntegrityError(self.address.with_reference(commit), problem, "Push it again")
        return commit


_Changes = dict[str, bytes | Descriptor | None]
