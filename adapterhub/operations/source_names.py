"""What a text names: a path, a ref of the registry, or an address; never a guess between two.

Every command and function that takes a SRC uses this module; `sources` opens what is named. `ref` parses refs, and
`registry.version_selection` picks a version for one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.ref import Ref

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
    from adapterhub.ref import Ref, intended_address

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
        hint = error.hint if intended_address(text) else "A ref is like team/sql:v2"
        raise NotFoundError(text, "no such file or folder, and not a ref either", hint, code="no-such-file") from error
    if not isinstance(source, str) or (exists and not _ref_exists(ref, workspace)):
        return path, None
    if not exists:
        return None, ref
    explicit_ref = f"{text}:latest" if str(ref) == ref.name else text
    hint = f"Write ./{text} for the path, {explicit_ref} for the adapter"
    raise UsageError(text, "both a path and an adapter in the registry", hint, code="ambiguous")


def is_stored(text: str, workspace: Workspace) -> bool:
    """Return whether the registry has the version that a ref names."""
    from adapterhub.ref import Ref

    return _ref_exists(Ref.parse(text), workspace)


def _ref_exists(ref: Ref, workspace: Workspace) -> bool:
    try:
        with workspace.open_registry() as registry:
            registry.resolve(ref)
    except AdapterhubError:
        return False
    return True


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
