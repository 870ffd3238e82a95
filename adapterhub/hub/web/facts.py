"""Facts read from the bytes of a version: its documents, the headers of its weights, the verdict of each runtime.

They depend only on the version's digest, so they are read once. Headers are read in place; weights are read completely only
where their numbers are needed, up to MAX_WEIGHTS bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from adapterhub.hub.converted_versions import check_pair_numbers
from adapterhub.hub.workers import Worker
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import card as model_cards
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.store.export import linked_folder
from adapterhub_converters.adapter_files import is_weights, resolve_adapter
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from . import cards, drawings
from .drawings import Curve

if TYPE_CHECKING:
    from adapterhub.analysis.norms import NormHeatMap
    from adapterhub.checks import Group, Problem, Verdict
    from adapterhub.checks.contents import Contents
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.containers.safetensors_header import TensorInfo

MAX_WEIGHTS = 512 << 20
"""Limit in bytes of weights read as numbers for a page."""
MAX_TENSORS = 20_000
"""Limit of the tensors of such weights, and of those remembered about a version."""
_MAX_COPIED = 64 << 20  # bytes decompressed, or read completely, to get at the headers of other formats
_MAX_SCANNED = 64 << 20  # bytes of files; a scan of that many takes a third of a second
_MAX_PROBLEMS = 5  # of each kind
_MAX_SHOWN = 100  # of targets, parents, data and metrics


@dataclass(frozen=True)
class Facts:
    """A version, as far as its bytes tell.

    Attributes:
        manifest: Its adapter.json, as far as it is usable and shown: without files, modules and loss curve.
        card: Its model card, without front matter.
        verdicts: Runtime to verdict; empty if the headers were not read.
        problems: Problems found in the headers.
        tensors: The first tensors, in file order.
        total: The number of all tensors.
        max_rank: The highest rank of any module.
        replaced: The number of replaced parameters.
        curve: Its losses, drawn.
        unread: Why the headers were not read; empty if they were.
        scanned: What `scan` finds in its files.
        unscanned: Why the files were not scanned; empty if they were.
    """

    manifest: AdapterManifest
    card: Markup
    verdicts: Mapping[str, Verdict]
    problems: tuple[Group, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    total: int = 0
    unread: str = ""
    max_rank: int = 0
    replaced: int = 0
    curve: Curve | None = None
    scanned: tuple[Group, ...] = ()
    unscanned: str = ""


def read(worker: Worker, row: VersionRow, base: BaseSpec | None = None) -> Facts:
    """Read the facts of a version, leaving out whatever cannot be read; its verdicts are those on `base`, if that is known."""
    from adapterhub.checks import open_check

    oci = worker.manifest(row)
    facts = _with_scan(worker, _documents(worker, row, oci), oci)
    size = weights_size(oci)
    plain = all(worker.registry.store.has_plain(layer.digest) for layer in oci.layers)
    # Headers of other formats are only found by reading everything, and packed blobs have to be decompressed.
    if size > _MAX_COPIED and (not plain or row.format != "peft"):
        return replace(facts, unread="its weights are too large to be read for a page")
    try:
        with (
            linked_folder(worker.registry.store, oci.layers) as folder,
            open_check(folder, base=base, headers_only=True, limit=_MAX_PROBLEMS, display_name=str(row.ref)) as (
                report,
                contents,
            ),
        ):
            tensors = list(_tensors(contents)) if contents else []
            problems = tuple(report.grouped())
            first = tuple(tensors[:MAX_TENSORS])
            return replace(facts, verdicts=report.verdicts, problems=problems, tensors=first, total=len(tensors))
    except AdapterhubError as error:
        return replace(facts, unread=error.what)


def _with_scan(worker: Worker, facts: Facts, oci: Manifest) -> Facts:
    """Return the facts with the errors and warnings of a scan of the files, without its notes."""
    from adapterhub.checks import scan

    if oci.files_size > _MAX_SCANNED:
        return replace(facts, unscanned=f"files of over {_MAX_SCANNED >> 20} MiB")
    try:
        report = scan.report(_scan_inputs(worker, oci), str(oci.digest), _MAX_PROBLEMS)
    except AdapterhubError as error:
        return replace(facts, unscanned=error.what)
    without_notes = replace(report, problems=tuple(problem for problem in report.problems if problem.severity != "note"))
    return replace(facts, scanned=tuple(without_notes.grouped()))


def _scan_inputs(worker: Worker, oci: Manifest) -> Iterator[tuple[int, Iterator[Problem]]]:
    """Yield the files of a version as a scan takes them, each open while it is read."""
    from adapterhub.checks import scan
    from adapterhub.checks.scan.scanned_file import wrap_file

    for layer in oci.layers:
        with worker.registry.store.open_blob(layer.digest) as blob:
            yield layer.size, scan.problems(wrap_file(blob, layer.path, layer.size))


def _documents(worker: Worker, row: VersionRow, oci: Manifest) -> Facts:
    """Return the facts in adapter.json and the card; long lists are cut to what pages show."""
    manifest = worker.registry.adapter_manifest(row.digest) or AdapterManifest.salvage({})
    training = manifest.training
    # Facts stay in memory for hundreds of versions: drop what no page shows.
    slim = training and replace(
        training,
        config=None,
        weights=None,
        versions=None,
        curve=None,
        data=(training.data or ())[:_MAX_SHOWN],
        metrics=dict(itertools.islice((training.metrics or {}).items(), _MAX_SHOWN)),
    )
    shown_manifest = replace(
        manifest,
        modules={},
        files=(),
        targets=manifest.targets[:_MAX_SHOWN],
        replaced=(),
        parents=manifest.parents[:_MAX_SHOWN],
        training=slim,
    )
    curve = drawings.curve((training.curve if training else None) or ())
    card = _card(worker, row, oci)
    return Facts(shown_manifest, card, {}, max_rank=manifest.max_rank, replaced=len(manifest.replaced), curve=curve)


def _card(worker: Worker, row: VersionRow, oci: Manifest) -> Markup:
    files = {layer.path: layer for layer in oci.layers}
    for path, layer in files.items():
        if path.lower() in model_cards.NAMES and layer.size <= model_cards.MAX_BYTES:
            card = model_cards.decode(worker.registry.store.read_document(layer.digest))
            return cards.render(card.prose, files=files, folder_url=f"/{row.name}/resolve/v{row.number}")
    return Markup()


def _tensors(contents: Contents) -> Iterator[TensorInfo]:
    from adapterhub_converters.containers.safetensors_header import TensorInfo

    if contents.files:
        for file in contents.files.values():
            yield from file.tensors.values()
        return
    pairs = ((f"{target}.{part}", kind) for target, parts in contents.pairs.items() for part, kind in parts.items())
    other_groups = (contents.replaced, contents.rows, contents.copies, contents.other_tensors)
    for name, kind in itertools.chain(pairs, *(group.items() for group in other_groups)):
        yield TensorInfo(name, kind.dtype, kind.shape, 0, kind.size)


def weights_size(oci: Manifest) -> int:
    """Return the size of a version's weights in bytes."""
    return sum(layer.size for layer in oci.layers if is_weights(layer.path))


