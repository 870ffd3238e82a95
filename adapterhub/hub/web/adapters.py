"""The pages of an adapter: one with everything about a version, and those of its versions, tensors, norms and lineage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from adapterhub import runtime_commands
from adapterhub.hub import commits
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.publishing import attached_signatures
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.manifest import measurement
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import Ref, parse_number
from adapterhub.registry import signatures
from adapterhub.registry.lineage import Lineage, Node, trace
from adapterhub.registry.repositories import OtherManifest
from adapterhub.registry.signatures import Shown
from adapterhub.trust.bundle import MEDIA_TYPE
from adapterhub_converters.errors import NotFoundError

from . import drawings, facts
from .browsing import Event, events
from .drawings import Box, Graph, HeatMap
from .facts import Facts
from .site import Asked, MovedError, Page, answered, rendered

if TYPE_CHECKING:
    from adapterhub.analysis.norms import Heat
    from adapterhub_converters.containers.safetensors_file import TensorInfo

_VERSIONS, _CHILDREN, _TENSORS, _SIGNATURES = 8, 20, 500, 20  # that the page of an adapter shows


@dataclass(frozen=True)
class Version:
    """A version with what every page of it shows.

    Attributes:
        of: Its repository.
        row: The version.
        tags: Its tags, each with whether it is protected.
        deprecated: The reason, None if it is in good standing.
    """

    of: View
    row: Row
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
        """Whether only members see it."""
        return bool(self.of.repository and self.of.repository.private)

    @property
    def is_latest(self) -> bool:
        """Whether it is the newest."""
        return self.of.newest is not None and self.of.newest.number == self.row.number


_MOST_VERSIONS = 10**9


def version_of(asked: Asked, worker: Worker) -> Version:
    """The version of the path, the newest where that has no number; NotFoundError without it."""
    of = asked.repository(worker)
    if of.repository and (moved := of.repository.moved_to):
        if asked.hub.visible(worker, asked.who, moved) is None:
            raise asked.no_such_repository(of.name)
        raise MovedError(f"/{moved}")
    if of.newest is None:
        raise NotFoundError(of.name, "has no version yet")
    if "number" not in asked.request.path_params:
        return described(worker, of, of.newest)
    number = parse_number(f"v{asked.part('number')}", of.name)
    if number is None:
        raise NotFoundError(of.name, "there is no such page")
    return described(worker, of, worker.registry.row(Ref(of.name, number=number)))


def described(worker: Worker, of: View, row: Row) -> Version:
    """A version with its tags and whether it is deprecated."""
    protected = queries.marks(worker.registry.index, "protect", row.name) if row.tags else {}
    reasons = queries.marks(worker.registry.index, "deprecate", row.name)
    return Version(of, row, {tag: tag in protected for tag in row.tags}, reasons.get(str(row.number), reasons.get("0")))


def facts_of(asked: Asked, worker: Worker, row: Row) -> Facts:
    """What is read from the bytes of a version."""
    return asked.site.facts.get(row.digest, lambda: facts.read(worker, row))


# ---- everything about a version


@dataclass(frozen=True)
class Use:
    """What to type to use a version; a command is None where the program cannot use it.

    Attributes:
        folder: Where the commands expect the adapter.
        base: Name of the base, or a word that stands for it.
        oci: Its address for oras and adapterhub, without the scheme.
        scheme: The scheme of that for adapterhub.
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
    """A version: its facts, how to use it, and what is known about it."""

    version: Version
    facts: Facts
    use: Use
    files: Sequence[Descriptor]
    tensors: Sequence[TensorInfo]
    tensor_prefix: str
    unmeasured: str
    metrics: Mapping[str, float]
    evaluations: Sequence[Mapping[str, Any]]
    versions: Sequence[Row]
    total_versions: int
    children: Sequence[Row]
    copies: Sequence[Row]
    signed: Sequence[Shown]
    attached: Mapping[str, OtherManifest]
    events: Sequence[Event]
    template: ClassVar[str] = "adapter.html"

    @property
    def previous(self) -> Row | None:
        """The version before it, if that is among those shown."""
        return next((row for row in self.versions if row.number < self.version.row.number), None)

    @property
    def manifest(self) -> AdapterManifest:
        """Its adapter.json."""
        return self.facts.manifest


@dataclass(frozen=True)
class UnfinishedPage(Page):
    """A repository without a version: what was pushed so far is no whole adapter."""

    of: View
    commit: Commit
    template: ClassVar[str] = "unfinished.html"


