"""What a push or a copy left at an address, and the addresses that something can be sent to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.workspace import Workspace
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.remotes.copy import Copied
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.protocol import Connected


@dataclass(frozen=True, repr=False)
class Sent:
    """A version at an address, as a push or copy left it.

    Attributes:
        ref: Its address.
        tag: The tag that points to it.
        digest: Of its manifest.
        size: Bytes of its files.
        sent: Bytes that had to be sent; the rest was there.
        new: False where the name had this version already.
        moved: True where the tag was at another version before, or at none.
        number: Its number, in a place that has numbers.
        skipped: Names in the pushed folder that were left out.
        overridden: Codes of the errors of its check that `force` accepted.
        commit: On a hub, the commit.
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
        return f"<Sent {self.ref} {self.digest[:19]}: {self.size:,} bytes, {self.sent:,} sent>"


def target_address(target: str, workspace: Workspace, name: str | None = None) -> Place:
    """Return the parsed address of a push, after the checks of `check_target`; the policy is asked for `name` if given."""
    from adapterhub.references import is_range
    from adapterhub.remotes.location import parse

    address = parse(target)
    if address.digest or is_range(address.tag or ""):
        what = "a version's digest follows from its files" if address.digest else "a range names versions that are there"
        raise UsageError(target, what, f"Push to {address.repository}, or to a tag of it")
    workspace.check_name(name or address.repository)
    return address


def sent(address: Place, copied: Copied, remote: Connected, workspace: Workspace) -> Sent:
    """Return what was copied to an address, and tell the notes of its remote."""
    made, put = copied.manifest, copied.put
    commit = workspace.tell_notes(remote)
    return Sent(
        address.version,
        address.reference,
        made.digest,
        made.size,
        copied.sent,
        new=put.new,
        moved=put.moved,
        number=put.number,
        commit=commit,
    )
