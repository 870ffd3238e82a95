"""An adapter in an OCI registry, by the distribution-spec v1.1: `oci://host/name`.

Blobs are uploaded in pieces (`upload`) and downloaded by range. A registry is not trusted: what it sends is hashed, and the
digest of what it stored is compared.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import references
from adapterhub.digest import Digest, is_hex, parse_digest, sha256_bytes
from adapterhub.http.client import PAUSES, Answer
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, Descriptor, Manifest
from adapterhub.ref import is_tag
from adapterhub.remotes.download import Steady, seek
from adapterhub.remotes.layouts import index as layout_index
from adapterhub.remotes.layouts.index import INDEX_TYPE
from adapterhub.remotes.parallel import unwatched
from adapterhub.remotes.protocol import Connected, Put, Reader, Source
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError, RemoteError

from . import credentials, numbers
from .address import Address
from .client import DIGEST_HEADER, RegistryClient, check_digest
from .credentials import Credentials
from .upload import LARGEST, PIECE, Uploader
from .upload_notes import Uploads

if TYPE_CHECKING:
    from adapterhub.remotes.location import Surroundings

_MAX_TAGS, _MAX_REFERRERS = 100_000, 10_000
_NUMBER_HEADER = "adapterhub-version"
_UNSUPPORTED = (400, 404, 405, 501)  # to DELETE a tag; docker-registry 2.8 takes a digest only
# The other types only for an error that names the type.
_ACCEPTED = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)


def parse(text: str) -> Address:
    """Parse the address of a repository of a registry, with or without a version."""
    return Address.parse(text)


def connect(address: Address, who: Surroundings) -> Oci:
    """Open the repository, with the credentials in docker's config.json."""
    return Oci(address, who.docker, uploads=who.uploads, proxy=who.proxy)


