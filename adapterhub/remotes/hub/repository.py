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
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from adapterhub.bases.hub_address import MAIN
from adapterhub.digest import Digest, is_hex, sha256_bytes
from adapterhub.http.client import PAUSES
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import MAX_MANIFEST, Descriptor, Manifest
from adapterhub.remotes import references
from adapterhub.remotes.download import Steady, pass_over, read_blob
from adapterhub.remotes.protocol import Connected, Put, Reader, Source
from adapterhub_converters import linear
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    RemoteError,
    UsageError,
)

from . import files as hub_files
from .client import COMMIT, HubAddress, HubClient, Listing, Refs

_FROM = linear.Pattern(r"bytes (\d{1,18})-")

if TYPE_CHECKING:
    from adapterhub.remotes.location import Surroundings

    from .writer import HubWriter

_SMALL = 1 << 20  # bytes; a larger file is sent before the commit, a smaller one in it
_HELD = 64 << 20  # bytes of small files that are held for the commit
_MAX_ADAPTER_JSON = 16 << 20  # bytes of an adapter.json
_MAX_PLAIN = 32 << 20  # bytes of a file without a digest in the listing; hubs accept some 10 MB as such
_MAX_READ = 256 << 20  # bytes of all such files in a repository without adapter.json
_BRANCHES, _HEADS, _CANDIDATES = 10, 50, 100  # that are searched for a digest


def parse(text: str) -> HubAddress:
    """Parse the address of a repository on a hub, with or without a version."""
    return HubAddress.parse(text)


def connect(address: HubAddress, who: Surroundings) -> HubRepository:
    """Open a repository, with the token of the user if it is on the hub that the token is for."""
    hub = who.hub()
    endpoint = address.endpoint or hub.endpoint
    at_home = origin(endpoint, address.repository, typed=True) == origin(hub.endpoint, hub.endpoint, typed=True)
    return HubRepository(address, endpoint, hub.checked_token() if at_home else None, proxy=hub.proxy)


