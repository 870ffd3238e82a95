"""The page of an adapter's channels (`channel_board`), with the buttons of who may press them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar
from urllib.parse import quote

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.withdrawal_roles import may_withdraw
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.registry import withdrawals
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from .adapter_pages import Version, version_of
from .channel_board import Board, BoardReader, Channel
from .site import Page, PageRequest


@dataclass(frozen=True)
class ChannelsPage(Page):
    """The board, and what who sees it may do.

    Attributes:
        versions: The versions that can be promoted, newest first.
        may_write: Whether the account may move tags.
        may_approve: Whether it is a person's, who may approve.
        withdrawable: The numbers of the versions on the board that the account may withdraw.
    """

    version: Version
    board: Board
    versions: Sequence[VersionRow]
    may_write: bool
    may_approve: bool
    withdrawable: Collection[int]
    template: ClassVar[str] = "channels.html"

    @property
    def comparable(self) -> list[Channel]:
        """The channels whose versions can be compared."""
        return [channel for channel in self.board.channels if channel.row and channel.withdrawn is None]

    @property
    def compared(self) -> tuple[str, str]:
        """The tags to compare unless others are chosen: the last with a next version, and its source."""
        steps = [(channel.tag, channel.step.source) for channel in self.comparable if channel.step]
        return steps[-1] if steps else (self.comparable[-1].tag, self.comparable[0].tag)


def channel_url(name: str, tag: str) -> str:
    """Return the address of a channel on its board."""
    return f"/{name}/channels#channel-{quote(tag)}"


def channels_page(page_request: PageRequest, worker: Worker) -> ChannelsPage:
    """GET …/channels."""
    version = version_of(page_request, worker)
    if version.of.frozen:
        raise NotFoundError(version.of.name, "is another form of a version, and has no channels")
    name, who, gate = version.name, page_request.who, worker.registry.gate
    mover = who.account if who else ""

    def read() -> Board:
        # It may scan files and verify signatures, so a network gets only so many without a token, as of the API.
        if who is None:
            page_request.hub.access.count_attempt(page_request.hub.access.conversions)
        return BoardReader(worker, name, mover).read()

    # Evidence is in the two logs, and who looks may not count as an approver; what has to age does so by the minute.
    heads = worker.registry.ledger.current(name).head, worker.repositories.current(name)[0]
    key = (name, heads, mover, gate.is_moved_by_program(), int(gate.evidence.clock() // 60))
    board = page_request.site.boards.get(key, read)
    rows = {row.number: row for channel in board.channels if channel.withdrawn is None and (row := channel.row)}
    may_write = who is not None and who.has_role("write", name)
    withdrawn = withdrawals.reasons(worker.registry.index, name) if may_write else {}
    return ChannelsPage(
        version=version,
        board=board,
        versions=[row for row in queries.versions(worker.registry.index, name=name) if row.digest not in withdrawn]
        if may_write
        else [],
        may_write=may_write,
        may_approve=who is not None and may_write and not access_tokens.is_of_program(worker.database, who.token),
        withdrawable={number for number, row in rows.items() if may_withdraw(worker, who, row)},
    )
