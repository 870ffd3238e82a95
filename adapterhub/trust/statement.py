"""The signed statement about files: an in-toto statement with the name of an adapter and the digest of each of its files.

It follows OpenSSF model signing 1.0, in the one form that is unambiguous: whole files, sha256, each name once. The root digest
in the subject is the sha256 of all digests in the order of the list; names are bound by the signature of the whole statement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from adapterhub.digest import Digest, copy_hashing, is_hex
from adapterhub.manifest.package_files import MAX_FILES, SIGNATURE, shorten_names
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.open_file import MAX_PATH, check_regular, walk
from adapterhub_converters.errors import FormatError, IntegrityError, LocalIOError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
SIGN_AGAIN_HINT = "Have it signed again"
UNSIGNED = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore")
"""What is not signed in a folder: the signature itself, and what model_signing leaves out by default."""


@dataclass(frozen=True)
class Statement:
    """The signed name of an adapter, and the digests of its files by path."""

    name: str
    files: Mapping[str, Digest]

    def dump(self) -> bytes:
        """Return the statement in JSON, with the files in model_signing's order."""
        # By path components, as model_signing sorts them, not by characters.
        paths = sorted(self.files, key=PurePosixPath)
        digests = [self.files[path].removeprefix("sha256:") for path in paths]
        resources = [
            {"name": path, "algorithm": "sha256", "digest": digest} for path, digest in zip(paths, digests, strict=True)
        ]
        serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(UNSIGNED)}
        document = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": self.name, "digest": {"sha256": _root_digest(digests)}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {"serialization": serialization, "resources": resources},
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def check_files(self, files: Mapping[str, Digest], location: str) -> None:
        """Raise IntegrityError that names every file that is missing, changed or not signed."""
        differences = [f"{path} (missing)" for path in self.files if path not in files]
        differences += [f"{path} (not signed)" for path in files if path not in self.files]
        differences += [f"{path} (changed)" for path in files if self.files.get(path, files[path]) != files[path]]
        if differences:
            hint = "Fetch the files that were signed, or have these signed"
            raise IntegrityError(
                location, f"is not what was signed: {shorten_names(sorted(differences))}", hint, code="signature"
            )

    def check_name(self, name: str, location: str) -> None:
        """Raise IntegrityError unless it was signed under this name, either in full or by its last parts.

        model_signing signs only the last part, the name of a folder.
        """
        if not "/{}".format(name.replace(":", "/")).endswith(f"/{self.name}"):
            problem = f"the signature is for {self.name[:120]!r}, not for {name!r}"
            raise IntegrityError(
                location, problem, "Have it signed under this name", code="signature-name", name=self.name[:120]
            )


def hub_purl(repo: str | None, revision: str | None) -> str:
    """Return the package URL of a repository of the Hugging Face Hub (purl-spec, `types/huggingface`); empty without a name."""
    if not repo:
        return ""
    path = "/".join(quote(part, safe="") for part in repo.split("/"))
    return f"pkg:huggingface/{path}" + (f"@{quote(revision.lower(), safe='')}" if revision else "")


def parse(raw: bytes, location: str) -> Statement:
    """Parse a statement whose signature was verified; FormatError, with the reason, for any other form."""
    document = json_file.parse_object(raw, location)
    _expect(document.get("_type") == STATEMENT_TYPE, location, f"does not sign a statement of the type {STATEMENT_TYPE}")
    kind = document.get("predicateType")
    _expect(kind == PREDICATE_TYPE, location, f"signs {str(kind)[:80]!r}, not {PREDICATE_TYPE}")
    subjects, predicate = document.get("subject"), _object(document.get("predicate"), location, "predicate")
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise FormatError(location, "does not sign exactly one subject", SIGN_AGAIN_HINT)
    subject = _object(subjects[0], location, "subject")
    name = subject.get("name")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_PATH:
        raise FormatError(location, "signs a subject without a name", SIGN_AGAIN_HINT)
    files = _signed_files(predicate, location)
    digests = [digest.removeprefix("sha256:") for digest in files.values()]
    _expect(
        subject.get("digest") == {"sha256": _root_digest(digests)},
        location,
        "the digest of its subject is not that of its files",
    )
    return Statement(name, files)


def _signed_files(predicate: dict[str, Any], location: str) -> dict[str, Digest]:
    """Return the signed digests by path."""
    serialization = _object(predicate.get("serialization"), location, "serialization")
    _expect(
        serialization.get("method") == "files", location, f"signs {str(serialization.get('method'))[:80]!r}, not whole files"
    )
    _expect(
        serialization.get("hash_type") == "sha256",
        location,
        f"has digests by {str(serialization.get('hash_type'))[:80]!r}, not sha256",
    )
    resources = predicate.get("resources")
    if not isinstance(resources, list) or not 0 < len(resources) <= MAX_FILES:
        raise FormatError(location, f"signs no files, or more than {MAX_FILES}", SIGN_AGAIN_HINT)
    files: dict[str, Digest] = {}
    for resource in resources:
        entry = _object(resource, location, "resources")
        path, digest = entry.get("name"), entry.get("digest")
        if not isinstance(path, str) or not 0 < len(path) <= MAX_PATH:
            raise FormatError(
                location, f"signs a file without a name, or with one of over {MAX_PATH} characters", SIGN_AGAIN_HINT
            )
        _expect(path not in files, location, f"signs the file {path[:80]!r} twice")
        if entry.get("algorithm") != "sha256" or not isinstance(digest, str) or not is_hex(digest):
            raise FormatError(location, f"{path[:80]}: not a sha256 digest", SIGN_AGAIN_HINT)
        files[path] = f"sha256:{digest}"
    return files


def _object(value: object, location: str, name: str) -> dict[str, Any]:
    """Return `value` if it is an object."""
    if not isinstance(value, dict):
        raise FormatError(location, f"{name} is not an object", SIGN_AGAIN_HINT)
    return value


def _expect(condition: bool, location: str, problem: str) -> None:
    """Raise FormatError unless the condition holds."""
    if not condition:
        raise FormatError(location, problem, SIGN_AGAIN_HINT)


def _root_digest(digests: Sequence[str]) -> str:
    """Return the root digest: the sha256 of all digests in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def files_in(folder: Path) -> dict[str, Digest]:
    """Return the digest of every file in a folder by path, including dotfiles but not `UNSIGNED`.

    Raises:
        RefusedError: The folder has a link, a pipe or a device, or too many files.
    """
    inside = ConfinedFiles(folder)
    digests: dict[str, Digest] = {}
    try:
        for path, status in walk(folder, lambda path: path not in UNSIGNED):
            if path in UNSIGNED:
                continue
            # Checked while walking, before a hostile folder costs time or memory.
            if len(path) > MAX_PATH or len(digests) > MAX_FILES:
                raise RefusedError(str(folder), f"more than {MAX_FILES} files, or a path of more than {MAX_PATH} characters")
            try:
                check_regular(status, folder / path)
            except IsADirectoryError:
                continue
            with inside.open(folder / path) as file:
                digests[path] = copy_hashing(file, None)[0]
    except FileNotFoundError as error:
        raise NotFoundError(str(folder), "no such folder", code="no-such-file") from error
    except NotADirectoryError as error:
        raise NotFoundError(str(folder), "is a file", "Put it in a folder of its own and name that") from error
    except OSError as error:
        raise LocalIOError(str(error.filename or folder), error.strerror or str(error)) from error
    return digests
