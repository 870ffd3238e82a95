"""Versions in a repository of a hub: commits, and the manifest of the adapter in each, built from its adapter.json.

A repository without an adapter.json has a manifest too, of the files in it that belong to an adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from adapterhub import references
from adapterhub.bases.hub_address import MAIN
from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.manifest.package_files import MAX_FILES
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError

from . import files as hub_files
from .client import HubAddress, HubClient, Listing

MAX_ADAPTER_JSON = 16 << 20  # bytes of an adapter.json
_MAX_PLAIN = 32 << 20  # bytes of a file without a digest in the listing; hubs accept some 10 MB as such
_BRANCHES, _HEADS, _CANDIDATES = 10, 50, 100  # that are searched for a digest


@dataclass(frozen=True)
class Version:
    """A commit: its files on the hub, and the manifest of the adapter in it."""

    listing: Listing
    made: Manifest


class Versions:
    """The versions of one repository that were read, and what they contain.

    Attributes:
        content: Verified bytes of small files.
        large: Large files that the hub has.
        places: The commit and the path of a file.
        notes: The list to which the files are added that do not belong to an adapter.
    """

    def __init__(self, client: HubClient, address: HubAddress, notes: list[str]) -> None:
        self._client, self.address, self.notes = client, address, notes
        self._known: dict[str, Version] = {}
        self.content: dict[Digest, bytes] = {}
        self.large: set[Digest] = set()
        self.places: dict[Digest, tuple[str, str]] = {}

    def __iter__(self) -> Iterator[Version]:
        return iter(list(self._known.values()))

    def find(self, reference: str) -> Version:
        """The version of a branch, tag, commit, range or digest."""
        if reference.startswith("sha256:"):
            return self._by_digest(reference)
        if references.is_range(reference):
            reference = self._in_range(reference)
        return self.at(self._client.listing(reference))

    def at(self, listing: Listing) -> Version:
        """The version in a commit, whose adapter.json is read once."""
        found = self._known.get(listing.commit)
        if found is None:
            made = self._made(listing) if ADAPTER_JSON in listing.files else self._imported(listing)
            found = self._known[listing.commit] = Version(listing, made)
            for layer in made.layers:
                self.places.setdefault(layer.digest, (listing.commit, layer.path))
                entry = listing.files.get(layer.path)
                if entry and entry.digest == layer.digest:
                    self.large.add(layer.digest)
            self.content[made.config.digest] = made.config_bytes
        return found

    def _made(self, listing: Listing) -> Manifest:
        """Build the manifest from adapter.json; IntegrityError if the listing shows that a file is another."""
        where = self.address.at(listing.commit)
        raw = self.small(listing, ADAPTER_JSON, MAX_ADAPTER_JSON)
        made = hub_files.assembled(raw, f"{where}: {ADAPTER_JSON}")
        for layer in made.layers:
            entry = listing.files.get(layer.path)
            if entry is None:
                raise IntegrityError(f"{where}: {layer.path}", f"missing, but {ADAPTER_JSON} lists it", "Push it again")
            own = layer.path != hub_files.CARD  # the card may have been completed; its bytes are checked when they are read
            other = (entry.digest or layer.digest) != layer.digest or entry.size not in (None, layer.size)
            if own and other and layer.path != ADAPTER_JSON:
                raise IntegrityError(f"{where}: {layer.path}", f"has changed since {ADAPTER_JSON} was written", "Push it again")
        self.content[sha256_bytes(raw)] = raw
        return made

    def small(self, listing: Listing, path: str, limit: int) -> bytes:
        """A whole file, verified against the listing: by its digest, else by git's name of the blob."""
        data, entry = self._client.small(listing.commit, path, limit), listing.files[path]
        if (entry.digest or entry.oid) and not hub_files.same(entry, data):
            where = f"{self.address.repository}: {path}"
            raise IntegrityError(where, "the hub sent other bytes than its commit has", "Try again")
        return data

    def _imported(self, listing: Listing) -> Manifest:
        """Build a manifest for a repository without adapter.json; files that do not belong to an adapter are left out."""
        where = self.address.at(listing.commit)
        names, left = hub_files.importable(listing, where)
        if len(names) > MAX_FILES:
            raise RefusedError(where, f"{len(names)} files are over the limit of {MAX_FILES}")
        files, unread = {}, self._client.bounds.plain
        for path in names:
            entry = listing.files[path]
            digest, size = entry.digest, entry.size
            if digest is None or size is None:
                data = self.small(listing, path, min(_MAX_PLAIN, unread))
                digest, size = sha256_bytes(data), len(data)
                unread -= size
                self.content[digest] = data
            files[path] = digest, size
        self.notes += [f"left out: {path[:200]}" for path in left]
        return hub_files.bare(files, where)

    def _in_range(self, reference: str) -> str:
        """The branch or tag that a range selects."""
        refs = self._client.refs()
        commits = {**refs.tags, **refs.branches}
        found = references.in_range(reference, lambda: sorted(commits), commits.get, self.address.at(reference))
        if found is None:
            what = "no branch or tag is in this range"
            raise NotFoundError(self.address.at(reference), what, code="no-such-tag", repository=self.address.repository)
        return found

    def _by_digest(self, digest: Digest) -> Version:
        """The version with a digest, or whose digest alone begins so."""
        found: dict[Digest, Version] = {}
        for version in self._matching(digest):
            found[version.made.digest] = version
            if not references.is_prefix(digest):
                break
        chosen = references.begins(digest, found, self.address.at(digest))
        if chosen is None:
            what = "no such version in this repository"
            raise NotFoundError(self.address.at(digest), what, code="no-such-tag", repository=self.address.repository)
        return found[chosen]

    def _matching(self, digest: Digest) -> Iterator[Version]:
        yield from [version for version in self._known.values() if version.made.digest.startswith(digest)]
        for commit in dict.fromkeys(islice(self._candidates(digest), _CANDIDATES)):
            with contextlib.suppress(IntegrityError, NotFoundError, RefusedError):
                version = self.at(self._client.listing(commit))
                if version.made.digest.startswith(digest):
                    yield version
                else:
                    del self._known[commit]  # a listing may take 64 MB

    def _candidates(self, digest: Digest) -> Iterator[str]:
        """Commits that may be a version: those with its digest in the title, then the heads of branches and tags."""
        refs = self._client.refs()
        for branch in sorted(refs.branches, key=lambda name: (name != MAIN, name))[:_BRANCHES]:
            with contextlib.suppress(NotFoundError):
                yield from (commit for commit, title in self._client.titles(branch) if digest in title)
        yield from list(dict.fromkeys([*refs.branches.values(), *refs.tags.values()]))[:_HEADS]
