"""What a text names: a path, a ref of the registry, or an address; never a guess between two.

Every command and function that takes a SRC, or a target that may be a ref or a folder, uses this module; `sources` opens what
is named. `ref` parses refs, and `registry.version_selection` picks a version for one.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.ref import Ref

_SUFFIXES = (".safetensors", ".gguf", ".json", ".npz", ".bin", ".pt", ".pth", ".zip", ".tar")
_MAX_SIBLINGS = 10_000
ADDRESSES = ("https://", "http://", "hf://")
"""Prefixes of the address of a base."""


def is_address(source: StrPath) -> bool:
    """Return whether `source` is an address, such as `oci://…`; a `Path` never is."""
    if not isinstance(source, str):
        return False
    from adapterhub.remotes.address_schemes import is_address

    return is_address(source)


def ref_of(source: StrPath, workspace: Workspace) -> Ref | None:
    """Return the ref that `source` is; None for a path or an address. Raises as `resolve` does."""
    return None if is_address(source) else resolve(source, workspace)[1]


def resolve(source: StrPath, workspace: Workspace) -> tuple[Path | None, Ref | None]:
    """Return the path or the ref that `source` is.

    Raises:
        UsageError: It is both, or an address.
        NotFoundError: It is neither.
    """
    from adapterhub.ref import Ref, hub_address, intended_address

    text, path = os.fspath(source), Path(source)
    if is_address(source):
        raise UsageError(text, "an address, and this works on local adapters only", "Pull it, or copy it to the registry")
    # A broken link counts as a path: it is what the user named, and the error should say that it leads nowhere.
    exists = path.exists() or path.is_symlink()
    try:
        ref = Ref.parse(text)
    except UsageError as error:
        if exists:
            return path, None
        if ":" in text or "@" in text:
            raise
        on_hub = f", and {address} one on the Hub" if (address := hub_address(text)) else ""
        hint = error.hint if intended_address(text) else f"A ref is like team/sql:v2{on_hub}"
        raise NotFoundError(text, "no such file or folder, and not a ref either", hint, code="no-such-file") from error
    if not isinstance(source, str) or (exists and not _ref_exists(ref, workspace)):
        return path, None
    if not exists:
        if missing_path := _missing_path_error(text, ref, workspace):
            raise missing_path
        return None, ref
    explicit_ref = f"{text}:latest" if str(ref) == ref.name else text
    hint = f"Write ./{text} for the path, {explicit_ref} for the adapter"
    raise UsageError(text, "both a path and an adapter in the registry", hint, code="ambiguous")


def resolve_target(target: StrPath) -> tuple[Path | None, Ref | None]:
    """Return the folder or the ref that a target names, which is no address; a text that could be either is a ref.

    Raises:
        RefError: It looks like a ref, and is not one.
    """
    from adapterhub.ref import Ref, RefError

    text = os.fspath(target)
    if isinstance(target, str) and not _begins_as_path(text):
        try:
            return None, Ref.parse(text)
        except RefError as error:
            if _looks_like_ref(text) and not _is_clear_path(text):
                error.hint = f"{error.hint}; for a folder, write ./{text}" if error.hint else f"For a folder, write ./{text}"
                raise
    return Path(target), None


def output_path(target: StrPath) -> Path:
    """Return the path of an output that can be nothing else.

    Raises:
        UsageError: It is an address, or it looks like a ref with a tag or a digest.
    """
    text = os.fspath(target)
    if isinstance(target, str) and not _begins_as_path(text) and not _is_clear_path(text):
        words = "and this is written to a folder or a file"
        if is_address(text) or "://" in text:
            raise UsageError(text, f"is an address, {words}", "Write a path; a copy takes the version to an address")
        if "/" in _name_part(text) != text:
            raise UsageError(text, f"looks like a ref, {words}", f"Write ./{text} for the path", code="invalid-ref")
    return Path(target)


def _begins_as_path(text: str) -> bool:
    return text.startswith((".", "~", os.sep))


def _is_clear_path(text: str) -> bool:
    """Return whether a text that is no ref is a path: it ends with a slash, it is there, or the folder that it is in."""
    path = Path(text)
    exists = path.exists() or path.is_symlink() or ("/" in text and path.parent.is_dir())
    return exists or bool(path.drive) or text.endswith(("/", os.sep))


def _looks_like_ref(text: str) -> bool:
    """Return whether a text may be meant as a ref: namespace/name, a version of a name, or the address of one."""
    from adapterhub.ref import intended_address

    name = _name_part(text)
    return name != text or name.count("/") == 1 or bool(intended_address(text))


def _name_part(text: str) -> str:
    """Return a text without what follows its first colon or at sign."""
    return text.partition("@")[0].partition(":")[0]


def _missing_path_error(text: str, ref: Ref, workspace: Workspace) -> NotFoundError | None:
    """Return the error for a text that was meant as a path, with the one that is there; None if it was meant as a ref.

    `models/sql` may be either. It is a path if it ends as a file does, or if the folder is there, and the registry has neither
    the name nor a similar one.
    """
    path = Path(text)
    if str(ref) != text or not (path.suffix in _SUFFIXES or path.parent.is_dir()):
        return None
    try:
        with workspace.open_registry() as registry:
            registry.resolve(ref)
            return None
    except AdapterhubError as error:
        if "meant" in error.fields:
            return None
    siblings = islice((item.name for item in path.parent.iterdir()), _MAX_SIBLINGS) if path.parent.is_dir() else ()
    close = difflib.get_close_matches(path.name, siblings, 1)
    hint = f"Did you mean {path.parent / close[0]}?" if close else "Look into its folder, and into the list of the registry"
    return NotFoundError(text, "no such file or folder, and no adapter of this name", hint, code="no-such-file")


@contextmanager
def no_path_either(text: str) -> Iterator[None]:
    """Add to the error for an unknown name, or for no registry, that nothing has this path either, if it could be one."""
    try:
        yield
    except NotFoundError as error:
        if error.code not in ("no-such-adapter", "no-registry") or "/" not in text or ":" in text or "@" in text:
            raise
        if error.code == "no-registry":
            problem = f"no such file or folder, and no registry in {error.where}"
        else:
            problem = f"{error.what}, and no such file or folder"
        raise NotFoundError(text, problem, error.hint, code=error.code, **error.fields) from error


def is_stored(text: str, workspace: Workspace) -> bool:
    """Return whether the registry has the version that a text names; False for a text that can be no ref, like `Org/Model`."""
    from adapterhub.ref import Ref

    try:
        ref = Ref.parse(text)
    except UsageError:
        return False
    return _ref_exists(ref, workspace)


def _ref_exists(ref: Ref, workspace: Workspace) -> bool:
    try:
        with workspace.open_registry() as registry:
            registry.resolve(ref)
    except AdapterhubError:
        return False
    return True


def not_stored_error(path: StrPath, problem: str = "is a path, and no adapter in the registry has this name") -> UsageError:
    """Return the error for a path where a version of the registry is needed, with the name that it could be pushed to."""
    words = {"path": shlex.quote(os.fspath(path)), "name": suggested_name(Path(path))}
    return UsageError(str(path), problem, "Push it first", code="not-stored", **words)


def suggested_name(path: Path) -> str:
    """Return a name for an adapter: that of its folder or file, or of the folder of a file with the usual name."""
    from adapterhub.ref import is_name

    path = path.absolute()
    text = path.parent.name if path.stem in ("adapter_model", "adapters") else path.stem if path.is_file() else path.name
    word = "".join(character if character.isalnum() and character.isascii() else "-" for character in text.lower()).strip("-")
    return f"team/{word}" if is_name(f"team/{word}") else "team/adapter"


def existing_path(text: str) -> Path:
    """Return the path that `text` names. Raise NotFoundError if nothing is there, and UsageError for an address."""
    if text.lower().startswith(ADDRESSES):
        problem = "is not on this disk, and the weights are needed, not only headers"
        raise UsageError(text.partition("?")[0], problem, "Download it, and name the folder or file")
    path = Path(text)
    if not path.exists():
        raise NotFoundError(text, "no such file or folder", code="no-such-file")
    return path


def local_base_path(base: StrPath | None) -> str | None:
    """Return the absolute path of a base on this machine; None for any other base."""
    return str(Path(base).resolve()) if base and Path(base).exists() else None
