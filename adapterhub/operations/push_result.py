"""The result of a push or a copy, and the addresses that can be pushed to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.registry.registry import Version
    from adapterhub.remotes.protocol import OpenRemote
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub.remotes.version_copy import CopyResult


@dataclass(frozen=True, repr=False)
class PushResult:
    """A version in the registry or at an address, as a push or copy left it.

    Attributes:
        ref: Its ref with its number, or its address.
        tag: The tag that points to it; None if a push to the registry named none.
        digest: The digest of its manifest.
        size: Bytes of its files.
        sent: Bytes that had to be sent to an address; the remaining bytes were there already.
        new: False if the name had this version already.
        moved: True if a tag pointed to another version before, or did not exist.
        number: Its number, if the place numbers versions.
        skipped: Names in the pushed folder that were left out.
        overridden: Codes of the errors of its check that `force` accepted.
        commit: The commit, on a hub.
        version: The version, if it was stored in the registry.
    """

    ref: str
    tag: str | None
    digest: Digest
    size: int
    sent: int = 0
    new: bool = True
    moved: bool = True
    number: int | None = None
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()
    commit: str = ""
    version: Version | None = None

    def __repr__(self) -> str:
        return f"<PushResult {self.ref} {self.digest[:19]}: {self.size:,} bytes, {self.sent:,} sent>"


def stored_result(version: Version) -> PushResult:
    """Return the result of a push or a copy to the registry."""
    return PushResult(
        str(version.ref),
        version.tag,
        version.digest,
        version.size or 0,
        new=version.new,
        moved=version.moved,
        number=version.number,
        skipped=version.skipped,
        overridden=version.overridden,
        version=version,
    )


def target_address(target: str, workspace: Workspace, name: str | None = None) -> RemoteAddress:
    """Parse and check the target address of a push; the policy checks `name` if given, instead of the repository."""
    from adapterhub.registry.version_selection import is_range
    from adapterhub.remotes.remote_address import parse

    address = parse(target)
    if address.digest or is_range(address.tag or ""):
        problem = "a version's digest follows from its files" if address.digest else "a range names versions that are there"
        raise UsageError(target, problem, f"Push to {address.repository}, or to a tag of it")
    workspace.check_name(name or address.repository)
    return address


def push_result(address: RemoteAddress, copied: CopyResult, remote: OpenRemote, workspace: Workspace) -> PushResult:
    """Return the result of a copy to an address, and print the notes of its remote."""
    manifest, outcome = copied.manifest, copied.put_result
    commit = workspace.tell_notes(remote)
    return PushResult(
        address.version,
        address.reference,
        manifest.digest,
        manifest.size,
        copied.sent,
        new=outcome.new,
        moved=outcome.moved,
        number=outcome.number,
        commit=commit,
    )
