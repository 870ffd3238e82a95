"""What a policy asks about a stored version besides its adapter.json: its parents, and what a scan of its files finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest import oci_manifest
from adapterhub.project.policy_rules import Measurements, VersionFacts
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.index.index_database import Index
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.measurement import Evaluation
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.store.store import Store


def stored_facts(store: Store, manifest: Manifest, measurements: Measurements) -> VersionFacts:
    """Return the facts of a version whose files are in a store."""
    return VersionFacts(
        manifest.files_size, measurements, partial(read_parent, store), partial(first_stored_problem, store, manifest)
    )


def measurements(index: Index, digest: Digest) -> Measurements:
    """Return the metrics recorded for a manifest, under the names that a search uses, and who recorded each."""
    from adapterhub.index import queries  # with SQLite, which a check of a folder does without

    values = queries.metrics(index, digest)
    return Measurements(values, partial(_metric_recorder, index, digest, values), partial(_evaluations, index, digest))


def _metric_recorder(index: Index, digest: Digest, values: Mapping[str, float], metric: str) -> str:
    """Return who recorded the value of a metric that `queries.metrics` has; empty for a metric of the training."""
    from adapterhub.index import queries
    from adapterhub.manifest import measurement

    name, number = queries.measured_version(index, digest, metric)
    evaluations = measurement.evaluations_of(queries.marks(index, "evaluate", name), number)
    # By the value too: evaluations with different names may have metrics of one name for a search.
    return next(
        (evaluation.recorder for evaluation in evaluations if evaluation.searchable_metrics.get(metric) == values[metric]), ""
    )


def _evaluations(index: Index, digest: Digest) -> list[Evaluation]:
    """Return the evaluations in force of the versions with a manifest, under any name."""
    from adapterhub.index import queries
    from adapterhub.manifest import measurement

    rows = queries.versions(index, digest=digest)
    return [
        evaluation
        for row in rows
        for evaluation in measurement.evaluations_of(queries.marks(index, "evaluate", row.name), row.number)
    ]


def read_parent(store: Store, digest: Digest) -> AdapterManifest | None:
    """Return the usable part of the adapter.json of a stored version, by the digest of its manifest; None if it is not here."""
    from adapterhub.index import version_extract  # with SQLite, and only for a policy that asks

    try:
        return version_extract.adapter_manifest(store, oci_manifest.parse(store.read_document(digest), digest))
    except AdapterhubError:
        return None


def first_stored_problem(store: Store, manifest: Manifest) -> str:
    """Return what `first_problem` does, of the files of a stored version."""
    from adapterhub.store.export import linked_folder  # with the store, and only for a policy that asks

    with linked_folder(store, manifest.layers) as folder:
        return first_problem(folder, [layer.path for layer in manifest.layers])


def first_problem(folder: Path, paths: Iterable[str]) -> str:
    """Return the first error or warning that a scan of these files of a folder finds, in a line; empty for none."""
    from adapterhub.checks.scan import problems  # with numpy
    from adapterhub.checks.scan.scanned_file import wrap_file

    for path in paths:
        # The files of a stored version may be links to its blobs; a folder is listed, and its links refused, before.
        with open_regular((folder / path).resolve()) as file:
            for problem in problems(wrap_file(file, path)):
                if problem.severity in ("error", "warning"):
                    return f"{problem.code}: {problem.file or problem.what}"
    return ""
