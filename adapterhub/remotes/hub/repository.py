"""An adapter on a Hugging Face Hub: a plain repository, `hf://org/name`.

What lies there is what peft, transformers and vLLM load: the adapter's files, its adapter.json, a README.md. The manifest lies
nowhere: it is made again of what adapter.json lists, so that a version has the digest that it has everywhere. A version is one
commit, of which git's own name is asked for what is read after it; a branch is what moves.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.bases.client import origin
from adapterhub.bases.hub_address import MAIN
from adapterhub.digest import CHUNK, Digest, parse_digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import MAX_MANIFEST, Descriptor, Manifest
from adapterhub.manifest.package_files import WEIGHTS
from adapterhub.remotes.download import Steady, pass_over
from adapterhub.remotes.protocol import Reader, Source
from adapterhub.remotes.wire import PAUSES
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
from adapterhub_converters.file_names import ADAPTER_JSON

from . import card as hf_card
from . import contents as hf_contents
from .address import HubAddress
from .api import COMMIT, Api, Listing, Refs
from .upload import Memory, upload

if TYPE_CHECKING:
    from adapterhub.remotes.location import Surroundings

_SMALL = 1 << 20  # bytes; a larger file is sent before the commit, a smaller one in it
_HELD = 64 << 20  # bytes of small files that are held for the commit
_MAX_ADAPTER_JSON = 16 << 20  # bytes of an adapter.json
_MAX_PLAIN = 32 << 20  # bytes of a file that the hub keeps no digest of; hubs take some 10 MB as such
_MAX_READ = 256 << 20  # bytes of all such files of a repository that is no adapter of ours
_BRANCHES, _HEADS = 10, 50  # that are looked through for a digest


def parse(text: str) -> HubAddress:
    """The address of one repository of a hub, and of a version in it."""
    return HubAddress.parse(text)


def connect(address: HubAddress, who: Surroundings) -> HubRepository:
    """The repository; who asks is whom huggingface_hub would say, and only that hub is told."""
    hub = who.hub()
    endpoint = address.endpoint or hub.endpoint
    at_home = origin(endpoint, address.repository) == origin(hub.endpoint, hub.endpoint)
    return HubRepository(address, endpoint, hub.token if at_home else None)


@dataclass(frozen=True)
class _Version:
    """What a commit is: its files there, and the manifest of the adapter in it."""

    listing: Listing
    made: Manifest


class HubRepository:
    """One repository of a hub; `close` it in the end.

    Attributes:
        commit_id: The commit that was read or made last.
        commits: Of each branch and tag, once these were asked for.
        notes: What whoever uses it should know.
        private: Whether the repository, if it has to be made, is not for everybody.
    """

    def __init__(
        self, address: HubAddress, endpoint: str, token: str | None = None, *, pauses: Sequence[float] = PAUSES
    ) -> None:
        self.address, self.commit_id = address, ""
        self.notes: list[str] = []
        self.commits: dict[str, str] = {}
        self._lock = threading.RLock()  # blobs come several at once
        self.private = False
        self._api = Api(endpoint, address.name, self.where, token, pauses)
        self._pauses = pauses
        self._versions: dict[str, _Version] = {}
        self._bytes: dict[Digest, bytes] = {}  # what was read or is to be committed, and is right
        self._large: set[Digest] = set()  # what the hub has as large files
        self._places: dict[Digest, tuple[str, str]] = {}  # commit and path
        self._refs: Refs | None = None
        self._looked = False

    @property
    def where(self) -> str:
        """The address without a version."""
        return self.address.repository

    def close(self) -> None:
        """Close its connections."""
        self._api.wire.close()

    def __enter__(self) -> HubRepository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a branch, a tag, a commit or a digest; of what has no adapter.json, one of its files as they are."""
        if reference.startswith("sha256:"):
            version = self._by_digest(parse_digest(reference, self.where))
        else:
            version = self._version(self._api.listing(reference))
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
        """The manifest that adapter.json makes; IntegrityError where the files are others, as far as the listing says."""
        where = self.address.at(listing.commit)
        raw = self._small(listing, ADAPTER_JSON, _MAX_ADAPTER_JSON)
        made = hf_contents.assembled(raw, f"{where}: {ADAPTER_JSON}")
        for layer in made.layers:
            entry = listing.files.get(layer.path)
            if entry is None:
                raise IntegrityError(f"{where}: {layer.path}", f"is gone, and {ADAPTER_JSON} lists it", "Push it again")
            own = layer.path != hf_card.NAME  # which may have been completed; its bytes will tell
            other = (entry.digest or layer.digest) != layer.digest or entry.size not in (None, layer.size)
            if own and other and layer.path != ADAPTER_JSON:
                raise IntegrityError(f"{where}: {layer.path}", f"has changed since {ADAPTER_JSON} was written", "Push it again")
        self._bytes[sha256_bytes(raw)] = raw
        return made

    def _small(self, listing: Listing, path: str, limit: int) -> bytes:
        """A whole file, compared with what the listing says of it: git's name of it, where there is no digest."""
        data, entry = self._api.small(listing.commit, path, limit), listing.files[path]
        if (entry.digest or entry.oid) and not hf_contents.same(entry, data):
            raise IntegrityError(f"{self.where}: {path}", "other bytes came than its commit has", "Try again")
        return data

    def _imported(self, listing: Listing) -> Manifest:
        """A manifest of the files of somebody who knows no adapter.json; what no adapter has is left out."""
        where = self.address.at(listing.commit)
        names, left = hf_contents.importable(listing, where)
        files, unread = {}, _MAX_READ
        for path in names:
            entry = listing.files[path]
            digest, size = entry.digest, entry.size
            if digest is None or size is None:
                data = self._small(listing, path, min(_MAX_PLAIN, unread))
                digest, size = sha256_bytes(data), len(data)
                unread -= size
                self._keep(digest, data)
            files[path] = digest, size
        made = hf_contents.bare(files, where)
        self.notes += [f"left out: {path[:200]}" for path in left]
        return made

    def _by_digest(self, digest: Digest) -> _Version:
        for version in self._versions.values():
            if version.made.digest == digest:
                return version
        for commit in dict.fromkeys(self._candidates(digest)):
            with contextlib.suppress(IntegrityError, NotFoundError, RefusedError):
                version = self._version(self._api.listing(commit))
                if version.made.digest == digest:
                    return version
        raise NotFoundError(self.address.at(digest), "no such version in this repository", self._hint())

    def _candidates(self, digest: Digest) -> Iterator[str]:
        """Commits that may be a version: those that are called so, then where a branch or a tag is."""
        refs = self._api.refs()
        for branch in sorted(refs.branches, key=lambda name: (name != MAIN, name))[:_BRANCHES]:
            with contextlib.suppress(NotFoundError):
                yield from (commit for commit, title in self._api.titles(branch) if digest in title)
        yield from list(dict.fromkeys([*refs.branches.values(), *refs.tags.values()]))[:_HEADS]

    def _hint(self) -> str:
        return f"`adapterhub list {self.where}` says which branches and tags there are"

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a file from `start` on, a completed README as it was before."""
        data = self._bytes.get(blob.digest)
        if data is None:
            if blob.digest not in self._places:
                raise NotFoundError(self.where, f"has no file of {blob.digest}")
            commit, path = self._places[blob.digest]
            if path == hf_card.NAME and blob.size <= hf_card.MAX_CARD:
                data = self._readme(commit, blob)
        if data is not None or start >= blob.size:
            yield io.BytesIO((data or b"")[start:])
            return
        where = f"{self.where}: {path}"
        with self._api.file(commit, path, start) as body:
            left = blob.size - start
            if body.status == 206:
                said = re.match(r"bytes (\d{1,18})-", body.headers.get("content-range", ""))
                if not start or not said or int(said[1]) != start:
                    raise RemoteError(where, "the hub sends another range than it was asked for")
            elif start:
                pass_over(body, start)
            if body.length is not None and body.length != (left if body.status == 206 else blob.size):
                raise IntegrityError(where, f"the hub has {body.length} bytes of it, not {left}", "Ask its owner")
            yield body

    def _readme(self, commit: str, blob: Descriptor) -> bytes:
        card = self._api.small(commit, hf_card.NAME, 2 * hf_card.MAX_CARD)
        for data in (card, hf_card.original(card)):
            if sha256_bytes(data) == blob.digest:
                self._keep(blob.digest, data)
                return data
        what = f"has changed on the hub since {ADAPTER_JSON} was written"
        raise IntegrityError(f"{self.where}: {hf_card.NAME}", what, "Push the adapter again, or take the change into it")

    def tags(self) -> list[str]:
        """Every branch and tag, sorted."""
        refs = self._api.refs()
        self.commits = {**refs.tags, **refs.branches}
        return sorted(self.commits)

    def find(self, digest: Digest) -> Any:
        """An unbuffered file that should hold the bytes of a digest, file or manifest, to be closed; None for nothing."""
        self._look()
        for version in self._versions.values():
            if version.made.digest == digest:
                return io.BytesIO(version.made.raw)
            for blob in (*version.made.layers, version.made.config):
                if blob.digest == digest:
                    return Steady(self, blob, pauses=self._pauses)
        return None

    def _look(self) -> None:
        """Know what is at the address, or at `main` where that isn't there yet, if it is an adapter."""
        if self._looked:
            return
        self._looked = True
        for reference in dict.fromkeys((self.address.reference, MAIN)):
            with contextlib.suppress(NotFoundError, IntegrityError, RefusedError):
                listing = self._api.listing(reference)
                for path, entry in listing.files.items():
                    if entry.digest:
                        self._places[entry.digest] = listing.commit, path
                        self._large.add(entry.digest)
                if ADAPTER_JSON in listing.files:
                    self._version(listing)
                return

    # ---- writing

    def has(self, blob: Descriptor) -> bool:
        """Whether the hub has it as a large file of a version that was looked at, or it is right, there or held here."""
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
        """Send a large file; hold a small one, which goes along with the commit."""
        with self._lock:
            large = self._is_large(blob)
            if large:
                self._ensure()
        if large:
            sent = upload(self._api, blob, source, self._pauses)
            self._large.add(blob.digest)
            return sent
        data = _whole(source, blob, self._pauses)
        with self._lock:
            self._keep(blob.digest, data)
        return blob.size

    def _is_large(self, blob: Descriptor) -> bool:
        if not blob.size:
            return False
        suffix = os.path.splitext(blob.path)[1].lower()
        limit = {ADAPTER_JSON: _MAX_ADAPTER_JSON, hf_card.NAME: hf_card.MAX_CARD, "": MAX_MANIFEST}.get(blob.path, _SMALL)
        held = sum(map(len, self._bytes.values()))
        return suffix in WEIGHTS or blob.size > limit or (held + blob.size > _HELD and limit == _SMALL)

    def _keep(self, digest: Digest, data: bytes) -> None:
        self._bytes[digest] = data

    def _content(self, blob: Descriptor) -> bytes:
        """The bytes of a file that isn't large."""
        if blob.digest not in self._bytes:
            self._keep(blob.digest, _whole(self, blob, self._pauses))
        return self._bytes[blob.digest]

    def put_manifest(self, made: Manifest, tag: str | None) -> None:
        """Have a branch be a version, by one commit that only follows the one that was seen; a new branch begins at `main`.

        Raises:
            ConflictError: Somebody else committed meanwhile.
            RefusedError: The version cannot be had back from its files, or `tag` is a tag, which doesn't move.
        """
        manifest = self._manifest(made)
        branch = tag or MAIN
        if COMMIT.fullmatch(branch):
            raise UsageError(self.address.at(branch), "a commit stays what it is", "Push to a branch")
        self._refs = None
        refs = self._ensure()
        if branch in refs.tags and branch not in refs.branches:
            self._tagged(branch, made)
            return
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

    def _branch(self, name: str, commit: str) -> None:
        """Make a branch at a commit, which it may be already if an answer was lost."""
        try:
            self._api.branch(name, commit)
        except ConflictError:
            if self._api.refs().branches.get(name) != commit:
                raise

    def _unbranch(self, name: str, commit: str) -> None:
        """Remove a branch on which nothing has come; one that is somebody else's by now stays."""
        with contextlib.suppress(AdapterhubError):
            if self._api.refs().branches.get(name) == commit:
                self._api.drop_branch(name)

    def _manifest(self, made: Manifest) -> AdapterManifest:
        """The adapter manifest of a version whose blobs are all here, and whose OCI manifest they make."""
        missing = [layer for layer in made.layers if not self.has(layer)]
        if missing:
            raise IntegrityError(self.where, f"{len(missing)} of its blobs are missing, {missing[0].digest} first")
        if made.adapter_json is None:
            raise RefusedError(self.where, f"there is no {ADAPTER_JSON} in it", "Pull it into a folder, and push that")
        raw = self._content(made.adapter_json)
        if hf_contents.assembled(raw, f"{self.where}: {ADAPTER_JSON}").digest != made.digest:
            what = "its manifest is not the one that its files make, and a hub keeps only files"
            raise RefusedError(self.where, what, "Pull it into a folder, and push that")
        return AdapterManifest.parse(raw, self.where)

    def _ensure(self) -> Refs:
        """The refs of the repository, which is made if there is none."""
        if self._refs is None:
            try:
                self._refs = self._api.refs()
            except NotFoundError:
                if self._api.create(private=self.private):
                    readers = "it is private" if self.private else "who may read it is the hub's default"
                    self.notes.append(f"made the repository {self.where}; {readers}")
                self._refs = self._api.refs()
        return self._refs

    def _tagged(self, tag: str, made: Manifest) -> None:
        version = self._version(self._api.listing(tag))
        if version.made.digest != made.digest:
            hint = "Push to a branch, or remove the tag there"
            raise RefusedError(self.address.at(tag), "is a tag, and a tag of a repository stays where it is", hint)
        self.commit_id = version.listing.commit

    def _start(self, branch: str, made: Manifest, manifest: AdapterManifest, *, new: bool) -> tuple[Listing, _Changes]:
        """The commit to go on from, and what has to change in it. A new branch may begin at the same version elsewhere."""
        if new:
            for version in list(self._versions.values()):
                if version.made.digest == made.digest and not self._changes(version.listing, made, manifest):
                    return version.listing, {}
        start = self._api.listing(MAIN if new else branch)
        return start, self._changes(start, made, manifest)

    def _changes(self, listing: Listing, made: Manifest, manifest: AdapterManifest) -> _Changes:
        """Path to bytes, to a large file, or to None for a file to remove."""
        found: _Changes = {}
        for layer in made.layers:
            entry = listing.files.get(layer.path)
            if layer.digest in self._large:
                if entry is None or entry.digest != layer.digest:
                    found[layer.path] = layer
                continue
            data = self._content(layer)
            if layer.path == hf_card.NAME:
                data = hf_card.completed(data, manifest)
            if not hf_contents.same(entry, data):
                found[layer.path] = data
        paths = {layer.path for layer in made.layers}
        if hf_card.NAME not in paths:
            card = self._card(listing, manifest)
            if not hf_contents.same(listing.files.get(hf_card.NAME), card):
                found[hf_card.NAME] = card
        stale = self._listed(listing) & set(listing.files) - paths - {hf_card.NAME}
        return {**found, **dict.fromkeys(sorted(stale))}

    def _card(self, listing: Listing, manifest: AdapterManifest) -> bytes:
        """The card of an adapter that has none: what people wrote on the hub, completed, or one that is written."""
        if hf_card.NAME in listing.files:
            there = self._small(listing, hf_card.NAME, 2 * hf_card.MAX_CARD)
            if not hf_card.is_written(there):
                return hf_card.completed(hf_card.original(there), manifest)
        return hf_card.written(self.address.title, manifest)

    def _listed(self, listing: Listing) -> set[str]:
        """The files of the version that is in a commit, which go when the next one hasn't got them; nobody else's."""
        if ADAPTER_JSON not in listing.files:
            return set()
        try:
            raw = self._small(listing, ADAPTER_JSON, _MAX_ADAPTER_JSON)
            return set(hf_contents.listed(oci_manifest.parse_json(raw, self.where), self.where))
        except FormatError:
            return set()

    def _committed(self, branch: str, start: Listing, made: Manifest, manifest: AdapterManifest, changes: _Changes) -> str:
        """The commit with these changes, looked at again."""
        operations = self._operations(start.commit, changes)
        try:
            commit = self._api.commit(branch, start.commit, f"Version {made.digest}", operations)
        except ConflictError:  # perhaps with our own commit, of which the answer was lost
            there = self._api.listing(branch)
            if self._changes(there, made, manifest):
                raise
            commit = there.commit
        listing = self._api.listing(commit)
        wrong = self._changes(listing, made, manifest)
        if wrong or self._version(listing).made.digest != made.digest:
            what = f"the hub has other bytes than were sent: {next(iter(wrong), ADAPTER_JSON)}"
            raise IntegrityError(self.address.at(commit), what, "Push it again")
        return commit

    def _operations(self, revision: str, changes: _Changes) -> list[dict[str, Any]]:
        """The lines of a commit; what the hub wants kept as a large file is sent as one first."""
        large = self._api.modes(revision, {path: data for path, data in changes.items() if isinstance(data, bytes)})
        found = []
        for path, change in changes.items():
            if isinstance(change, bytes) and path in large:
                blob = Descriptor("", sha256_bytes(change), len(change), path)
                upload(self._api, blob, Memory(change, self.where), self._pauses)
                found.append(_large_file(blob))
            else:
                found.append(_operation(path, change))
        return found


_Changes = dict[str, bytes | Descriptor | None]


def _operation(path: str, change: bytes | Descriptor | None) -> dict[str, Any]:
    if change is None:
        return {"key": "deletedFile", "value": {"path": path}}
    if isinstance(change, Descriptor):
        return _large_file(change)
    content = base64.b64encode(change).decode()
    return {"key": "file", "value": {"path": path, "encoding": "base64", "content": content}}


def _large_file(blob: Descriptor) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": blob.path, "algo": "sha256", "oid": blob.digest[7:], "size": blob.size}}


def _whole(source: Source, blob: Descriptor, pauses: Sequence[float]) -> bytes:
    """All bytes of a blob of `source`, which are right."""
    data, buffer = bytearray(), memoryview(bytearray(min(CHUNK, blob.size + 1)))
    with Steady(source, blob, pauses=pauses) as reader:
        while len(data) <= blob.size and (n := reader.readinto(buffer)):
            data += buffer[:n]
    whole = bytes(data)
    if len(whole) != blob.size or sha256_bytes(whole) != blob.digest:
        where = f"{source.where}: {blob.path or blob.digest}"
        raise IntegrityError(where, f"{len(whole)} bytes were read that are not the {blob.size} of {blob.digest}")
    return whole
