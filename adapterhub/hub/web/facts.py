"""What is read from the bytes of a version: its documents, the headers of its weights, what each runtime makes of it.

All of it follows from the version's digest, so it is read once. Headers are read in place; only where the weights are wanted
as numbers are they read as a whole, up to MOST bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from adapterhub.hub.forms import check_numbers
from adapterhub.hub.workers import Worker
from adapterhub.index.queries import Row
from adapterhub.manifest import card as model_cards
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.store.export import linked
from adapterhub_converters.adapter_files import adapter_in, is_weights
from adapterhub_converters.errors import AdapterhubError

from . import cards, drawings
from .drawings import Curve

if TYPE_CHECKING:
    from adapterhub.analysis.norms import Heat
    from adapterhub.checks import Group, Problem, Verdict
    from adapterhub.checks.contents import Contents
    from adapterhub_converters.containers.safetensors_file import TensorInfo

MOST = 512 << 20
"""Bytes of weights that are read as numbers for a page."""
MOST_TENSORS = 20_000
"""Tensors of these, and of what is remembered of a version."""
_MOST_COPIED = 64 << 20  # bytes that are unpacked, or read as a whole, for what the headers of other formats say
_MOST_SCANNED = 64 << 20  # bytes of files, which a scan reads in a third of a second
_PROBLEMS = 5  # of each kind
_SHOWN = 100  # of targets, parents, data and metrics


@dataclass(frozen=True)
class Facts:
    """A version by its bytes.

    Attributes:
        manifest: Its adapter.json, so far as that is usable and pages show it: without files, modules and the loss curve.
        card: Its model card, without front matter.
        verdicts: Runtime to verdict; empty if the headers were not read.
        problems: What a check of the headers finds.
        tensors: The first of its weights, in file order, and the number of all.
        max_rank: The highest rank of any module.
        replaced: The number of replaced parameters.
        curve: Its losses, drawn.
        unread: Why the headers were not read.
        scanned: What `scan` finds in its files.
        unscanned: Why they were not scanned; empty if they were.
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


def read(worker: Worker, row: Row) -> Facts:
    """Read a version; what of it cannot be read is left out."""
    from adapterhub.checks import examined

    made = worker.manifest(row)
    found = _scanned(worker, _documents(worker, row, made), made)
    size = weights_size(made)
    plain = all(worker.registry.store.has_plain(layer.digest) for layer in made.layers)
    if size > _MOST_COPIED and (not plain or row.format != "peft"):
        return replace(found, unread="its weights are too large to be read for a page")
    try:
        with (
            linked(worker.registry.store, made.layers) as folder,
            examined(folder, headers_only=True, limit=_PROBLEMS, where=str(row.ref)) as (report, contents),
        ):
            tensors = list(_tensors(contents)) if contents else []
            problems = tuple(report.grouped())
            first = tuple(tensors[:MOST_TENSORS])
            return replace(found, verdicts=report.verdicts, problems=problems, tensors=first, total=len(tensors))
    except AdapterhubError as error:
        return replace(found, unread=error.what)


def _scanned(worker: Worker, found: Facts, made: Manifest) -> Facts:
    """The facts with what a scan of the files finds, of the errors and warnings; notes are left out."""
    from adapterhub.checks import scan

    if made.files_size > _MOST_SCANNED:
        return replace(found, unscanned=f"files of over {_MOST_SCANNED >> 20} MiB")
    try:
        report = scan.report(_opened(worker, made), str(made.digest), _PROBLEMS)
    except AdapterhubError as error:
        return replace(found, unscanned=error.what)
    told = replace(report, problems=tuple(one for one in report.problems if one.severity != "note"))
    return replace(found, scanned=tuple(told.grouped()))


def _opened(worker: Worker, made: Manifest) -> Iterator[tuple[int, Iterator[Problem]]]:
    """The files of a version as a scan takes them, each open while it is read."""
    from adapterhub.checks import scan
    from adapterhub.checks.scan.opened import opened

    for layer in made.layers:
        with worker.registry.store.open_blob(layer.digest) as blob:
            yield layer.size, scan.problems(opened(blob, layer.path, layer.size))


def _documents(worker: Worker, row: Row, made: Manifest) -> Facts:
    """What adapter.json and the card say; of lists that may have a million entries, what pages show."""
    manifest = worker.registry.adapter_manifest(row.digest) or AdapterManifest.salvage({})
    training = manifest.training
    slim = training and replace(
        training,
        config=None,
        weights=None,
        versions=None,
        curve=None,
        data=(training.data or ())[:_SHOWN],
        metrics=dict(itertools.islice((training.metrics or {}).items(), _SHOWN)),
    )
    shown = replace(
        manifest,
        modules={},
        files=(),
        targets=manifest.targets[:_SHOWN],
        replaced=(),
        parents=manifest.parents[:_SHOWN],
        training=slim,
    )
    curve = drawings.curve((training.curve if training else None) or ())
    card = _card(worker, row, made)
    return Facts(shown, card, {}, max_rank=manifest.max_rank, replaced=len(manifest.replaced), curve=curve)


def _card(worker: Worker, row: Row, made: Manifest) -> Markup:
    files = {layer.path: layer for layer in made.layers}
    for path, layer in files.items():
        if path.lower() in model_cards.NAMES and layer.size <= model_cards.MAX_BYTES:
            found = model_cards.decode(worker.registry.store.read_document(layer.digest))
            return cards.render(found.prose, files=files, where=f"/{row.name}/resolve/v{row.number}")
    return Markup()


def _tensors(contents: Contents) -> Iterator[TensorInfo]:
    from adapterhub_converters.containers.safetensors_file import TensorInfo

    if contents.files:
        for file in contents.files.values():
            yield from file.tensors.values()
        return
    pairs = ((f"{target}.{part}", kind) for target, parts in contents.pairs.items() for part, kind in parts.items())
    others = (contents.replaced, contents.rows, contents.copies, contents.other_tensors)
    for name, kind in itertools.chain(pairs, *(group.items() for group in others)):
        yield TensorInfo(name, kind.dtype, kind.shape, 0, kind.size)


def weights_size(made: Manifest) -> int:
    """Bytes of the weights of a version."""
    return sum(layer.size for layer in made.layers if is_weights(layer.path))


@contextmanager
def folder_of(worker: Worker, row: Row) -> Iterator[Path]:
    """The adapter of a version as a format reader takes it, for as long as the context lasts.

    Raises:
        RefusedError: As numbers, it takes too much memory.
    """
    with (
        worker.registry.store.lease("read", required=False) as lease,
        linked(worker.registry.store, worker.manifest(row).layers) as found,
    ):
        lease.note(row.digest)
        check_numbers(path := adapter_in(found), str(row.ref))
        yield path


def unmeasured(found: Facts, made: Manifest) -> str:
    """Why the weights of a version are not read as numbers for a page; empty if they are."""
    if weights_size(made) > MOST:
        return f"weights of over {MOST >> 20} MiB"
    return f"over {MOST_TENSORS:,} tensors" if found.total > MOST_TENSORS else ""


def heat(worker: Worker, row: Row) -> Heat | str:
    """Where a version acts; or why that is not known."""
    from adapterhub.analysis import norms
    from adapterhub_converters.formats import convert

    try:
        with folder_of(worker, row) as path:
            return norms.heat(convert.read(path))
    except AdapterhubError as error:
        return error.what
