"""An adapter on a hub: a plain repository, `hf://org/name`.

The repository holds what peft, transformers and vLLM load: the files of the adapter, its adapter.json, a README.md. The
manifest is not stored: it is built again from adapter.json, so a version has the same digest as everywhere else. A version is
one commit; everything is read from the commit that was found first, and a branch is what moves.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterhub.bases.hub_address import MAIN, Hub
from adapterhub.digest import Digest, is_hex, sha256_bytes
from adapterhub.http.boundary import is_loopback
from adapterhub.http.client import PAUSES
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import MAX_MANIFEST, Descriptor, Manifest
from adapterhub.remotes.download import Steady, read_blob, seek
from adapterhub.remotes.protocol import Connected, Put, Reader, Source, check_complete
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    UsageError,
)

from . import files as hub_files
from .client import COMMIT, WIDE, Bounds, HubAddress, HubClient, Listing, Refs
from .versions import MAX_ADAPTER_JSON, Versions

if TYPE_CHECKING:
    from adapterhub.remotes.location import Surroundings

    from .writer import HubWriter

_SMALL = 1 << 20  # bytes; a larger file is sent before the commit, a smaller one in it
_HELD = 64 << 20  # bytes of small files that are held for the commit


def parse(text: str) -> HubAddress:
    """Parse the address of a repository on a hub, with or without a version."""
    return HubAddress.parse(text)


def connect(address: HubAddress, who: Surroundings) -> HubRepository:
    """Open a repository, with the user's token for its hub: that of HF_TOKEN for that of HF_ENDPOINT, else a stored login."""
    hub = hub_of(address, who)
    return HubRepository(address, hub.endpoint, hub.checked_token(), proxy=hub.proxy)


def hub_of(address: HubAddress, who: Surroundings) -> Hub:
    """The hub of an address, with the token for it."""
    hub = who.hub()
    endpoint = address.endpoint or hub.endpoint
    at_home = origin(endpoint, address.repository, typed=True) == origin(hub.endpoint, hub.endpoint, typed=True)
    if at_home and (hub.token or not address.endpoint):
        return hub
    scheme, host, _ = origin(endpoint, address.repository, typed=True)
    return Hub(endpoint, who.login(address.host, scheme == "http" and not is_loopback(host)), hub.proxy)


