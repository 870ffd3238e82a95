"""What is signed: an in-toto statement with the name of an adapter and the digest of each of its files.

OpenSSF model signing 1.0, in the one form that leaves nothing open: whole files, sha256, each name once. The root digest in
the subject is the sha256 of all digests in the order of the list; names are bound by the signature of the whole statement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from adapterhub.digest import Digest, copy_hashing, is_hex
from adapterhub.manifest.package_files import MAX_FILES, SIGNATURE, shortened
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.containers.open_file import MAX_PATH, check_regular, walk
from adapterhub_converters.errors import FormatError, IntegrityError, LocalIOError, NotFoundError, RefusedError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
AGAIN = "Have it signed again"
UNSIGNED = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore")
"""What of a folder is not signed: the signature, and what model_signing leaves out by itself."""


@dataclass(frozen=True)
class Statement:
    """The signed name of an adapter, and path to digest of its files."""

    name: str
    files: Mapping[str, Digest]

    def dump(self) -> bytes:
        """The statement in JSON, its files in the order of model_signing."""
        paths = sorted(self.files, key=PurePosixPath)
        digests = [self.files[path].removeprefix("sha256:") for path in paths]
        resources = [
            {"name": path, "algorithm": "sha256", "digest": digest} for path, digest in zip(paths, digests, strict=True)
        ]
        serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(UNSIGNED)}
        document = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": self.name, "digest": {"sha256": _root(digests)}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {"serialization": serialization, "resources": resources},
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def check_files(self, files: Mapping[str, Digest], where: str) -> None:
        """IntegrityError that names every file that is not what was signed, or that was not signed."""
        found = [f"{path} (missing)" for path in self.files if path not in files]
        found += [f"{path} (not signed)" for path in files if path not in self.files]
        found += [f"{path} (changed)" for path in files if self.files.get(path, files[path]) != files[path]]
        if found:
            hint = "Fetch the files that were signed, or have these signed"
            raise IntegrityError(where, f"is not what was signed: {shortened(sorted(found))}", hint, code="signature")

    def check_name(self, name: str, where: str) -> None:
        """IntegrityError unless it was signed under this name: the whole of it, or its last parts.

        model_signing signs the last part alone, the name of a folder.
        """
        if not "/{}".format(name.replace(":", "/")).endswith(f"/{self.name}"):
            what = f"the signature is for {self.name[:120]!r}, not for {name!r}"
            raise IntegrityError(where, what, "Have it signed under this name", code="signature-name", name=self.name[:120])


def parse(raw: bytes, where: str) -> Statement:
    """Parse a statement whose signature was verified; FormatError for any other form, named."""
    document = json_file.parse_object(raw, where)
    _expect(document.get("_type") == STATEMENT_TYPE, where, f"signs no {STATEMENT_TYPE}")
    kind = document.get("predicateType")
    _expect(kind == PREDICATE_TYPE, where, f"signs {str(kind)[:80]!r}, not {PREDICATE_TYPE}")
    subjects, predicate = document.get("subject"), _object(document.get("predicate"), where, "predicate")
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise FormatError(where, "does not sign exactly one subject", AGAIN)
    subject = _object(subjects[0], where, "subject")
    name = subject.get("name")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_PATH:
        raise FormatError(where, "signs a subject without a name", AGAIN)
    files = _files(predicate, where)
    digests = [digest.removeprefix("sha256:") for digest in files.values()]
    _expect(subject.get("digest") == {"sha256": _root(digests)}, where, "the digest of its subject is not that of its files")
    return Statement(name, files)


def _files(predicate: dict[str, Any], where: str) -> dict[str, Digest]:
    how = _object(predicate.get("serialization"), where, "serialization")
    _expect(how.get("method") == "files", where, f"signs {str(how.get('method'))[:80]!r}, not whole files")
    _expect(how.get("hash_type") == "sha256", where, f"has digests by {str(how.get('hash_type'))[:80]!r}, not sha256")
    resources = predicate.get("resources")
    if not isinstance(resources, list) or not 0 < len(resources) <= MAX_FILES:
        raise FormatError(where, f"signs no files, or more than {MAX_FILES}", AGAIN)
    files: dict[str, Digest] = {}
    for one in resources:
        entry = _object(one, where, "resources")
        path, digest = entry.get("name"), entry.get("digest")
        if not isinstance(path, str) or not 0 < len(path) <= MAX_PATH:
            raise FormatError(where, f"signs a file without a name, or with one of over {MAX_PATH} characters", AGAIN)
        _expect(path not in files, where, f"signs the file {path[:80]!r} twice")
        if entry.get("algorithm") != "sha256" or not isinstance(digest, str) or not is_hex(digest):
            raise FormatError(where, f"{path[:80]}: not a sha256 digest", AGAIN)
        files[path] = f"sha256:{digest}"
    return files


def _object(value: object, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(where, f"{name} is not an object", AGAIN)
    return value


def _expect(right: bool, where: str, what: str) -> None:
    if not right:
        raise FormatError(where, what, AGAIN)


def _root(digests: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def files_in(folder: Path) -> dict[str, Digest]:
    """Path to digest of every file in a folder, dotfiles too, but `UNSIGNED`; RefusedError for a link, a pipe or a device."""
    inside = Inside(folder)
    found: dict[str, Digest] = {}
    try:
        for path, status in walk(folder, lambda path: path not in UNSIGNED):
            if path in UNSIGNED:
                continue
            if len(path) > MAX_PATH or len(found) > MAX_FILES:
                raise RefusedError(str(folder), f"more than {MAX_FILES} files, or a path of more than {MAX_PATH} characters")
            try:
                check_regular(status, folder / path)
            except IsADirectoryError:
                continue
            with inside.open(folder / path) as file:
                found[path] = copy_hashing(file, None)[0]
    except FileNotFoundError as error:
        raise NotFoundError(str(folder), "no such folder", code="no-such-file") from error
    except NotADirectoryError as error:
        raise NotFoundError(str(folder), "is a file", "Put it in a folder of its own and name that") from error
    except OSError as error:
        raise LocalIOError(str(error.filename or folder), error.strerror or str(error)) from error
    return found
