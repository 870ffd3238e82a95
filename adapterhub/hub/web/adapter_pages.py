"""The pages of an adapter: one with everything about a version, and those of its versions, tensors, norms and lineage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest
from adapterhub.hub import commits, stars
from adapterhub.hub.access_control import ThrottledError
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.downloads import downloads_by_version
from adapterhub.hub.policy_gate import check_not_withdrawn
from adapterhub.hub.publishing import attached_signatures
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import card as model_cards
from adapterhub.manifest import measurement
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import Ref, parse_number
from adapterhub.registry import lineage_graph, signature_policy, withdrawals
from adapterhub.registry.lineage_graph import Lineage
from adapterhub.registry.repository_documents import OtherManifest
from adapterhub.registry.signature_policy import SignatureSummary
from adapterhub.trust import cosign
from adapterhub.trust.bundle import MEDIA_TYPE
from adapterhub_converters import runtime_commands
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import drawings, facts, verdict_strip
from .browsing import Event, log_events
from .drawings import Box, Graph, HeatMap
from .facts import Facts
from .file_editor import CARD
from .gate_panel import GatePanel, gate_panel
from .site import MovedError, Page, PageRequest, answer_page, error_page, render_page
from .verdict_strip import StripItem

if TYPE_CHECKING:
    from adapterhub.analysis.norms import NormHeatMap
    from adapterhub_converters.containers.safetensors_header import TensorInfo

_SIGNATURE_TYPES = (MEDIA_TYPE, cosign.ARTIFACT_TYPE)
_VERSIONS, _CHILDREN, _TENSORS, _SIGNATURES = 8, 20, 500, 20  # limits of what an adapter's page shows


@dataclass(frozen=True)
class Version:
    """A version, with what each of its pages shows.

    Attributes:
        of: Its repository.
        row: The version.
        tags: Its tags, and whether each one is protected.
        deprecated: The reason it is deprecated; None if it is not.
    """

    of: View
    row: VersionRow
    tags: Mapping[str, bool]
    deprecated: str | None

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.row.name

    @property
    def url(self) -> str:
        """The address of its page."""
        return f"/{self.row.name}/v{self.row.number}"

    @property
    def private(self) -> bool:
        """Whether only members can see it."""
        return bool(self.of.repository and self.of.repository.private)

    @property
    def is_latest(self) -> bool:
        """Whether it is the newest version."""
        return self.of.newest is not None and self.of.newest.number == self.row.number


def version_of(page_request: PageRequest, worker: Worker) -> Version:
    """Return the version of the path, the newest one if the path has no number.

    Raises:
        NotFoundError: There is no such version.
        MovedError: The repository has another name now.
    """
    view = page_request.current_repository(worker)
    if view.newest is None:
        raise NotFoundError(view.name, "has no version yet")
    if "number" not in page_request.request.path_params:
        return version_with_tags(worker, view, view.newest)
    number = parse_number(f"v{page_request.part('number')}", view.name)
    if number is None:
        raise NotFoundError(view.name, "there is no such page")
    return version_with_tags(worker, view, worker.registry.row(Ref(view.name, number=number)))


def usable_version_of(page_request: PageRequest, worker: Worker) -> Version:
    """Return the version of the path as `version_of` does, to show what is in it; RefusedError if it was withdrawn."""
    version = version_of(page_request, worker)
    check_not_withdrawn(worker, version.row)
    return version


def version_with_tags(worker: Worker, view: View, row: VersionRow) -> Version:
    """Return a version with its tags and whether it is deprecated."""
    index = worker.registry.index
    with index.snapshot():
        protected = queries.marks(index, "protect", row.name) if row.tags else {}
        reasons = queries.marks(index, "deprecate", row.name)
    return Version(view, row, {tag: tag in protected for tag in row.tags}, reasons.get(str(row.number), reasons.get("0")))


def facts_of(page_request: PageRequest, worker: Worker, row: VersionRow) -> Facts:
    """Return what is read from the bytes of a version."""
    return page_request.site.facts_of(worker, row)


# ---- everything about a version


@dataclass(frozen=True)
class UsageCommands:
    """The commands to use a version; a command is None if the program cannot use it.

    Attributes:
        folder: Where the commands expect the adapter.
        base: The name of the base, or a placeholder.
        oci: The address for oras and adapterhub, without the scheme.
        scheme: The scheme of that address for adapterhub.
    """

    folder: str
    base: str
    host: str
    oci: str
    scheme: str
    vllm: str | None
    llama_cpp: str
    mlx: str
    ollama: str


@dataclass(frozen=True)
class AdapterPage(Page):
    """A version: its facts, how to use it, and what else is known about it."""

    version: Version
    facts: Facts
    use: UsageCommands
    files: Sequence[Descriptor]
    card_path: str
    tensors: Sequence[TensorInfo]
    tensor_prefix: str
    unmeasured: str
    metrics: Mapping[str, float]
    evaluations: Sequence[Mapping[str, Any]]
    versions: Sequence[VersionRow]
    total_versions: int
    children: Sequence[VersionRow]
    copies: Sequence[VersionRow]
    signed: Sequence[SignatureSummary]
    attached: Mapping[str, OtherManifest]
    events: Sequence[Event]
    downloads: int
    stars: int
    has_star: bool
    gate: GatePanel | None
    template: ClassVar[str] = "adapter.html"

    @property
    def strip(self) -> Sequence[StripItem]:
        """The verdicts about it, in one line."""
        return verdict_strip.items(self.version.row, self.facts, self.signed)

    @property
    def previous(self) -> VersionRow | None:
        """The version before it, if that is among those shown."""
        return next((row for row in self.versions if row.number < self.version.row.number), None)

    @property
    def manifest(self) -> AdapterManifest:
        """Its adapter.json."""
        return self.facts.manifest


@dataclass(frozen=True)
class UnfinishedPage(Page):
    """A repository without a version: what was pushed so far is not a complete adapter."""

    of: View
    commit: Commit
    gate: GatePanel | None
    template: ClassVar[str] = "unfinished.html"


def adapter_page(page_request: PageRequest, worker: Worker) -> Page:
    """GET /{namespace}/{repo} and /{namespace}/{repo}/v{number}."""
    view = page_request.repository(worker)
    if (
        view.newest is None
        and not (view.repository and view.repository.moved_to)
        and "number" not in page_request.request.path_params
    ):
        return UnfinishedPage(view, commits.find(worker, view, commits.HEAD), gate_panel(page_request, worker, view))
    version = usable_version_of(page_request, worker)
    row, registry = version.row, worker.registry
    adapter_facts, oci = facts_of(page_request, worker, row), worker.manifest(row)
    training = adapter_facts.manifest.training
    versions = queries.versions(registry.index, name=row.name)
    other_manifests = view.repository.manifests if view.repository else {}
    attached = {digest: manifest for digest, manifest in other_manifests.items() if manifest.subject == row.digest}
    signatures = tuple(digest for digest, manifest in attached.items() if manifest.artifact_type in _SIGNATURE_TYPES)
    tagged = view.repository.tags if view.repository else {}
    signatures += tuple(tagged[tag] for tag in cosign.tags(row.digest) if tag in tagged)
    first_tensors = adapter_facts.tensors[:_TENSORS]

    def readable(rows: Iterable[VersionRow]) -> list[VersionRow]:
        return [other for other in rows if page_request.may_read(worker, other.name)]

    return AdapterPage(
        version=version,
        facts=adapter_facts,
        use=_use(page_request, row, adapter_facts.max_rank),
        files=oci.layers,
        card_path=next((layer.path for layer in oci.layers if layer.path.lower() in model_cards.NAMES), CARD),
        tensors=first_tensors,
        tensor_prefix=_common_prefix([tensor.name for tensor in first_tensors]),
        unmeasured=facts.unmeasured_reason(adapter_facts, oci),
        metrics=dict(_numeric_metrics(training.metrics if training else None)),
        evaluations=measurement.version_evaluations(queries.marks(registry.index, "evaluate", row.name), row.number),
        versions=versions[:_VERSIONS],
        total_versions=len(versions),
        children=readable(registry.children(row.digest))[:_CHILDREN],
        copies=readable(copy for copy in registry.versions_with(row.digest) if copy.name != row.name),
        signed=_shown_signatures(page_request, worker, row, oci, signatures),
        attached={digest: attached[digest] for digest in attached if digest not in signatures},
        events=log_events(worker, [row.name], per_name=12, limit=6),
        downloads=page_request.hub.downloads.recent([row.name])[row.name],
        stars=stars.counts(worker.database, [row.name]).get(row.name, 0),
        has_star=page_request.who is not None and stars.has_star(worker.database, row.name, page_request.who.account),
        gate=gate_panel(page_request, worker, view),
    )


def _shown_signatures(
    page_request: PageRequest, worker: Worker, row: VersionRow, oci: Manifest, attached: tuple[str, ...]
) -> Sequence[SignatureSummary]:
    """Return the signatures attached to a version; cached, because each of them has to be read completely."""

    def look() -> Sequence[SignatureSummary]:
        bundles = attached_signatures(worker, row.name, row.digest)
        return signature_policy.summarize(page_request.hub.settings.policy, oci, bundles, row.name)[:_SIGNATURES]

    return page_request.site.signed.get((row.name, row.digest, attached), look) if attached else ()


def _use(page_request: PageRequest, row: VersionRow, rank: int) -> UsageCommands:
    folder, base = row.name.partition("/")[2], row.base or ""
    scheme, _, host = page_request.url.partition("://")
    local_path = f"./{folder}"
    return UsageCommands(
        folder=folder,
        base=base or "BASE",
        host=page_request.url,
        oci=f"{host}/{row.name}:v{row.number}",
        scheme="oci" if scheme == "https" else "oci+http",
        vllm=runtime_commands.vllm(folder, local_path, base, rank=rank),
        llama_cpp=runtime_commands.llama_server("", f"{folder}.gguf"),
        mlx=runtime_commands.mlx(base, f"{local_path}-mlx"),
        ollama=runtime_commands.ollama(folder, f"{folder}-ollama"),
    )


def _numeric_metrics(metrics: object) -> Iterator[tuple[str, float]]:
    if isinstance(metrics, Mapping):
        for key, value in metrics.items():
            if is_number(value):
                yield str(key), float(value)


def _common_prefix(names: Sequence[str]) -> str:
    """Return the common prefix of all names, up to a dot."""
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")
    length = next(
        (position for position, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last))
    )
    return first[: first.rfind(".", 0, length) + 1]


# ---- versions


@dataclass(frozen=True)
class VersionsPage(Page):
    """Every version of an adapter, the newest first; `withdrawn` has the reasons by digest."""

    version: Version
    rows: Sequence[VersionRow]
    deprecated: Mapping[str, str]
    withdrawn: Mapping[Digest, str]
    downloads: Mapping[int, int]
    template: ClassVar[str] = "versions.html"


def versions_page(page_request: PageRequest, worker: Worker) -> VersionsPage:
    """GET …/versions."""
    version, index = version_of(page_request, worker), worker.registry.index
    with index.snapshot():
        rows = queries.versions(index, name=version.name)
        deprecated, withdrawn = queries.marks(index, "deprecate", version.name), withdrawals.reasons(index, version.name)
    return VersionsPage(version, rows, deprecated, withdrawn, downloads_by_version(worker.database, version.name))


def revision(page_request: PageRequest, worker: Worker) -> Page:
    """GET …/tree/{rev}: an address that clients of the Hugging Face Hub print."""
    view = page_request.repository(worker)
    commit = commits.find(worker, view, page_request.part("revision"))
    raise MovedError(f"/{view.name}/v{commit.row.number}" if commit.row else f"/{view.name}")


# ---- tensors


@dataclass(frozen=True)
class TensorsPage(Page):
    """The tensors of a version, a thousand per page."""

    version: Version
    tensors: Sequence[TensorInfo]
    total: int
    number: int
    pages: int
    unread: str
    template: ClassVar[str] = "tensors.html"


_PER_PAGE = 1000


def tensors_page(page_request: PageRequest, worker: Worker) -> TensorsPage:
    """GET …/v{number}/tensors."""
    version = usable_version_of(page_request, worker)
    adapter_facts = facts_of(page_request, worker, version.row)
    pages = max(1, -(-len(adapter_facts.tensors) // _PER_PAGE))
    number = min(pages, max(1, int(page_request.query("page")))) if page_request.query("page").isdecimal() else 1
    page_tensors = adapter_facts.tensors[(number - 1) * _PER_PAGE : number * _PER_PAGE]
    return TensorsPage(version, page_tensors, adapter_facts.total, number, pages, adapter_facts.unread)


# ---- where it acts


@dataclass(frozen=True)
class HeatPicture(Page):
    """The heat map as SVG in the colors of a theme; or why there is none."""

    found: HeatMap | str
    theme: str
    template: ClassVar[str] = "heat.svg"


@dataclass(frozen=True)
class NormsPage(Page):
    """The heat map, and its numbers as a table."""

    version: Version
    found: NormHeatMap | str
    template: ClassVar[str] = "norms.html"


async def heat_picture(request: Request) -> Response:
    """GET …/v{number}/heat.svg?theme=dark: separate from the page, because it reads the weights."""
    return await _respond_with_norms(
        request, lambda page_request, _version, heat: _picture(page_request, heat), "image/svg+xml"
    )


def _picture(page_request: PageRequest, heat: NormHeatMap | str) -> HeatPicture:
    picture = heat if isinstance(heat, str) else drawings.heat_map(heat)
    return HeatPicture(picture, "dark" if page_request.query("theme") == "dark" else "light")


async def norms_page(request: Request) -> Response:
    """GET …/v{number}/norms."""
    return await _respond_with_norms(request, lambda _page_request, version, heat: NormsPage(version, heat))


async def _respond_with_norms(
    request: Request,
    make: Callable[[PageRequest, Version, NormHeatMap | str], Page],
    media_type: str = "text/html; charset=utf-8",
) -> Response:
    """Return a page that needs the norms of a version."""

    def find(page_request: PageRequest, worker: Worker) -> tuple[PageRequest, Version, str]:
        version = usable_version_of(page_request, worker)
        return (
            page_request,
            version,
            facts.unmeasured_reason(facts_of(page_request, worker, version.row), worker.manifest(version.row)),
        )

    result = await answer_page(request, find)
    if isinstance(result, Response):
        return result
    page_request, version, reason = result

    def work(worker: Worker) -> Response:
        heat = reason or page_request.site.heats.get(version.row.digest, lambda: facts.heat(worker, version.row))
        return render_page(page_request, make(page_request, version, heat), media_type=media_type)

    future = page_request.site.start_slowly(work)
    # No page without the picture, which could be cached.
    return await future if future is not None else error_page(page_request, ThrottledError(60))


# ---- lineage


@dataclass(frozen=True)
class LineagePage(Page):
    """What a version was made from, and what was made from it."""

    version: Version
    graph: Graph | None
    nodes: Sequence[tuple[str, str, str]]
    template: ClassVar[str] = "lineage.html"


_MAX_BOXES = 150
_MAX_DATA = 4  # data sets shown per adapter


def lineage_page(page_request: PageRequest, worker: Worker) -> LineagePage:
    """GET …/v{number}/lineage."""
    version = version_of(page_request, worker)
    boxes, edges = _graph(
        lineage_graph.visible(
            lineage_graph.trace(worker.registry, version.row.ref), lambda name: page_request.may_read(worker, name)
        )
    )
    graph = drawings.graph(boxes, edges) if len(boxes) <= _MAX_BOXES else None
    return LineagePage(version, graph, [(box.lines[0], " · ".join(box.lines[1:]), box.url) for box in boxes.values()])


def _graph(lineage: Lineage) -> tuple[dict[str, Box], dict[tuple[str, str], str]]:
    """Return the boxes of a drawing by key, and the edges with their labels."""
    boxes: dict[str, Box] = {}
    edges: dict[tuple[str, str], str] = {}
    for digest, node in lineage.nodes.items():
        is_visible = node.manifest is not None
        name = node.refs[0] if node.refs else digest[:19]
        rank = f", r {node.manifest.rank}" if node.manifest and node.manifest.rank else ""
        kind = "root" if digest == lineage.root else "adapter" if is_visible else "missing"
        method = node.origin if is_visible else "not visible here"
        boxes[digest] = Box((name, method + rank), kind, "/" + name.replace(":", "/") if is_visible and ":v" in name else "")
        if node.base and not node.parents:
            boxes[f"base {node.base}"] = Box((node.base, "base model"), "base")
            edges[f"base {node.base}", digest] = ""
        for data in node.data[:_MAX_DATA]:
            key = f"data {data.digest or data.name or data.path}"
            boxes[key] = Box((data.name or data.path or "data", "data"), "data")
            edges[key, digest] = ""
    for edge in lineage.edges:
        edges[edge.parent, edge.child] = "" if edge.weight in (None, 1) else f"{edge.weight:g}"
    return boxes, edges
