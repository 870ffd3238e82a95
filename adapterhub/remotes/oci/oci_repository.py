"""An adapter in an OCI registry, by the distribution-spec v1.1: `oci://host/name`.

Blobs are uploaded in pieces (`blob_upload`) and downloaded by range. A registry is not trusted: everything it sends is hashed,
and the digest that it reports for what it stored is compared.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, is_hex, parse_digest, sha256_bytes
from adapterhub.http.client import PAUSES
from adapterhub.http.responses import Response
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, Descriptor, Manifest
from adapterhub.ref import is_tag
from adapterhub.registry import version_selection
from adapterhub.remotes.download import ResumingReader, check_range
from adapterhub.remotes.layouts import layout_index
from adapterhub.remotes.layouts.layout_index import INDEX_TYPE
from adapterhub.remotes.parallel_transfer import unwrapped
from adapterhub.remotes.protocol import OpenRemote, PutResult, Reader, Source
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError, RemoteError

from . import docker_credentials, version_numbers
from .blob_upload import MAX_PIECE, PIECE, Uploader
from .docker_credentials import Credentials
from .oci_address import OciAddress
from .registry_client import DIGEST_HEADER, RegistryClient, check_digest
from .upload_notes import UploadNotes

if TYPE_CHECKING:
    from adapterhub.remotes.remote_address import UserSettings

_MAX_TAGS, _MAX_REFERRERS = 100_000, 10_000
_NUMBER_HEADER = "adapterhub-version"
_CANNOT_UNTAG = (400, 404, 405, 501)  # to DELETE a tag; docker-registry 2.8 takes a digest only
# The other types are accepted only so that the error can name the type of what is there.
_ACCEPTED = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)


def parse(text: str) -> OciAddress:
    """Parse the address of a repository in a registry, with or without a version."""
    return OciAddress.parse(text)


def connect(address: OciAddress, surroundings: UserSettings) -> OciRepository:
    """Open the repository, with the credentials in docker's config.json."""
    return OciRepository(address, surroundings.docker, uploads=surroundings.uploads, proxy=surroundings.proxy)


