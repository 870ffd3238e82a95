"""The pages of proposals: all of an adapter, and one with its checks, what it changes, and the buttons to decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapterhub.digest import Digest
from adapterhub.hub import file_differences, proposals
from adapterhub.hub.access_control import may_write
from adapterhub.hub.commits import PROPOSALS
from adapterhub.hub.file_differences import FileDifference
from adapterhub.hub.proposals import ProposedChange
from adapterhub.hub.workers import Worker
from adapterhub.manifest.document import AdapterManifest, DeclaredEvaluation
from adapterhub.registry.repository_documents import OPEN, Proposal
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from .site import Page, PageRequest

_MAX_EVALUATIONS = 50


@dataclass(frozen=True)
class ProposalsPage(Page):
    """The proposals of an adapter by their numbers, the newest first, and whether the client may open one."""

    name: str
    proposals: Mapping[str, Proposal]
    may_propose: bool
    host: str
    template: ClassVar[str] = "proposals.html"


@dataclass(frozen=True)
class ProposalPage(Page):
    """A proposal.

    Attributes:
        change: What it changes; None if it is closed.
        evaluations: Results that its adapter.json declares.
        files: What differs from the version that it was made from.
        more: How many more files differ.
        may_decide: Whether the client may accept or refuse it.
        is_author: Whether the client has opened it.
        host: The address of the hub.
    """

    name: str
    number: str
    proposal: Proposal
    change: ProposedChange | None
    evaluations: Sequence[DeclaredEvaluation]
    files: Sequence[FileDifference]
    more: int
    may_decide: bool
    is_author: bool
    host: str
    template: ClassVar[str] = "proposal.html"

    @property
    def revision(self) -> str:
        """The revision under which its files can be read."""
        return f"{PROPOSALS}{self.number}"


def proposals_page(page_request: PageRequest, worker: Worker) -> ProposalsPage:
    """GET …/discussions, as the Hugging Face Hub has it."""
    view = page_request.current_repository(worker, "/discussions")
    listed = view.repository.proposals if view.repository and not view.frozen else {}
    who = page_request.who
    may_propose = who is not None and not view.frozen and page_request.hub.access.may_read_files(who, view.name)
    return ProposalsPage(view.name, dict([*listed.items()][::-1]), may_propose, page_request.url)


def proposal_page(page_request: PageRequest, worker: Worker) -> ProposalPage:
    """GET …/discussions/{number}."""
    number = page_request.part("number")
    view = page_request.current_repository(worker, f"/discussions/{number}")
    proposal, who, change = proposals.find(view, number), page_request.who, None
    files: Sequence[FileDifference] = ()
    evaluations: Sequence[DeclaredEvaluation] = ()
    unlisted_count = 0
    if proposal.state == OPEN:
        change = proposals.change_of(worker, view, proposal)
        files, unlisted_count = file_differences.of_proposal(worker, page_request.hub, who, view, change)
        digest, _ = change.record.files.get(ADAPTER_JSON, ("", 0))
        if digest and file_differences.may_read_file(
            worker, page_request.hub, who, view, digest=digest, commit=proposal.commit
        ):
            evaluations = _declared_evaluations(worker, digest)
    return ProposalPage(
        name=view.name,
        number=number,
        proposal=proposal,
        change=change,
        evaluations=evaluations,
        files=files,
        more=unlisted_count,
        may_decide=may_write(who, view.name),
        is_author=who is not None and who.account == proposal.author,
        host=page_request.url,
    )


def _declared_evaluations(worker: Worker, digest: Digest) -> tuple[DeclaredEvaluation, ...]:
    """Return the results that an adapter.json declares; none of one that is not valid."""
    try:
        raw = worker.registry.store.read_document(digest)
        return (AdapterManifest.parse(raw, ADAPTER_JSON).evaluations or ())[:_MAX_EVALUATIONS]
    except AdapterhubError:
        return ()