class HubRepository(Connected):
    """One repository of a hub; `close` it in the end.

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
        bounds: Bounds = WIDE,
    ) -> None:
        super().__init__()
        self.address = address
        self.private = False
        self._message = ""
        self._client = HubClient(endpoint, address.name, self.where, token, pauses, proxy, address.login, bounds)
        self._pauses = pauses
        self._lock = threading.RLock()  # several blobs are put at once
        self._versions = Versions(self._client, address, self.notes)
        self._refs: Refs | None = None
        self._looked = False

    @property
    def where(self) -> str:
        """The address without a version."""
        return self.address.repository

    @cached_property
    def _writer(self) -> HubWriter:
        from .writer import HubWriter

        return HubWriter(self._client)

    def close(self) -> None:
        """Close its connections."""
        self._client.wire.close()

    def stop(self, *, on: bool = True) -> None:
        """Have what other threads wait for here fail at once, until called with `on` False."""
        self._client.wire.stop(on=on)

    def make_private(self) -> None:
        """Create the repository as private, if it has to be created."""
        self.private = True

    def annotate(self, message: str) -> None:
        """Record a message as the description of the commit."""
        self._message = message

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a branch, tag, commit, range or digest; without an adapter.json, one of the files as they are."""
        version = self._versions.find(reference)
        self.commit_id = version.listing.commit
        return version.made

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a file from `start` on; of a completed README, those of the README."""
        data = self._versions.content.get(blob.digest)
        if data is None:
            if blob.digest not in self._versions.places:
                raise NotFoundError(self.where, f"no file with the digest {blob.digest}")
            commit, path = self._versions.places[blob.digest]
            if path == hub_files.CARD and blob.size <= hub_files.MAX_CARD:
                data = self._readme(commit, blob)
        if data is not None or start >= blob.size:
            yield io.BytesIO((data or b"")[start:])
            return
        where = f"{self.where}: {path}"
        with self._client.file(commit, path, start) as body:
            seek(body, blob, start, where)
            yield body

    def _readme(self, commit: str, blob: Descriptor) -> bytes:
        card = self._client.small(commit, hub_files.CARD, 2 * hub_files.MAX_CARD)
        for data in (card, hub_files.original_readme(card)):
            if sha256_bytes(data) == blob.digest:
                self._versions.content[blob.digest] = data
                return data
        what = f"has changed on the hub since {ADAPTER_JSON} was written"
        hint = "Push the adapter again, or make the same change in it"
        raise IntegrityError(f"{self.where}: {hub_files.CARD}", what, hint)

    def tags(self) -> list[str]:
        """All branches and tags, sorted."""
        refs = self._client.refs()
        self.commits = {**refs.tags, **refs.branches}
        return sorted(self.commits)

    def find(self, digest: Digest) -> Any:
        """An unbuffered file with the unverified bytes of a digest, blob or manifest, to be closed; None without one."""
        self._look()
        for version in self._versions:
            if version.made.digest == digest:
                return io.BytesIO(version.made.raw)
            for blob in (*version.made.layers, version.made.config):
                if blob.digest == digest:
                    return Steady(self, blob, pauses=self._pauses)
        return None

    def _look(self) -> None:
        """Read the version at the address, or at `main` if there is none yet."""
        if self._looked:
            return
        self._looked = True
        for reference in dict.fromkeys((self.address.reference, MAIN)):
            with contextlib.suppress(NotFoundError, IntegrityError, RefusedError):
                listing = self._client.listing(reference)
                for path, entry in listing.files.items():
                    if entry.digest:
                        self._versions.places[entry.digest] = listing.commit, path
                        self._versions.large.add(entry.digest)
                if ADAPTER_JSON in listing.files:
                    self._versions.at(listing)
                return

    # ---- writing

    def has(self, blob: Descriptor) -> bool:
        """Tell whether a blob needs no sending: the hub has it as a large file, or its verified bytes are there or here."""
        with self._lock:
            self._look()
            if blob.digest in self._versions.large or blob.digest in self._versions.content:
                return True
            if blob.digest not in self._versions.places or blob.size > _SMALL:
                return False
            try:
                self._content(blob)
            except (IntegrityError, NotFoundError):
                return False
            return True

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Upload a large file; hold a small one, which is sent with the commit. Return the number of bytes."""
        with self._lock:
            large = self._is_large(blob)
            if large:
                self._ensure()
                writer = self._writer
        if large:
            sent = writer.upload(blob, source)
            self._versions.large.add(blob.digest)
            return sent
        data = read_blob(source, blob, self._pauses)
        with self._lock:
            self._versions.content[blob.digest] = data
        return blob.size

    def _is_large(self, blob: Descriptor) -> bool:
        if not blob.size:
            return False
        limit = {ADAPTER_JSON: MAX_ADAPTER_JSON, hub_files.CARD: hub_files.MAX_CARD, "": MAX_MANIFEST}.get(blob.path, _SMALL)
        held = sum(map(len, self._versions.content.values()))
        return is_weights(blob.path) or blob.size > limit or (held + blob.size > _HELD and limit == _SMALL)

    def _content(self, blob: Descriptor) -> bytes:
        """The bytes of a small file."""
        if blob.digest not in self._versions.content:
            self._versions.content[blob.digest] = read_blob(self, blob, self._pauses)
        return self._versions.content[blob.digest]

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Point a branch at a version, with one commit on top of the one that was read; a new branch starts at `main`.

        Raises:
            ConflictError: Somebody else committed in the meantime.
            RefusedError: The manifest cannot be rebuilt from the files, or `tag` is a tag, which does not move.
        """
        manifest = self._manifest(made)
        branch = tag or MAIN
        if is_hex(branch, COMMIT):
            raise UsageError(self.address.at(branch), "a commit cannot be pushed to", "Push to a branch")
        self._refs = None
        refs = self._ensure()
        if branch in refs.tags and branch not in refs.branches:
            self._tagged(branch, made)
            return Put(new=False, moved=False)
        new = branch not in refs.branches and not branch.startswith("refs/")
        start, changes = self._start(branch, made, manifest, new=new)
        if new:
            self._branch(branch, start.commit)
        try:
            self.commit_id = self._committed(branch, start, made, manifest, changes) if changes else start.commit
        except BaseException:
            if new:
                self._unbranch(branch, start.commit)
            raise
        return Put(new=bool(changes), moved=new or bool(changes))

    def _branch(self, name: str, commit: str) -> None:
        """Create a branch at a commit; it may exist there already, if an answer was lost."""
        try:
            self._writer.branch(name, commit)
        except ConflictError:
            if self._client.refs().branches.get(name) != commit:
                raise

    def _unbranch(self, name: str, commit: str) -> None:
        """Remove a branch, unless somebody committed to it."""
        with contextlib.suppress(AdapterhubError):
            if self._client.refs().branches.get(name) == commit:
                self._writer.drop_branch(name)

    def _manifest(self, made: Manifest) -> AdapterManifest:
        """The adapter.json of a version; it must be complete here and give the same OCI manifest again."""
        check_complete(made.layers, self.has, self.where)
        if made.adapter_json is None:
            raise RefusedError(self.where, f"it has no {ADAPTER_JSON}", "Pull it into a folder, then push the folder")
        raw = self._content(made.adapter_json)
        if hub_files.assembled(raw, f"{self.where}: {ADAPTER_JSON}").digest != made.digest:
            what = "its manifest cannot be rebuilt from its files, and a hub keeps only files"
            raise RefusedError(self.where, what, "Pull it into a folder, then push the folder")
        return AdapterManifest.parse(raw, self.where)

    def _ensure(self) -> Refs:
        """The refs of the repository, which is created if it does not exist."""
        if self._refs is None:
            try:
                self._refs = self._client.refs()
            except NotFoundError:
                if self._writer.create(private=self.private):
                    readers = "private" if self.private else "with the hub's default visibility"
                    self.notes.append(f"created the repository {self.where}, {readers}")
                self._refs = self._client.refs()
        return self._refs

    def _tagged(self, tag: str, made: Manifest) -> None:
        version = self._versions.at(self._client.listing(tag))
        if version.made.digest != made.digest:
            hint = "Push to a branch, or remove the tag on the hub"
            raise RefusedError(self.address.at(tag), "is a tag, which does not move", hint)
        self.commit_id = version.listing.commit

    def _start(self, branch: str, made: Manifest, manifest: AdapterManifest, *, new: bool) -> tuple[Listing, _Changes]:
        """The parent commit and the changes to it. A new branch starts at a commit that has the version already, if any."""
        if new:
            for version in self._versions:
                if version.made.digest == made.digest and not self._changes(version.listing, made, manifest):
                    return version.listing, {}
        start = self._client.listing(MAIN if new else branch)
        return start, self._changes(start, made, manifest)

    def _changes(self, listing: Listing, made: Manifest, manifest: AdapterManifest) -> _Changes:
        """The differences between a commit and a version, as `HubWriter.commit` takes them."""
        found: _Changes = {}
        for layer in made.layers:
            entry = listing.files.get(layer.path)
            if layer.digest in self._versions.large:
                if entry is None or entry.digest != layer.digest:
                    found[layer.path] = layer
                continue
            data = self._content(layer)
            if layer.path == hub_files.CARD and not listing.ours:
                data = hub_files.complete_card(data, manifest)
            if not hub_files.same(entry, data):
                found[layer.path] = data
        paths = {layer.path for layer in made.layers}
        if hub_files.CARD not in paths and not listing.ours:
            card = self._card(listing, manifest)
            if not hub_files.same(listing.files.get(hub_files.CARD), card):
                found[hub_files.CARD] = card
        stale = self._listed(listing) & set(listing.files) - paths - (set() if listing.ours else {hub_files.CARD})
        return {**found, **dict.fromkeys(sorted(stale))}

    def _card(self, listing: Listing, manifest: AdapterManifest) -> bytes:
        """The card of an adapter without a README: the one that people wrote on the hub, completed, or a new one."""
        if hub_files.CARD in listing.files:
            there = self._versions.small(listing, hub_files.CARD, 2 * hub_files.MAX_CARD)
            if not hub_files.is_written_card(there):
                return hub_files.complete_card(hub_files.original_readme(there), manifest)
        return hub_files.write_card(self.address.title, manifest)

    def _listed(self, listing: Listing) -> set[str]:
        """The files of the version in a commit: the next version removes those that it lacks, and nobody else's."""
        if ADAPTER_JSON not in listing.files:
            return set()
        try:
            raw = self._versions.small(listing, ADAPTER_JSON, MAX_ADAPTER_JSON)
            return set(hub_files.listed(oci_manifest.parse_json(raw, self.where), self.where))
        except FormatError:
            return set()

    def _committed(self, branch: str, start: Listing, made: Manifest, manifest: AdapterManifest, changes: _Changes) -> str:
        """Commit the changes, and read the commit back."""
        try:
            commit = self._writer.commit(branch, start.commit, f"Version {made.digest}", changes, self._message)
        except ConflictError:  # perhaps with our own commit, if its answer was lost
            there = self._client.listing(branch)
            if self._changes(there, made, manifest):
                raise
            commit = there.commit
        self.notes += [f"{hub_files.CARD}: {text}" for text in self._writer.warnings]
        listing = self._client.listing(commit)
        wrong = self._changes(listing, made, manifest)
        if wrong or self._versions.at(listing).made.digest != made.digest:
            what = f"the hub has other bytes than were sent: {next(iter(wrong), ADAPTER_JSON)}"
            raise IntegrityError(self.address.at(commit), what, "Push it again")
        return commit


_Changes = dict[str, bytes | Descriptor | None]
