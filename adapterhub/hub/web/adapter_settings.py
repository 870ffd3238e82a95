"""The settings of an adapter, for who may write to it: tags, deprecation, visibility, gate, retention, new name, removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapterhub.hub import gates
from adapterhub.hub.gates import AccessRequest, Gate
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.maintenance import retention
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.ref import Ref, is_name
from adapterhub_converters.lazy_dataclass import dataclass

from .gate_panel import access_requests
from .site import MovedError, Page, PageRequest


@dataclass(frozen=True)
class AdapterSettingsPage(Page):
    """What can be changed of an adapter.

    Attributes:
        tags: Each tag but `latest`, with its version and whether it is protected.
        deprecated: The reason by the number of a version; 0 for all.
        keep: Which versions a gc keeps; None for all.
        gate: Its gate; None without one.
        requests: Requests for access.
        is_admin: Whether the client may set those.
    """

    name: str
    private: bool
    versions: Sequence[VersionRow]
    tags: Mapping[str, tuple[VersionRow, bool]]
    deprecated: Mapping[str, str]
    keep: KeepRule | None
    gate: Gate | None
    requests: Sequence[AccessRequest]
    is_admin: bool
    template: ClassVar[str] = "adapter_settings.html"


@dataclass(frozen=True)
class RemovedPage(Page):
    """A name that was removed, and can be restored until a gc has run."""

    name: str
    template: ClassVar[str] = "removed.html"


@dataclass(frozen=True)
class UploadedPage(Page):
    """What became of the files of a form.

    Attributes:
        title: What was done with them.
        url: The page that shows what has changed, or would change.
        left_out: Those that are no files of an adapter.
        notes: Words for their author.
    """

    title: str
    url: str
    files: Sequence[str]
    left_out: Sequence[str]
    notes: str
    template: ClassVar[str] = "uploaded.html"


def settings_page(page_request: PageRequest, worker: Worker) -> Page:
    """GET /-/adapters/{namespace}/{repo}."""
    name = f"{page_request.part('namespace')}/{page_request.part('repo')}"
    view = page_request.hub.visible(worker, page_request.who, name)
    if view is None:
        return _removed_page(page_request, worker, name)
    if view.repository and view.repository.moved_to:
        raise MovedError(f"/-/adapters/{view.repository.moved_to}")
    page_request.hub.access.check_write(page_request.who, name)
    versions = queries.versions(worker.registry.index, name=name) if view.newest else []
    index = worker.registry.index
    with index.snapshot():
        protected, deprecated = queries.marks(index, "protect", name), queries.marks(index, "deprecate", name)
    tags = {tag: (row, tag in protected) for row in versions for tag in row.tags if tag != "latest"}
    is_admin = page_request.who is not None and page_request.who.has_role("admin", name.partition("/")[0])
    return AdapterSettingsPage(
        name=name,
        private=bool(view.repository and view.repository.private),
        versions=versions,
        tags=dict(sorted(tags.items())),
        deprecated=deprecated,
        keep=retention.chosen_rule(worker.registry, Ref(name)) if versions else None,
        gate=gates.find_gate(worker.database, name),
        requests=access_requests(worker, name) if is_admin else (),
        is_admin=is_admin,
    )


def _removed_page(page_request: PageRequest, worker: Worker, name: str) -> RemovedPage:
    """Return the page of a name that was removed; NotFoundError for any other that the client cannot see."""
    if not is_name(name):
        raise page_request.no_such_repository(name)
    # A hidden name looks up one that cannot exist, so that it takes as long as a missing one.
    looked_up_name = name if page_request.may_read(worker, name) else f"{name.partition('/')[0]}/-"
    if not worker.registry.ledger.current(looked_up_name).deleted:
        raise page_request.no_such_repository(name)
    page_request.hub.access.check_write(page_request.who, name)
    return RemovedPage(name)
