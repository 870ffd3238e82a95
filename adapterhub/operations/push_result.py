"""The result of a push or a copy to an address, and the addresses that can be pushed to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError

from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.remotes.protocol import OpenRemote
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub.remotes.version_copy import CopyResult


@dataclass(frozen=True, repr=False)
class PushResult:
    """A version at an address, as a push or copy left it.

    Attributes:
        ref: Its address.
        tag: The tag that points to it.
        digest: The digest of its manifest.
        size: Bytes of its files.
        sent: Bytes that had to be sent; the remaining bytes were there already.
        new: False if the name had this version already.
        moved: True if the tag pointed to another version before, or did not exist.
        number: Its number, if the place numbers versions.
        skipped: Names in the pushed folder that were left out.
        overridden: Codes of the errors of its check that `force` accepted.
        commit: The commit, on a hub.
    """

    ref: str
    tag: str
    digest: Digest
    size: int
    sent: int
    new: bool = True
    moved: bool = True
    number: int | None = None
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()
    commit: str = ""

    def __repr__(self) -> str:
        return f"<PushResult {self.ref} {self.digest[:19]}: {self.size:,} bytes, {self.sent:,} sent>"


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