@dataclass(frozen=True)
class _Version:
    """A commit: its files on the hub, and the manifest of the adapter in it."""

    listing: Listing
    made: Manifest


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
    ) -> None:
        super().__init__()
        self.address = address
        self.private = False
        self._client = HubClient(endpoint, address.name, self.where, token, pauses, proxy)
        self._pauses = pauses
        self._lock = threading.RLock()  # several blobs are put at once
        self._versions: dict[str, _Version] = {}
        self._bytes: dict[Digest, bytes] = {}  # verified bytes, read or to be committed
        self._large: set[Digest] = set()  # large files that the hub has
        self._places: dict[Digest, tuple[str, str]] = {}  # commit and path
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

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a branch, tag, commit, range or digest; without an adapter.json, one of the files as they are."""
        if reference.startswith("sha256:"):
            version = self._by_digest(reference)
        elif references.is_range(reference):
            version = self._version(self._client.listing(self._in_range(reference)))
        else:
            version = self._version(self._client.listing(reference))
        self.commit_id = version.listing.commit
        return version.made

    def _version(self, listing: Listing) -> _Version:
        found = self._versions.get(listing.commit)
        if found is None:
            made = self._made(listing) if ADAPTER_JSON in listing.files else self._imported(listing)
            found = self._versions[listing.commit] = _Version(listing, made)
            for layer in made.layers:
                self._places.setdefault(layer.digest, (listing.commit, layer.path))
                entry = listing.files.get(layer.path)
                if entry and entry.digest == layer.digest:
                    self._large.add(layer.digest)
            self._bytes[made.config.digest] = made.config_bytes
        return found

    def _made(self, listing: Listing) -> Manifest:
        """Build the manifest from adapter.json; IntegrityError if the listing shows that a file is another."""
        where = self.address.at(listing.commit)
        raw = self._small(listing, ADAPTER_JSON, _MAX_ADAPTER_JSON)
        made = hub_files.assembled(raw, f"{where}: {ADAPTER_JSON}")
        for layer in made.layers:
            entry = listing.files.get(layer.path)
            if entry is None:
                raise IntegrityError(f"{where}: {layer.path}", f"missing, but {ADAPTER_JSON} lists it", "Push it again")
            own = layer.path != hub_files.CARD  # the card may have been completed; its bytes are checked when they are read
            other = (entry.digest or layer.digest) != layer.digest or entry.size not in (None, layer.size)
            if own and other and layer.path != ADAPTER_JSON:
                raise IntegrityError(f"{where}: {layer.path}", f"has changed since {ADAPTER_JSON} was written", "Push it again")
        self._bytes[sha256_bytes(raw)] = raw
        return made

    def _small(self, listing: Listing, path: str, limit: int) -> bytes:
        """A whole file, verified against the listing: by its digest, else by git's name of the blob."""
        data, entry = self._client.small(listing.commit, path, limit), listing.files[path]
        if (entry.digest or entry.oid) and not hub_files.same(entry, data):
            raise IntegrityError(f"{self.where}: {path}", "the hub sent other bytes than its commit has", "Try again")
        return data

    def _imported(self, listing: Listing) -> Manifest:
        """Build a manifest for a repository without adapter.json; files that do not belong to an adapter are left out."""
        where = self.address.at(listing.commit)
        names, left = hub_files.importable(listing, where)
        files, unread = {}, _MAX_READ
        for path in names:
            entry = listing.files[path]
            digest, size = entry.digest, entry.size
            if digest is None or size is None:
                data = self._small(listing, path, min(_MAX_PLAIN, unread))
                digest, size = sha256_bytes(data), len(data)
                unread -= size
                self._bytes[digest] = data
            files[path] = digest, size
        self.notes += [f"left out: {path[:200]}" for path in left]
        return hub_files.bare(files, where)

    def _in_range(self, reference: str) -> str:
        """The branch or tag that a range selects."""
        found = references.in_range(reference, self.tags, self._commit_of, self.address.at(reference))
        if found is None:
            what = "no branch or tag is in this range"
            raise NotFoundError(self.address.at(reference), what, code="no-such-tag", repository=self.where)
        return found

    def _commit_of(self, tag: str) -> str | None:
        return self.commits.get(tag)

    def _by_digest(self, digest: Digest) -> _Version:
        """The version with a digest, or whose digest alone begins so."""
        found: dict[Digest, _Version] = {}
        for version in self._matching(digest):
            found[version.made.digest] = version
            if not references.is_prefix(digest):
                break
        chosen = references.begins(digest, found, self.address.at(digest))
        if chosen is None:
            what = "no such version in this repository"
            raise NotFoundError(self.address.at(digest), what, code="no-such-tag", repository=self.where)
        return found[chosen]

    def _matching(self, digest: Digest) -> Iterator[_Version]:
        yield from [version for version in self._versions.values() if version.made.digest.startswith(digest)]
        for commit in dict.fromkeys(islice(self._candidates(digest), _CANDIDATES)):
            with contextlib.suppress(IntegrityError, NotFoundError, RefusedError):
                version = self._version(self._client.listing(commit))
                if version.made.digest.startswith(digest):
                    yield version
                else:
                    del self._versions[commit]  # a listing may take 64 MB

    def _candidates(self, digest: Digest) -> Iterator[str]:
        """Commits that may be a version: those with its digest in the title, then the heads of branches and tags."""
        refs = self._client.refs()
        for branch in sorted(refs.branches, key=lambda name: (name != MAIN, name))[:_BRANCHES]:
            with contextlib.suppress(NotFoundError):
                yield from (commit for commit, title in self._client.titles(branch) if digest in title)
        yield from list(dict.fromkeys([*refs.branches.values(), *refs.tags.values()]))[:_HEADS]

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a file from `start` on; of a completed README, those of the README."""
        data = self._bytes.get(blob.digest)
        if data is None:
            if blob.digest not in self._places:
                raise NotFoundError(self.where, f"no file with the digest {blob.digest}")
            commit, path = self._places[blob.digest]
            if path == hub_files.CARD and blob.size <= hub_files.MAX_CARD:
                data = self._readme(commit, blob)
        if data is not None or start >= blob.size:
            yield io.BytesIO((data or b"")[start:])
            return
        where = f"{self.where}: {path}"
        with self._client.file(commit, path, start) as body:
            left = blob.size - start
            if body.status == 206:
                sent = _FROM.match(body.headers.get("content-range", ""))
                if not start or not sent or int(sent[1]) != start:
                    raise RemoteError(where, "the hub sends another range than requested")
            elif start:
                pass_over(body, start)
            if body.length is not None and body.length != (left if body.status == 206 else blob.size):
                raise IntegrityError(where, f"the hub has {body.length} bytes of it, not {left}", "Ask its owner")
            yield body

    def _readme(self, commit: str, blob: Descriptor) -> bytes:
        card = self._client.small(commit, hub_files.CARD, 2 * hub_files.MAX_CARD)
        for data in (card, hub_files.original_readme(card)):
            if sha256_bytes(data) == blob.digest:
                self._bytes[blob.digest] = data
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
        for version in self._versions.values():
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
                        self._places[entry.digest] = listing.commit, path
                        self._large.add(entry.digest)
                if ADAPTER_JSON in listing.files:
                    self._version(listing)
                return

    # ---- writing

    def has(self, blob: Descriptor) -> bool:
        """Tell whether a blob needs no sending: the hub has it as a large file, or its verified bytes are there or here."""
        with self._lock:
            self._look()
            if blob.digest in self._large or blob.digest in self._bytes:
                return True
            if blob.digest not in self._places or blob.size > _SMALL:
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
            self._large.add(blob.digest)
            return sent
        data = read_blob(source, blob, self._pauses)
        with self._lock:
            self._bytes[blob.digest] = data
        return blob.size

    def _is_large(self, blob: Descriptor) -> bool:
        if not blob.size:
            return False
        limit = {ADAPTER_JSON: _MAX_ADAPTER_JSON, hub_files.CARD: hub_files.MAX_CARD, "": MAX_MANIFEST}.get(blob.path, _SMALL)
        held = sum(map(len, self._bytes.values()))
        return is_weights(blob.path) or blob.size > limit or (held + blob.size > _HELD and limit == _SMALL)

    def _content(self, blob: Descriptor) -> bytes:
        """The bytes of a small file."""
        if blob.digest not in self._bytes:
            self._bytes[blob.digest] = read_blob(self, blob, self._pauses)
        return self._bytes[blob.digest]

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
        missing = [layer for layer in made.layers if not self.has(layer)]
        if missing:
            raise IntegrityError(self.where, f"{len(missing)} of its blobs are missing, first {missing[0].digest}")
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
                    readers = "it is private" if self.private else "with the hub's default visibility"
                    self.notes.append(f"created the repository {self.where}; {readers}")
                self._refs = self._client.refs()
        return self._refs

    def _tagged(self, tag: str, made: Manifest) -> None:
        version = self._version(self._client.listing(tag))
        if version.made.digest != made.digest:
            hint = "Push to a branch, or remove the tag on the hub"
            raise RefusedError(self.address.at(tag), "is a tag, which does not move", hint)
        self.commit_id = version.listing.commit

    def _start(self, branch: str, made: Manifest, manifest: AdapterManifest, *, new: bool) -> tuple[Listing, _Changes]:
        """The parent commit and the changes to it. A new branch starts at a commit that has the version already, if any."""
        if new:
            for version in list(self._versions.values()):
                if version.made.digest == made.digest and not self._changes(version.listing, made, manifest):
                    return version.listing, {}
        start = self._client.listing(MAIN if new else branch)
        return start, self._changes(start, made, manifest)

    def _changes(self, listing: Listing, made: Manifest, manifest: AdapterManifest) -> _Changes:
        """The differences between a commit and a version, as `HubWriter.commit` takes them."""
        found: _Changes = {}
        for layer in made.layers:
            entry = listing.files.get(layer.path)
            if layer.digest in self._large:
                if entry is None or entry.digest != layer.digest:
                    found[layer.path] = layer
                continue
            data = self._content(layer)
            if layer.path == hub_files.CARD:
                data = hub_files.complete_card(data, manifest)
            if not hub_files.same(entry, data):
                found[layer.path] = data
        paths = {layer.path for layer in made.layers}
        if hub_files.CARD not in paths:
            card = self._card(listing, manifest)
            if not hub_files.same(listing.files.get(hub_files.CARD), card):
                found[hub_files.CARD] = card
        stale = self._listed(listing) & set(listing.files) - paths - {hub_files.CARD}
        return {**found, **dict.fromkeys(sorted(stale))}

    def _card(self, listing: Listing, manifest: AdapterManifest) -> bytes:
        """The card of an adapter without a README: the one that people wrote on the hub, completed, or a new one."""
        if hub_files.CARD in listing.files:
            there = self._small(listing, hub_files.CARD, 2 * hub_files.MAX_CARD)
            if not hub_files.is_written_card(there):
                return hub_files.complete_card(hub_files.original_readme(there), manifest)
        return hub_files.write_card(self.address.title, manifest)

    def _listed(self, listing: Listing) -> set[str]:
        """The files of the version in a commit: the next version removes those that it lacks, and nobody else's."""
        if ADAPTER_JSON not in listing.files:
            return set()
        try:
            raw = self._small(listing, ADAPTER_JSON, _MAX_ADAPTER_JSON)
            return set(hub_files.listed(oci_manifest.parse_json(raw, self.where), self.where))
        except FormatError:
            return set()

    def _committed(self, branch: str, start: Listing, made: Manifest, manifest: AdapterManifest, changes: _Changes) -> str:
        """Commit the changes, and read the commit back."""
        try:
            commit = self._writer.commit(branch, start.commit, f"Version {made.digest}", changes)
        except ConflictError:  # perhaps with our own commit, if its answer was lost
            there = self._client.listing(branch)
            if self._changes(there, made, manifest):
                raise
            commit = there.commit
        self.notes += [f"{hub_files.CARD}: {text}" for text in self._writer.warnings]
        listing = self._client.listing(commit)
        wrong = self._changes(listing, made, manifest)
        if wrong or self._version(listing).made.digest != made.digest:
            what = f"the hub has other bytes than were sent: {next(iter(wrong), ADAPTER_JSON)}"
            raise IntegrityError(self.address.at(commit), what, "Push it again")
        return commit


_Changes = dict[str, bytes | Descriptor | None]
