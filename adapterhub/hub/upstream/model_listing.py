"""A model of the upstream at one commit, as its document of the Hugging Face Hub's API says: its files, sizes and digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapterhub.digest import is_hex
from adapterhub.hub.git_objects import GitFile
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

_COMMIT, _OID = 40, 40  # hexadecimal digits
_MAX_FILES, _MAX_PATH = 50_000, 1024


@dataclass(frozen=True)
class ModelListing:
    """A model at a commit.

    Attributes:
        name: Its name there.
        commit: 40 hexadecimal digits.
        files: By path, sorted. A file has the sha256 that git-lfs knows it by, or else the sha1 of its git object; none of both
            if the upstream names none.
        document: The rest of the upstream's document, which clients get as it is.
    """

    name: str
    commit: str
    files: Mapping[str, GitFile]
    document: Mapping[str, Any]

    @property
    def time(self) -> str:
        """When it was last changed, as the registry writes times; empty if that is not known."""
        time = self.document.get("lastModified")
        return f"{time[:19]}Z" if isinstance(time, str) and len(time) >= 19 else ""

    def info(self, *, blobs: bool) -> dict[str, Any]:
        """Return the document of the model for a client; with sizes and ids of its files if `blobs`."""
        siblings = [_sibling(file) if blobs else {"rfilename": file.path} for file in self.files.values()]
        return {**self.document, "sha": self.commit, "siblings": siblings}

    def dump(self) -> bytes:
        """Return it as the bytes that `parse` reads."""
        return json.dumps(self.info(blobs=True), separators=(",", ":")).encode()


def parse(raw: bytes, name: str, location: str) -> ModelListing:
    """Parse the document of a model, asked for with `blobs=true`.

    Raises:
        RemoteError: It is no such document.
    """
    try:
        document = json_file.parse_object(raw, location)
    except FormatError as error:
        raise RemoteError(location, "the upstream does not answer like a Hugging Face Hub") from error
    commit, siblings = document.pop("sha", None), document.pop("siblings", None)
    if not isinstance(commit, str) or not is_hex(commit, _COMMIT) or not isinstance(siblings, list):
        raise RemoteError(location, "the upstream does not list the files of a commit")
    if len(siblings) > _MAX_FILES:
        raise RemoteError(location, f"the upstream lists more than {_MAX_FILES:,} files")
    files = {file.path: file for file in map(_file, siblings) if file}
    return ModelListing(name, commit, dict(sorted(files.items())), document)


def _file(entry: object) -> GitFile | None:
    """Return a file of a document; None for an entry whose path or size nobody can use."""
    if not isinstance(entry, dict):
        return None
    path, lfs = entry.get("rfilename"), entry.get("lfs")
    lfs = lfs if isinstance(lfs, dict) else {}
    size, oid, sha256 = lfs.get("size", entry.get("size")), entry.get("blobId"), lfs.get("sha256")
    is_path = isinstance(path, str) and path.isprintable() and len(path) <= _MAX_PATH
    if not is_path or not all(part not in ("", ".", "..") for part in str(path).split("/")):
        return None
    if not json_file.is_integer(size) or not 0 <= size < 2**60:
        return None
    sha256 = sha256 if isinstance(sha256, str) and is_hex(sha256) else ""
    # What is in git-lfs is known by its sha256 alone: the object of git is its pointer.
    oid = oid if isinstance(oid, str) and is_hex(oid, _OID) and not (lfs and not sha256) else ""
    pointer = lfs.get("pointerSize")
    pointer_size = pointer if json_file.is_integer(pointer) and pointer > 0 else 0
    return GitFile(str(path), f"sha256:{sha256}" if sha256 else "", size, oid, sha256, pointer_size)


def _sibling(file: GitFile) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        sibling["lfs"] = {"sha256": file.lfs, "size": file.size, "pointerSize": file.pointer}
    return sibling
