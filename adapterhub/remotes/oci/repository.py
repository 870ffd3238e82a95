"""An adapter in an OCI registry, by the distribution-spec v1.1: `oci://host/name`.

Blobs are uploaded in pieces, so that a broken connection costs one piece: the registry is asked how much it has, also by a
later run. They are downloaded by range. A registry is not trusted: what it sends is hashed, and the digest of what it stored is
compared.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from adapterhub.digest import Digest, is_hex, parse_digest, sha256_bytes
from adapterhub.http.client import PAUSES, Answer
from adapterhub.http.errors import AgainError, DeniedError, GivenUpError
from adapterhub.http.urls import ProxyOf, no_proxy, resolved
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, Descriptor, Manifest
from adapterhub.ref import is_tag
from adapterhub.remotes import references
from adapterhub.remotes.download import Steady, pass_over
from adapterhub.remotes.layouts import index as layout_index
from adapterhub.remotes.layouts.index import INDEX_TYPE
from adapterhub.remotes.parallel import unwatched
from adapterhub.remotes.protocol import Connected, Put, Reader, Source
from adapterhub_converters import linear
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError, RemoteError

from . import credentials, numbers
from .address import Address
from .client import RegistryClient
from .credentials import Credentials
from .upload import Begun, Note, Sending, Uploads, whole

if TYPE_CHECKING:
    from adapterhub.remotes.location import Surroundings

PIECE = 8 << 20  # bytes of one PATCH; some registries take none below 5 MiB
# Every piece costs an answer, and docker-registry flushes its disk: pieces grow as long as one takes less than a second.
_LARGEST = 128 << 20
_SMALL = 4 << 20  # bytes; a smaller blob is sent in one PUT
_MAX_TAGS, _MAX_REFERRERS = 100_000, 10_000
_UNSUPPORTED = (400, 404, 405, 501)  # to DELETE a tag; docker-registry 2.8 takes a digest only
_DIGEST_HEADER = "docker-content-digest"
_BYTES = {"Content-Type": "application/octet-stream"}
# The other types only for an error that names the type.
_ACCEPTED = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_FROM = linear.Pattern(r"bytes (\d{1,18})-")
_RANGE = linear.Pattern(r"(?:bytes=)?0-([0-9]{1,18})")


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
        largest: int = _LARGEST,
        uploads: Path | None = None,
        proxy: ProxyOf = no_proxy,
    ) -> None:
        super().__init__()
        self.address = address

        def find() -> Credentials | None:
            return credentials.find(address.host, config, plain=address.plain)

        self._client = RegistryClient.to(self.where, address, find, pauses=pauses, proxy=proxy)
        self._root = f"{address.base}/v2/{address.name}"
        self._pauses, self._piece, self._largest = pauses, piece, max(largest, piece)
        self._uploads = Uploads(uploads, self.address.repository)

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
        url, headers = f"{self._root}/manifests/{quote(reference, safe=':')}", {"Accept": _ACCEPTED}
        where = self._at(reference)
        try:
            answer = self._client.ask("HEAD", url, where, good=(200,), scope=self._scope(), headers=headers)
        except NotFoundError:
            return None
        said = answer.headers.get(_DIGEST_HEADER)
        return parse_digest(said, where) if said else sha256_bytes(self.document(reference))

    def document(self, reference: str) -> bytes:
        """The bytes of a manifest or an index, verified in the same way."""
        where = self._at(reference)
        url = f"{self._root}/manifests/{quote(reference, safe=':')}"
        headers = {"Accept": _ACCEPTED}
        try:
            answer = self._client.ask("GET", url, where, good=(200,), scope=self._scope(), headers=headers, limit=MAX_MANIFEST)
        except NotFoundError as error:
            raise self._missing(reference) from error
        digest = sha256_bytes(answer.body)
        wanted = reference if ":" in reference else answer.headers.get(_DIGEST_HEADER)
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
        with self._client.stream(self._blob(blob), where, scope=self._scope(), headers=headers) as body:
            left = blob.size - start
            if body.status == 206:
                said = _FROM.match(body.headers.get("content-range", ""))
                if not start or not said or int(said[1]) != start:
                    raise RemoteError(where, "the registry sends another range than requested")
            elif start:
                pass_over(body, start)
            if body.length is not None and body.length != (left if body.status == 206 else blob.size):
                raise IntegrityError(where, f"the registry has {body.length} bytes of it, not {left}", "Ask its owner")
            yield body

    def referrers(self, digest: Digest) -> list[dict[str, Any]] | None:
        """The descriptors of the manifests about a manifest; None for a registry without the referrers API."""
        found: list[dict[str, Any]] = []
        url = f"{self._root}/referrers/{digest}"
        try:
            for answer in self._client.pages(url, self.where, scope=self._scope(), limit=MAX_MANIFEST):
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
        for answer in self._client.pages(f"{self._root}/tags/list", self.where, scope=self._scope(), limit=MAX_MANIFEST):
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
            answer = self._client.ask("HEAD", f"{self._root}/blobs/{digest}", self.where, good=(200,), scope=self._scope())
            size = answer.number("content-length") or 0
            return Steady(self, Descriptor("", digest, size), pauses=self._pauses)
        except NotFoundError:
            with contextlib.suppress(NotFoundError):
                return io.BytesIO(self.manifest(digest).raw)
            return None

    # ---- writing

    def has(self, blob: Descriptor) -> bool:
        """Tell whether the repository has a blob, by a HEAD."""
        try:
            answer = self._client.ask("HEAD", self._blob(blob), self.where, good=(200,), scope=self._scope(write=True))
        except NotFoundError:
            return False
        said = answer.number("content-length")
        return said is None or said == blob.size

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Send a blob, or have the registry mount it if `source` is another of its repositories.

        An upload that an earlier run began is resumed if the registry still has it.
        """
        where = f"{self.where}: {blob.path or blob.digest}"
        if self._in_pieces(blob.size):
            for note in self._uploads.of(blob.size, blob.digest):
                sent = self._go_on(blob, source, note, where)
                if sent is not None:
                    return sent

        def once() -> int:
            mounted, session = self._begin(blob, source, where)
            if not mounted:
                with Sending(source, blob, pauses=self._pauses) as sending, self._note(blob.size) as note:
                    self._send(sending, session, note, where)
            return 0 if mounted else blob.size

        return int(self._client.tried(once, where))

    def put_unnamed(self, size: int, path: str, source: Source) -> Digest:
        """Send a blob of `size` bytes, hashed while it is sent; return its digest. Only if `is_new`: else it may be there."""
        where = f"{self.where}: {path}"

        def once() -> Digest:
            session = self._begin(None, source, where)[1]
            with Sending(source, Descriptor("", "", size, path), pauses=self._pauses) as sending, self._note(size) as note:
                self._send(sending, session, note, where)
                return sending.digest()

        return str(self._client.tried(once, where))

    def is_new(self) -> bool:
        """Tell whether the repository is empty: it has no tag, and no blob of an unfinished push from here."""
        if not self._uploads.kept or self._uploads.any():
            return False
        try:
            self.tags()
        except NotFoundError:
            return True
        except (RemoteError, FormatError):  # reported where it matters
            return False
        return False

    def _go_on(self, blob: Descriptor, source: Source, note: Note, where: str) -> int | None:
        """Resume an earlier upload; return how many bytes were sent, None if it cannot be resumed."""
        with note, Sending(source, blob, pauses=self._pauses) as sending:
            begun = note.read() if note.ours else None
            if begun is None:
                return None
            sending.pass_to(begun.sent)
            if begun.sent and sending.digest() != begun.of:
                return None
            try:
                url, there = self._status(begun.url, where)
                if not begun.sent <= there <= blob.size:
                    raise AgainError("the registry lost part of this upload")
                sending.pass_to(there)
                url = self._pieces(sending, url, there, note, where)
                self._finish(blob, url, b"", where)
            except (GivenUpError, DeniedError):
                raise
            except (AgainError, NotFoundError, RemoteError, IntegrityError):  # a new upload succeeds, or reports why not
                note.drop()
                return None
            note.write(replace(begun, url="", digest=blob.digest))
            return blob.size - there

    def _begin(self, blob: Descriptor | None, source: Source, where: str) -> tuple[bool, Answer]:
        """Begin an upload; return whether it was mounted instead, and the answer."""
        query, scope, other = "", self._scope(write=True), unwatched(source)
        if (
            blob
            and isinstance(other, Oci)
            and other.address.base == self.address.base
            and other.address.name != self.address.name
        ):
            query = "?" + urlencode({"mount": blob.digest, "from": other.address.name})
            scope += f" repository:{other.address.name}:pull"
        answer = self._client.ask("POST", f"{self._root}/blobs/uploads/{query}", where, good=(201, 202), scope=scope)
        return answer.status == 201 and bool(query), answer

    def _send(self, sending: Sending, session: Answer, note: Note, where: str) -> None:
        """Send a whole blob; one without a digest gets that of its bytes."""
        blob = sending.blob
        url = resolved(session.url, session.headers.get("location"), where)
        least = session.number("oci-chunk-min-length") or 0
        if not self._in_pieces(blob.size):
            data = whole(sending)
            _check(sending, where)
            self._finish(blob, url, data, where)
            return
        url = self._pieces(sending, url, 0, note, where, least=min(least, self._largest))
        _check(sending, where)
        blob = replace(blob, digest=sending.digest())
        self._finish(blob, url, b"", where)
        note.write(Begun("", blob.size, blob.digest))

    def _in_pieces(self, size: int) -> bool:
        return size > min(self._piece, _SMALL)

    def _note(self, size: int) -> Note:
        """A note for a new upload; one that takes one request needs none."""
        return self._uploads.new() if self._in_pieces(size) else Note(None)

    def _pieces(self, sending: Sending, url: str, at: int, note: Note, where: str, *, least: int = 0) -> str:
        """Send a blob from `at` on, and record the progress; return the URL to finish it at."""
        blob, size = sending.blob, max(self._piece, least)
        note.write(Begun(url, blob.size, blob.digest, at, sending.digest()))
        while at < blob.size:
            began, n = time.monotonic(), min(size, blob.size - at)
            url = self._patch(sending, url, at, n, where)
            at += n
            note.write(Begun(url, blob.size, blob.digest, at, sending.digest()))
            seconds = time.monotonic() - began
            size = min(2 * size, self._largest) if seconds < 1 else max(size // 2, self._piece, least) if seconds > 4 else size
        return url

    def _patch(self, sending: Sending, url: str, start: int, size: int, where: str) -> str:
        """Send one piece, or the part of it that the registry lacks; return the URL to continue at."""
        done, failed = 0, 0
        while True:
            headers = {**_BYTES, "Content-Range": f"{start + done}-{start + size - 1}"}
            body = sending.piece(start + done, size - done)
            try:
                scope = self._scope(write=True)
                answer = self._client.ask(
                    "PATCH", url, where, good=(202, 416), scope=scope, headers=headers, body=body, retry=False
                )
                if answer.status == 202:
                    return resolved(answer.url, answer.headers.get("location"), where)
                raise AgainError("the registry expects another byte")
            except AgainError as error:
                if failed == len(self._pauses):
                    raise self._client.given_up(error, where, failed + 1) from error
                self._client.pause(error, failed, where)
                failed += 1
            url, there = self._status(url, where)
            if there == start + size:
                return url
            if not start <= there < start + size:
                raise RemoteError(where, "the registry lost part of this upload", "Try again")
            done = there - start

    def _status(self, url: str, where: str) -> tuple[str, int]:
        """The URL to continue an upload at, and how many bytes the registry has."""
        try:
            answer = self._client.ask("GET", url, where, good=(204,), scope=self._scope(write=True))
        except NotFoundError as error:
            # docker-registry 2.8 keeps the offset in the address: of an answer that got lost it can only begin again.
            raise AgainError("the registry has let go of this upload") from error
        said = _RANGE.fullmatch(answer.headers.get("range", "0-0"))
        if not said:
            raise RemoteError(where, "the registry does not say how far an upload has come", "Try again")
        location = answer.headers.get("location")
        # `0-0` is said of no bytes as well as of one; pieces are larger than that.
        return resolved(answer.url, location, where) if location else url, int(said[1]) + 1 if int(said[1]) else 0

    def _finish(self, blob: Descriptor, url: str, data: bytes, where: str) -> None:
        """Finish an upload. If the answer gets lost, check whether the blob is stored; AgainError if it is not."""
        final = url + ("&" if urlsplit(url).query else "?") + urlencode({"digest": blob.digest})
        scope = self._scope(write=True)
        for number in range(len(self._pauses) + 1):
            try:
                answer = self._client.ask(
                    "PUT", final, where, good=(201, 204), scope=scope, headers=_BYTES, body=data, retry=False
                )
            except (AgainError, NotFoundError) as error:
                if self.has(blob):
                    return
                again = error if isinstance(error, AgainError) else AgainError(error.what)
                if len(data) or number == len(self._pauses):
                    raise again from error
                self._client.pause(again, number, where)
            else:
                self._compare(answer, blob.digest, where)
                return

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Store the manifest under its digest, then under a number and the tag."""
        done = numbers.put(self, made, tag)
        self._uploads.clear()
        return done

    def point(self, made: Manifest, reference: str) -> None:
        """Put a manifest under its digest, or a tag."""
        self._put_document(made.raw, made.digest, reference, MANIFEST_TYPE)

    def untag(self, tag: str) -> None:
        """Remove a tag, if the registry can without removing the version."""
        if self.digest_of(tag) is None:
            raise self._missing(tag)
        url = f"{self._root}/manifests/{quote(tag)}"
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
            f"{self._root}/manifests/{quote(reference, safe=':')}",
            where,
            good=(200, 201),
            scope=self._scope(write=True),
            headers={"Content-Type": kind},
            body=raw,
        )
        self._compare(answer, digest, where)
        return answer

    def _compare(self, answer: Answer, digest: str, where: str) -> None:
        said = answer.headers.get(_DIGEST_HEADER, digest)
        if said != digest:
            raise IntegrityError(where, f"the registry stored {said[:80]}, not {digest}", "Try again")

    def _blob(self, blob: Descriptor) -> str:
        return f"{self._root}/blobs/{blob.digest}"

    def _at(self, reference: str) -> str:
        return f"{self.where}{'@' if ':' in reference else ':'}{reference}"

    def _scope(self, *, write: bool = False) -> str:
        return f"repository:{self.address.name}:pull{',push' if write else ''}"


def _check(sending: Sending, where: str) -> None:
    """Check the bytes that were sent, before an upload is finished."""
    blob, digest = sending.blob, sending.digest()
    if (sending.hashed, digest) != (blob.size, blob.digest or digest):
        what = f"{sending.hashed} bytes of {digest} were read instead of {blob.size} of {blob.digest}"
        raise IntegrityError(where, what, "Nothing was stored", code="source-damaged")