@contextmanager
def folder_of(worker: Worker, row: VersionRow) -> Iterator[Path]:
    """Yield the adapter of a version as a format reader takes it, while the context lasts.

    Raises:
        RefusedError: Expanded to numbers, it would take too much memory.
    """
    with (
        worker.registry.store.lease("read", required=False) as lease,
        linked_folder(worker.registry.store, worker.manifest(row).layers) as folder,
    ):
        # Keeps the version from a gc while its files are read.
        lease.note(row.digest)
        check_pair_numbers(path := resolve_adapter(folder), str(row.ref))
        yield path


def unmeasured_reason(facts: Facts, oci: Manifest) -> str:
    """Return why a version's weights are not read as numbers for a page; empty if they are."""
    if weights_size(oci) > MAX_WEIGHTS:
        return f"weights of over {MAX_WEIGHTS >> 20} MiB"
    return f"over {MAX_TENSORS:,} tensors" if facts.total > MAX_TENSORS else ""


def heat(worker: Worker, row: VersionRow) -> NormHeatMap | str:
    """Return where a version acts; or why that is not known."""
    from adapterhub.analysis import norms
    from adapterhub_converters.formats import convert

    try:
        with folder_of(worker, row) as path:
            return norms.build_heat_map(convert.read(path))
    except AdapterhubError as error:
        return error.what