class OciRepository(OpenRemote):
    """One repository in a registry, to be closed after use.

    Attributes:
        config: docker's config.json, for the credentials.
        pauses: Seconds to wait before each further try.
        piece, largest: Size in bytes of the first PATCH of a blob, and the maximum for any.
        uploads: The folder that records the progress of uploads, for the next run; None to record nothing.
        proxy: The proxy for a scheme and a host.
        credentials: Credentials to use in place of those in `config`.
    """

    kind, at_once = "an OCI registry", 8
    hides_signature_tags = True

    def __init__(
        self,
        address: OciAddress,
        config: Path | None = None,
        *,
        pauses: Sequence[float] = PAUSES,
        piece: int = PIECE,
        largest: int = MAX_PIECE,
        uploads: Path | None = None,
        proxy: ProxyOf = no_proxy,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__()
        self.address = address

        def find() -> Credentials | None:
            return credentials or docker_credentials.find_credentials(address.host, config, plain=address.is_plaintext)

        self._client = RegistryClient.open(self.location, address, find, pauses=pauses, proxy=proxy)
        self._pauses = pauses
        self._uploader = Uploader(
            self._client, address, UploadNotes(uploads, self.location), piece=piece, largest=largest, pauses=pauses
        )

    @property
    def location(self) -> str:
        """The address without a version."""
        return self.address.repository

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stop(self, *, on: bool = True) -> None:
        """Make waiting threads fail at once, until called again with `on` False."""
        self._client.stop(on=on)

    def as_referring_target(self) -> OciRepository:
        """Return the repository itself."""
        return self

    def as_unnamed_target(self) -> OciRepository:
        """Return the repository itself."""
        return self

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """Return the manifest of a reference, verified against the digest that was requested or that the registry names."""
        try:
            raw = self.read_document(self._resolve(reference))
        except NotFoundError:
            # A tag that does not exist may still be a version like `1.2`, which selects the newest tag below it.
            if version_selection.is_range(reference) or (tag := self._tag_in_range(reference)) is None:
                raise
            raw = self.read_document(tag)
        return oci_manifest.parse(raw, self._label_at(reference))

    def _resolve(self, reference: str) -> str:
        """Return the tag or full digest that a range or a digest's first digits select; any other reference unchanged."""
        if version_selection.is_prefix(reference):
            resolved = version_selection.matching_digest(
                reference, version_numbers.digests_by_tag(self, self.tags()).values(), self._label_at(reference)
            )
        elif version_selection.is_range(reference):
            resolved = self._tag_in_range(reference)
        else:
            return reference
        if resolved is None:
            raise self._missing_error(reference)
        return resolved

    def _tag_in_range(self, reference: str) -> str | None:
        return version_selection.highest_tag_in_range(reference, self.tags, self.digest_of, self._label_at(reference))

    def _missing_error(self, reference: str) -> NotFoundError:
        problem = "no such version in this registry"
        return NotFoundError(self._label_at(reference), problem, code="no-such-tag", repository=self.location)

    def digest_of(self, reference: str) -> Digest | None:
        """Return the digest of the manifest that a tag or digest refers to now, by a HEAD; None without one."""
        url, headers = self.address.manifest_url(reference), {"Accept": _ACCEPTED}
        label = self._label_at(reference)
        try:
            response = self._client.request("HEAD", url, label, good=(200,), scope=self.address.scope(), headers=headers)
        except NotFoundError:
            return None
        stored = response.headers.get(DIGEST_HEADER)
        return parse_digest(stored, label) if stored else sha256_bytes(self.read_document(reference))

    def resolve(self, reference: str) -> Digest:
        """Return the digest of what a reference names now, by a HEAD, which registries count as no download."""
        chosen = self._resolve(reference)
        try:
            digest = self.digest_of(chosen)
        except RefusedError:
            return self.manifest(chosen).digest  # raises the same error with the reason, which is in the body of a GET
        if digest is None:
            raise self._missing_error(reference)
        return digest

    def read_document(self, reference: str) -> bytes:
        """Return the bytes of a manifest or an index, verified in the same way."""
        label = self._label_at(reference)
        url = self.address.manifest_url(reference)
        headers = {"Accept": _ACCEPTED}
        try:
            response = self._client.request(
                "GET", url, label, good=(200,), scope=self.address.scope(), headers=headers, limit=MAX_MANIFEST
            )
        except NotFoundError as error:
            raise self._missing_error(reference) from error
        digest = sha256_bytes(response.body)
        # For a tag, the registry's header is the only digest to compare with.
        expected_digest = reference if ":" in reference else response.headers.get(DIGEST_HEADER)
        if expected_digest is not None and expected_digest != digest:
            raise IntegrityError(label, f"received the manifest {digest}, not {expected_digest[:80]}", "Ask its owner")
        return response.body

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob for reading from `start` on; if the registry does not support ranges, the bytes before are discarded."""
        if start and start >= blob.size:
            yield io.BytesIO()
            return
        label = f"{self.location}: {blob.path or blob.digest}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._client.stream(
            self.address.blob_url(blob.digest), label, scope=self.address.scope(), headers=headers
        ) as body:
            check_range(body, blob, start, label)
            yield body

    def referrers(self, digest: Digest) -> list[dict[str, Any]] | None:
        """Return the descriptors of the manifests about a manifest; None from a registry without the referrers API."""
        entries: list[dict[str, Any]] = []
        url = f"{self.address.repository_url}/referrers/{digest}"
        try:
            for response in self._client.pages(url, self.location, scope=self.address.scope(), limit=MAX_MANIFEST):
                if not response.headers.get("content-type", "").startswith(INDEX_TYPE):
                    # A server that answers any URL with some page has no referrers API either.
                    return None
                entries += layout_index.parse(response.body, f"{self.location}: referrers")
                if len(entries) > _MAX_REFERRERS:
                    break
        except NotFoundError:
            return None
        return entries

    def tags(self) -> list[str]:
        """Return all tags, sorted, without those made of a digest, which are for attachments (`referrers`) and signatures."""
        tags: set[str] = set()
        for response in self._client.pages(
            f"{self.address.repository_url}/tags/list", self.location, scope=self.address.scope(), limit=MAX_MANIFEST
        ):
            try:
                page = json_file.parse_object(response.body, self.location)["tags"] or []
                page_tags = {tag for tag in page if isinstance(tag, str) and is_tag(tag)}
            except (FormatError, KeyError, TypeError) as error:
                raise FormatError(self.location, "the registry's answer is not a list of tags") from error
            # A registry that ignores the cursor would send the first page forever.
            if page_tags <= tags:
                break
            tags |= page_tags
            if len(tags) > _MAX_TAGS:
                raise RemoteError(self.location, f"it lists more than {_MAX_TAGS} tags")
        return sorted(tag for tag in tags if not (tag.startswith("sha256-") and is_hex(tag[7:71])))

    def open_digest(self, digest: Digest) -> Any:
        """Open a blob or manifest by digest as an unbuffered file of unverified bytes; None if absent."""
        try:
            # The digest may be a blob's or a manifest's: try the blob first.
            response = self._client.request(
                "HEAD", self.address.blob_url(digest), self.location, good=(200,), scope=self.address.scope()
            )
            size = response.number("content-length") or 0
            return ResumingReader(self, Descriptor("", digest, size), pauses=self._pauses)
        except NotFoundError:
            with contextlib.suppress(NotFoundError):
                return io.BytesIO(self.manifest(digest).raw)
            return None

    # ---- writing

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether the repository has a blob, by a HEAD."""
        return self._uploader.has_blob(blob, self.location)

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Send a blob, or let the registry mount it if `source` is another of its repositories.

        An upload that an earlier run began is resumed if the registry still has it.
        """
        # A mount needs the source's own address, behind the wrappers that count its bytes.
        origin = unwrapped(source)
        address = self.address
        mount = (
            origin.address
            if isinstance(origin, OciRepository) and origin.address.registry_url == address.registry_url
            else None
        )
        label = f"{self.location}: {blob.path or blob.digest}"
        return self._uploader.put_blob(blob, source, label, mount=mount if mount and mount.name != address.name else None)

    def put_unnamed(self, size: int, path: str, source: Source) -> Digest:
        """Send a blob of `size` bytes, hashed while it is sent; return its digest. Only for a repository that `is_new`."""
        return self._uploader.put_unnamed(size, path, source, f"{self.location}: {path}")

    def is_new(self) -> bool:
        """Return whether the repository is empty: it has no tag, and no blob of an unfinished push from this machine."""
        if not self._uploader.notes.can_store or self._uploader.notes.has_notes():
            return False
        try:
            self.tags()
        except NotFoundError:
            return True
        except (RemoteError, FormatError):  # the push reports it
            return False
        return False

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        """Store the manifest under its digest, then under a number and the tag."""
        result = version_numbers.put_numbered(self, manifest, tag)
        self._uploader.notes.remove_all()
        return result

    def put_reference(self, manifest: Manifest, reference: str) -> int | None:
        """Put a manifest under its digest, or a tag.

        Returns:
            The number that a hub gives it, 0 if the hub gives none; None from a registry that is no hub.
        """
        number_header = self._put_document(manifest.raw, manifest.digest, reference, MANIFEST_TYPE).headers.get(_NUMBER_HEADER)
        return None if number_header is None else version_selection.number(number_header) or 0

    def untag(self, tag: str) -> None:
        """Remove a tag, if the registry can do so without removing the version."""
        if self.digest_of(tag) is None:
            raise self._missing_error(tag)
        url = self.address.manifest_url(tag)
        scope = f"repository:{self.address.name}:pull,push,delete"
        response = self._client.request("DELETE", url, self._label_at(tag), good=(202, *_CANNOT_UNTAG), scope=scope)
        if response.status in _CANNOT_UNTAG:
            raise RefusedError(self._label_at(tag), "this registry cannot remove a tag and keep the version", "Move it instead")

    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index under its digest, or a tag; return whether the registry lists it by its subject."""
        media_type = json_file.parse_object(raw, self.location).get("mediaType", MANIFEST_TYPE)
        return "oci-subject" in self._put_document(raw, digest, name or digest, str(media_type)).headers

    def _put_document(self, raw: bytes, digest: Digest, reference: str, media_type: str) -> Response:
        label = self._label_at(reference)
        response = self._client.request(
            "PUT",
            self.address.manifest_url(reference),
            label,
            good=(200, 201),
            scope=self.address.scope(write=True),
            headers={"Content-Type": media_type},
            body=raw,
        )
        check_digest(response, digest, label)
        return response

    def _label_at(self, reference: str) -> str:
        return f"{self.location}{'@' if ':' in reference else ':'}{reference}"
