"""Versions in a repository on a hub: commits, and the manifest of the adapter in each, built from its adapter.json.

A commit without an adapter.json has a manifest too: that of the files in it that belong to an adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice

from adapterhub.bases.hub_address import MAIN
from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.manifest.package_files import MAX_FILES, SIGNATURE
from adapterhub.registry import version_selection, withdrawals
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import hub_files
from .hub_client import COMMIT, HubAddress, HubClient, Listing

MAX_ADAPTER_JSON = 16 << 20  # bytes of an adapter.json
_MAX_PLAIN = 32 << 20  # bytes of a file without a digest in the listing; hubs accept some 10 MB as such
_MAX_BRANCHES, _MAX_HEADS, _MAX_CANDIDATES = 10, 50, 100  # that are searched for a digest


@dataclass(frozen=True)
class Version:
    """A commit: its files on the hub, and the manifest of the adapter in it."""

    listing: Listing
    manifest: Manifest


class Versions:
    """The versions of one repository that were read, and their content.

    Attributes:
        content: Verified bytes of small files.
        large: Large files that the hub has.
        places: The commit and path where each file is.
        notes: Remarks for the user, to which the files that do not belong to an adapter are added.
    """

    def __init__(self, client: HubClient, address: HubAddress, notes: list[str]) -> None:
        self._client, self.address, self.notes = client, address, notes
        self._by_commit: dict[str, Version] = {}
        self.content: dict[Digest, bytes] = {}
        self.large: set[Digest] = set()
        self.places: dict[Digest, tuple[str, str]] = {}

    def __iter__(self) -> Iterator[Version]:
        return iter(list(self._by_commit.values()))

    def find(self, reference: str) -> Version:
        """Return the version of a branch, tag, commit, range or digest."""
        if reference.startswith("sha256:"):
            return self._by_digest(reference)
        if version_selection.is_range(reference):
            reference = self._name_in_range(reference)
        return self.version_at(self._client.listing(reference))

    def resolve(self, reference: str) -> Digest:
        """Return the digest of the version that `find` returns; a hub of ours tells it with the commit, and no file is read."""
        if version_selection.is_range(reference):
            reference = self._name_in_range(reference)
        if not reference.startswith("sha256:"):
            listing = self._client.listing(reference)
            return listing.digest or self.version_at(listing).manifest.digest
        if not version_selection.is_prefix(reference):
            # On a hub of ours a commit has the first digits of the digest.
            with contextlib.suppress(NotFoundError):
                if self._client.listing(reference.removeprefix("sha256:")[:COMMIT]).digest == reference:
                    return reference
        return self.find(reference).manifest.digest

    def version_at(self, listing: Listing) -> Version:
        """Return the version in a commit; its adapter.json is read only once."""
        version = self._by_commit.get(listing.commit)
        if version is None:
            manifest = (
                self._manifest_of_adapter_json(listing) if ADAPTER_JSON in listing.files else self._manifest_of_files(listing)
            )
            version = self._by_commit[listing.commit] = Version(listing, manifest)
            for layer in manifest.layers:
                self.places.setdefault(layer.digest, (listing.commit, layer.path))
                entry = listing.files.get(layer.path)
                if entry and entry.digest == layer.digest:
                    self.large.add(layer.digest)
            self.content[manifest.config.digest] = manifest.config_bytes
        return version

    def _manifest_of_adapter_json(self, listing: Listing) -> Manifest:
        """Build the manifest from adapter.json.

        Raises:
            IntegrityError: A file in it is missing, or the listing shows that it has changed.
        """
        label = self.address.with_reference(listing.commit)
        raw = self.read_small_file(listing, ADAPTER_JSON, MAX_ADAPTER_JSON)
        manifest = hub_files.assemble_manifest(raw, f"{label}: {ADAPTER_JSON}")
        for layer in manifest.layers:
            entry = listing.files.get(layer.path)
            if entry is None:
                raise IntegrityError(f"{label}: {layer.path}", f"missing, but {ADAPTER_JSON} lists it", "Push it again")
            # The card may have been completed; its bytes are checked when they are read.
            is_unaltered = layer.path != hub_files.CARD
            differs = (entry.digest or layer.digest) != layer.digest or entry.size not in (None, layer.size)
            if is_unaltered and differs and layer.path != ADAPTER_JSON:
                raise IntegrityError(f"{label}: {layer.path}", f"has changed since {ADAPTER_JSON} was written", "Push it again")
        self.content[sha256_bytes(raw)] = raw
        return manifest

    def read_small_file(self, listing: Listing, path: str, limit: int) -> bytes:
        """Return the content of a file, verified against the listing by its digest, else by git's name of the blob."""
        data, entry = self._client.read_small_file(listing.commit, path, limit), listing.files[path]
        if (entry.digest or entry.oid) and not hub_files.matches_entry(entry, data):
            label = f"{self.address.repository}: {path}"
            raise IntegrityError(label, "the hub sent other bytes than its commit has", "Try again")
        return data

    def _manifest_of_files(self, listing: Listing) -> Manifest:
        """Build a manifest for a commit without an adapter.json; files that do not belong to an adapter are left out."""
        label = self.address.with_reference(listing.commit)
        names, skipped = hub_files.split_importable(listing, label)
        if len(names) > MAX_FILES:
            raise RefusedError(label, f"{len(names)} files are over the limit of {MAX_FILES}")
        files, bytes_left = {}, self._client.bounds.plain
        for path in names:
            entry = listing.files[path]
            digest, size = entry.digest, entry.size
            if digest is None or size is None:
                # The listing has no SHA-256 of a file in git itself: read it, within the limit for the whole repository.
                data = self.read_small_file(listing, path, min(_MAX_PLAIN, bytes_left))
                digest, size = sha256_bytes(data), len(data)
                bytes_left -= size
                self.content[digest] = data
            files[path] = digest, size
        self.notes += [f"left out: {path[:200]}" for path in skipped if path != SIGNATURE]
        return oci_manifest.of_files(files, label)

    def _name_in_range(self, reference: str) -> str:
        """Return the branch or tag that a range selects."""
        refs = self._client.refs()
        commits = {**refs.tags, **refs.branches}
        name = version_selection.highest_tag_in_range(
            reference, lambda: sorted(commits), commits.get, self.address.with_reference(reference)
        )
        if name is None:
            problem = "no branch or tag is in this range"
            raise NotFoundError(
                self.address.with_reference(reference), problem, code="no-such-tag", repository=self.address.repository
            )
        return name

    def _by_digest(self, digest: Digest) -> Version:
        """Return the version with a digest, or the only one whose digest starts with these digits."""
        versions: dict[Digest, Version] = {}
        for version in self._versions_matching(digest):
            versions[version.manifest.digest] = version
            # Only a prefix can match a second version, which `matching_digest` reports.
            if not version_selection.is_prefix(digest):
                break
        chosen = version_selection.matching_digest(digest, versions, self.address.with_reference(digest))
        if chosen is None:
            problem = "no such version in this repository"
            raise NotFoundError(
                self.address.with_reference(digest), problem, code="no-such-tag", repository=self.address.repository
            )
        return versions[chosen]

    def _versions_matching(self, digest: Digest) -> Iterator[Version]:
        """Yield the versions whose digest starts with `digest`: first those already read, then commits that may have it."""
        yield from [version for version in self._by_commit.values() if version.manifest.digest.startswith(digest)]
        for commit in dict.fromkeys(islice(self._candidate_commits(digest), _MAX_CANDIDATES)):
            try:
                version = self.version_at(self._client.listing(commit))
            except (IntegrityError, NotFoundError):
                continue
            except RefusedError as error:
                # On a hub of ours a commit has the first digits of the digest: then it is this version that is refused.
                if error.code == withdrawals.CODE and commit.startswith(digest.removeprefix("sha256:")[:COMMIT]):
                    raise
                continue
            if version.manifest.digest.startswith(digest):
                yield version
            else:
                del self._by_commit[commit]  # a listing may take 64 MB

    def _candidate_commits(self, digest: Digest) -> Iterator[str]:
        """Yield commits that may be a version: those with its digest in the title, then the heads of branches and tags."""
        refs = self._client.refs()
        for branch in sorted(refs.branches, key=lambda name: (name != MAIN, name))[:_MAX_BRANCHES]:
            with contextlib.suppress(NotFoundError):
                yield from (commit for commit, title in self._client.commit_titles(branch) if digest in title)
        yield from list(dict.fromkeys([*refs.branches.values(), *refs.tags.values()]))[:_MAX_HEADS]