def adapter_page(asked: Asked, worker: Worker) -> Page:
    """GET /{namespace}/{repo} and /{namespace}/{repo}/v{number}."""
    of = asked.repository(worker)
    if of.newest is None and not (of.repository and of.repository.moved_to) and "number" not in asked.request.path_params:
        return UnfinishedPage(of, commits.find(worker, of, commits.HEAD))
    version = version_of(asked, worker)
    row, index = version.row, worker.registry.index
    read, made = facts_of(asked, worker, row), worker.manifest(row)
    training = read.manifest.training
    versions = queries.versions(index, name=row.name)
    others = of.repository.manifests if of.repository else {}
    attached = {digest: one for digest, one in others.items() if one.subject == row.digest}
    shown = read.tensors[:_TENSORS]
    return AdapterPage(
        version,
        read,
        _use(asked, row, read.max_rank),
        made.layers,
        shown,
        _shared([tensor.name for tensor in shown]),
        facts.unmeasured(read, made),
        dict(_numbers(training.metrics if training else None)),
        measurement.of_version(queries.marks(index, "evaluate", row.name), row.number),
        versions[:_VERSIONS],
        len(versions),
        [child for child in worker.registry.children(row.digest) if asked.may_read(worker, child.name)][:_CHILDREN],
        [copy for copy in worker.registry.holding(row.digest) if copy.name != row.name and asked.may_read(worker, copy.name)],
        _signed(asked, worker, row, made, tuple(digest for digest, one in attached.items() if one.artifact_type == MEDIA_TYPE)),
        {digest: one for digest, one in attached.items() if one.artifact_type != MEDIA_TYPE},
        events(worker, [row.name], each=12, most=6),
    )


def _signed(asked: Asked, worker: Worker, row: Row, made: Manifest, attached: tuple[str, ...]) -> Sequence[Shown]:
    """The signatures that are attached to a version; looked at once, as each of them is read as a whole."""

    def look() -> Sequence[Shown]:
        found = attached_signatures(worker, row.name, row.digest)
        return signatures.shown(asked.hub.settings.policy, made, found, row.name)[:_SIGNATURES]

    return asked.site.signed.get((row.name, row.digest, attached), look) if attached else ()


def _use(asked: Asked, row: Row, rank: int) -> Use:
    folder, base = row.name.partition("/")[2], row.base or ""
    scheme, _, host = asked.url.partition("://")
    here = f"./{folder}"
    return Use(
        folder,
        base or "BASE",
        asked.url,
        f"{host}/{row.name}:v{row.number}",
        "oci" if scheme == "https" else "oci+http",
        runtime_commands.vllm(folder, here, base, rank=rank),
        runtime_commands.llama_server("", f"{folder}.gguf"),
        runtime_commands.mlx(base, f"{here}-mlx"),
        runtime_commands.ollama(folder, f"{folder}-ollama"),
    )


def _numbers(metrics: object) -> Iterator[tuple[str, float]]:
    if isinstance(metrics, Mapping):
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield str(key), float(value)