class Oci(Connected):
    """One repository of a registry; `close` it in the end.

    Attributes:
        config: docker's config.json, for the credentials.
        pauses: Seconds before another try.
        piece, largest: Bytes of the first PATCH of a blob, and of any.
        uploads: The folder that records how far uploads have come, for the next run; None to record nothing.
        proxy: The proxy for a scheme and a host.
    """

    kind, at_once = "an OCI registry", 8

    def __init__(
        self,
        address: Address,
        config: Path | None = None,
        *,
        pauses: Sequence[float] = PAUSES,
        piece: int = PIECE,
        largest: int = LARGEST,
        uploads: Path | None = None,
        proxy: ProxyOf = no_proxy,
    ) -> None:
        super().__init__()
        self.address = address

        def find() -> Credentials | None:
            return credentials.find(address.host, config, plain=address.plain)

        self._client = RegistryClient.to(self.where, address, find, pauses=pauses, proxy=proxy)
        self._pauses = pauses
        self._uploader = Uploader(
            self._client, address, Uploads(uploads, self.where), piece=piece, largest=largest, pauses=pauses
        )

    @property
    def where(self) -> str:
        """The address without a version."""
        return self.address.repository

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def stop(self, *, on: bool = True) -> None:
        """Have what other threads wait for here fail at once, until called with `on` False."""
        self._client.stop(on=on)

    def referring(self) -> Oci:
        """Itself."""
        return self

    def unnamed(self) -> Oci:
        """Itself."""
        return self

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a reference, verified against the digest that was requested, or that the registry names."""
        try:
            raw = self.document(self._selected(reference))
        except NotFoundError:
            if references.is_range(reference) or (tag := self._in_range(reference)) is None:
                raise
            raw = self.document(tag)
        return oci_manifest.parse(raw, self._at(reference))

    def _selected(self, reference: str) -> str:
        """The tag or whole digest of a range or of the first digits; any other reference as it is."""
        if references.is_prefix(reference):
            found = references.begins(reference, numbers.digests(self, self.tags()).values(), self._at(reference))
        elif references.is_range(reference):
            found = self._in_range(reference)
        else:
            return reference
        if found is None:
            raise self._missing(reference)
        return found

    def _in_range(self, reference: str) -> str | None:
        return references.in_range(reference, self.tags, self.digest_of, self._at(reference))

    def _missing(self, reference: str) -> NotFoundError:
        what = "no such version in this registry"
        return NotFoundError(self._at(reference), what, code="no-such-tag", repository=self.where)

    def digest_of(self, reference: str) -> Digest | None:
        """The digest of the manifest that a tag or a digest is at now, by a HEAD; None without one."""
        url, headers = self.address.manifest_url(reference), {"Accept": _ACCEPTED}
        where = self._at(reference)
        try:
            answer = self._client.ask("HEAD", url, where, good=(200,), scope=self.address.scope(), headers=headers)
        except NotFoundError:
            return None
        stored = answer.headers.get(DIGEST_HEADER)
        return parse_digest(stored, where) if stored else sha256_bytes(self.document(reference))

    def document(self, reference: str) -> bytes:
        """The bytes of a manifest or an index, verified in the same way."""
        where = self._at(reference)
        url = self.address.manifest_url(reference)
        headers = {"Accept": _ACCEPTED}
        try:
            answer = self._client.ask(
                "GET", url, where, good=(200,), scope=self.address.scope(), headers=headers, limit=MAX_MANIFEST
            )
        except NotFoundError as error:
            raise self._missing(reference) from error
        digest = sha256_bytes(answer.body)
        wanted = reference if ":" in reference else answer.headers.get(DIGEST_HEADER)
        if wanted is not None and wanted != digest:
            raise IntegrityError(where, f"received the manifest {digest}, not {wanted[:80]}", "Ask its owner")
        return answer.body

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a blob from `start` on; if the registry does not support ranges, those before are discarded."""
        if start and start >= blob.size:
            yield io.BytesIO()
            return
        where = f"{self.where}: {blob.path or blob.digest}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._client.stream(
            self.address.blob_url(blob.digest), where, scope=self.address.scope(), headers=headers
        ) as body:
            seek(body, blob, start, where)
            yield body

    def referrers(self, digest: Digest) -> list[dict[str, Any]] | None:
        """The descriptors of the manifests about a manifest; None for a registry without the referrers API."""
        found: list[dict[str, Any]] = []
        url = f"{self.address.root}/referrers/{digest}"
        try:
            for answer in self._client.pages(url, self.where, scope=self.address.scope(), limit=MAX_MANIFEST):
                if not answer.headers.get("content-type", "").startswith(INDEX_TYPE):
                    return None  # a page of a server that answers any URL
                found += layout_index.parse(answer.body, f"{self.where}: referrers")
                if len(found) > _MAX_REFERRERS:
                    break
        except NotFoundError:
            return None
        return found

    def tags(self) -> list[str]:
        """All tags, sorted, without those of attachments (`referrers`) and of signatures, which are made of a digest."""
        found: set[str] = set()
        for answer in self._client.pages(
            f"{self.address.root}/tags/list", self.where, scope=self.address.scope(), limit=MAX_MANIFEST
        ):
            try:
                page = json_file.parse_object(answer.body, self.where)["tags"] or []
                new = {tag for tag in page if isinstance(tag, str) and is_tag(tag)}
            except (FormatError, KeyError, TypeError) as error:
                raise FormatError(self.where, "the registry's answer is not a list of tags") from error
            if new <= found:
                break
            found |= new
            if len(found) > _MAX_TAGS:
                raise RemoteError(self.where, f"it lists more than {_MAX_TAGS} tags")
        return sorted(tag for tag in found if not (tag.startswith("sha256-") and is_hex(tag[7:71])))

    def find(self, digest: Digest) -> Any:
        """An unbuffered file with the unverified bytes of a digest, blob or manifest, to be closed; None without one."""
        try:
            answer = self._client.ask(
                "HEAD", self.address.blob_url(digest), self.where, good=(200,), scope=self.address.scope()
            )
            size = answer.number("content-length") or 0
            return Steady(self, Descriptor("", digest, size), pauses=self._pauses)
        except NotFoundError:
            with contextlib.suppress(NotFoundError):
                return io.BytesIO(self.manifest(digest).raw)
            return None

    # ---- writing

    def has(self, blob: Descriptor) -> bool:
        """Tell whether the repository has a blob, by a HEAD."""
        return self._uploader.has(blob, self.where)

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Send a blob, or have the registry mount it if `source` is another of its repositories.

        An upload that an earlier run began is resumed if the registry still has it.
        """
        other = unwatched(source)
        here = self.address
        mount = other.address if isinstance(other, Oci) and other.address.base == here.base else None
        where = f"{self.where}: {blob.path or blob.digest}"
        return self._uploader.put(blob, source, where, mount=mount if mount and mount.name != here.name else None)

    def put_unnamed(self, size: int, path: str, source: Source) -> Digest:
        """Send a blob of `size` bytes, hashed while it is sent; return its digest. Only if `is_new`: else it may be there."""
        return self._uploader.put_unnamed(size, path, source, f"{self.where}: {path}")

    def is_new(self) -> bool:
        """Tell whether the repository is empty: it has no tag, and no blob of an unfinished push from here."""
        if not self._uploader.notes.kept or self._uploader.notes.any():
            return False
        try:
            self.tags()
        except NotFoundError:
            return True
        except (RemoteError, FormatError):  # reported where it matters
            return False
        return False

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Store the manifest under its digest, then under a number and the tag."""
        done = numbers.put(self, made, tag)
        self._uploader.notes.clear()
        return done

    def point(self, made: Manifest, reference: str) -> int | None:
        """Put a manifest under its digest, or a tag; return the number that a hub gives it, 0 for none; None elsewhere."""
        said = self._put_document(made.raw, made.digest, reference, MANIFEST_TYPE).headers.get(_NUMBER_HEADER)
        return None if said is None else references.number(said) or 0

    def untag(self, tag: str) -> None:
        """Remove a tag, if the registry can without removing the version."""
        if self.digest_of(tag) is None:
            raise self._missing(tag)
        url = self.address.manifest_url(tag)
        scope = f"repository:{self.address.name}:pull,push,delete"
        answer = self._client.ask("DELETE", url, self._at(tag), good=(202, *_UNSUPPORTED), scope=scope)
        if answer.status in _UNSUPPORTED:
            raise RefusedError(self._at(tag), "this registry cannot remove a tag and keep the version", "Move it instead")

    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index under its digest, or a tag; return whether the registry lists it by its subject."""
        kind = oci_manifest.parse_json(raw, self.where).get("mediaType", MANIFEST_TYPE)
        return "oci-subject" in self._put_document(raw, digest, name or digest, str(kind)).headers

    def _put_document(self, raw: bytes, digest: Digest, reference: str, kind: str) -> Answer:
        where = self._at(reference)
        answer = self._client.ask(
            "PUT",
            self.address.manifest_url(reference),
            where,
            good=(200, 201),
            scope=self.address.scope(write=True),
            headers={"Content-Type": kind},
            body=raw,
        )
        check_digest(answer, digest, where)
        return answer

    def _at(self, reference: str) -> str:
        return f"{self.where}{'@' if ':' in reference else ':'}{reference}"