def _shared(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot."""
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")
    length = next((at for at, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    return first[: first.rfind(".", 0, length) + 1]


# ---- versions


@dataclass(frozen=True)
class VersionsPage(Page):
    """Every version of an adapter, the newest first."""

    version: Version
    rows: Sequence[Row]
    deprecated: Mapping[str, str]
    template: ClassVar[str] = "versions.html"


def versions_page(asked: Asked, worker: Worker) -> VersionsPage:
    """GET …/versions."""
    version, index = version_of(asked, worker), worker.registry.index
    rows = queries.versions(index, name=version.name)
    return VersionsPage(version, rows, queries.marks(index, "deprecate", version.name))


def revision(asked: Asked, worker: Worker) -> Page:
    """GET …/tree/{rev}, …/blob/{rev}/{path}, …/commit/{rev}: the addresses that clients of the Hugging Face Hub print."""
    of = asked.repository(worker)
    found = commits.find(worker, of, asked.part("revision"))
    path = asked.request.path_params.get("path")
    if path and path in found.files:
        raise MovedError(f"/{of.name}/resolve/{found.id}/{path}")
    raise MovedError(f"/{of.name}/v{found.row.number}" if found.row else f"/{of.name}")


# ---- tensors


@dataclass(frozen=True)
class TensorsPage(Page):
    """The tensors of a version, a thousand on a page."""

    version: Version
    tensors: Sequence[TensorInfo]
    total: int
    number: int
    pages: int
    unread: str
    template: ClassVar[str] = "tensors.html"


_PER_PAGE = 1000


def tensors_page(asked: Asked, worker: Worker) -> TensorsPage:
    """GET …/v{number}/tensors."""
    version = version_of(asked, worker)
    read = facts_of(asked, worker, version.row)
    pages = max(1, -(-len(read.tensors) // _PER_PAGE))
    number = min(pages, max(1, int(asked.query("page")))) if asked.query("page").isdecimal() else 1
    shown = read.tensors[(number - 1) * _PER_PAGE : number * _PER_PAGE]
    return TensorsPage(version, shown, read.total, number, pages, read.unread)


# ---- where it acts


@dataclass(frozen=True)
class HeatPicture(Page):
    """The heat map as SVG, in the colors of a theme; or why there is none."""

    found: HeatMap | str
    theme: str
    template: ClassVar[str] = "heat.svg"


@dataclass(frozen=True)
class NormsPage(Page):
    """The heat map, and its numbers as a table."""

    version: Version
    found: Heat | str
    template: ClassVar[str] = "norms.html"


async def heat_picture(request: Request) -> Response:
    """GET …/v{number}/heat.svg?theme=dark; reads the weights, so that it is apart from the page."""
    return await _slowly(request, lambda asked, _version, found: _picture(asked, found), "image/svg+xml")


def _picture(asked: Asked, found: Heat | str) -> HeatPicture:
    shown = found if isinstance(found, str) else drawings.heat_map(found)
    return HeatPicture(shown, "dark" if asked.query("theme") == "dark" else "light")


async def norms_page(request: Request) -> Response:
    """GET …/v{number}/norms."""
    return await _slowly(request, lambda _asked, version, found: NormsPage(version, found))


async def _slowly(
    request: Request, make: Callable[[Asked, Version, Heat | str], Page], media_type: str = "text/html; charset=utf-8"
) -> Response:
    """Answer with a page that needs the norms of a version."""

    def find(asked: Asked, worker: Worker) -> tuple[Asked, Version, str]:
        version = version_of(asked, worker)
        return asked, version, facts.unmeasured(facts_of(asked, worker, version.row), worker.manifest(version.row))

    found = await answered(request, find)
    if isinstance(found, Response):
        return found
    asked, version, why = found

    def work(worker: Worker) -> Response:
        heat = why or asked.site.heats.get(version.row.digest, lambda: facts.heat(worker, version.row))
        return rendered(asked, make(asked, version, heat), media_type=media_type)

    return await asked.site.slow.run(work)


# ---- lineage


@dataclass(frozen=True)
class LineagePage(Page):
    """What a version was made from, and what was made from it."""

    version: Version
    graph: Graph | None
    nodes: Sequence[tuple[str, str, str]]
    template: ClassVar[str] = "lineage.html"


_MOST_BOXES = 150
_MOST_DATA = 4  # data sets of one adapter


def lineage_page(asked: Asked, worker: Worker) -> LineagePage:
    """GET …/v{number}/lineage."""
    version = version_of(asked, worker)
    boxes, edges = _graph(_visible(asked, worker, trace(worker.registry, version.row.ref)))
    graph = drawings.graph(boxes, edges) if len(boxes) <= _MOST_BOXES else None
    return LineagePage(version, graph, [(box.lines[0], " · ".join(box.lines[1:]), box.url) for box in boxes.values()])


def _visible(asked: Asked, worker: Worker, found: Lineage) -> Lineage:
    """A lineage without what is in private repositories: of an ancestor there, only what its children say of it."""
    nodes: dict[str, Node] = {}
    recorded = {parent.digest for node in found.nodes.values() for parent in node.parents}
    for digest, node in found.nodes.items():
        refs = tuple(ref for ref in node.refs if asked.may_read(worker, ref.partition(":")[0].partition("@")[0]))
        if refs or not node.manifest:
            nodes[digest] = Node(digest, refs, node.manifest, node.deprecated)
    above = _reached(found.root, [(edge.child, edge.parent) for edge in found.edges])
    nodes |= {digest: Node(digest, ()) for digest in above & recorded - nodes.keys()}
    edges = [edge for edge in found.edges if edge.parent in nodes and edge.child in nodes]
    up, down = [(edge.child, edge.parent) for edge in edges], [(edge.parent, edge.child) for edge in edges]
    kept = _reached(found.root, up) | _reached(found.root, down)
    left = {digest: node for digest, node in nodes.items() if digest in kept}
    return Lineage(found.root, left, tuple(edge for edge in edges if edge.parent in left and edge.child in left))


def _reached(start: str, steps: Sequence[tuple[str, str]]) -> set[str]:
    """What steps lead to from a start, itself included."""
    after: dict[str, list[str]] = {}
    for one, other in steps:
        after.setdefault(one, []).append(other)
    seen, waiting = {start}, [start]
    while waiting:
        for other in after.get(waiting.pop(), []):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def _graph(found: Lineage) -> tuple[dict[str, Box], dict[tuple[str, str], str]]:
    """The boxes by name, and the edges with their labels."""
    boxes: dict[str, Box] = {}
    edges: dict[tuple[str, str], str] = {}
    for digest, node in found.nodes.items():
        here = node.manifest is not None
        name = node.refs[0] if node.refs else digest[:19]
        rank = f", r {node.manifest.r}" if node.manifest and node.manifest.r else ""
        kind = "root" if digest == found.root else "adapter" if here else "missing"
        how = node.how if here else "not visible here"
        boxes[digest] = Box((name, how + rank), kind, "/" + name.replace(":", "/") if here and ":v" in name else "")
        if node.base and not node.parents:
            boxes[f"base {node.base}"] = Box((node.base, "base model"), "base")
            edges[f"base {node.base}", digest] = ""
        for data in node.data[:_MOST_DATA]:
            key = f"data {data.digest or data.name or data.path}"
            boxes[key] = Box((data.name or data.path or "data", "data"), "data")
            edges[key, digest] = ""
    for edge in found.edges:
        edges[edge.parent, edge.child] = "" if edge.weight in (None, 1) else f"{edge.weight:g}"
    return boxes, edges
