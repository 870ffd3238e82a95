"""`adapterhub show`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import catalogs, inputs, output, progress
from adapterhub.cli.options import Settings, base_option, command, headers_only_option, plot_option
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import registry_folder
from adapterhub.cli.remote_choice import remote_option, source_at_remote
from adapterhub.cli.views import norm_picture as heat
from adapterhub.operations import source_names
from adapterhub.store.store import counter
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import AdapterhubError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

_SECONDS = 2.0  # the longest work for norms that were not asked for
_COUNT = 100_000  # a metric of at least this size is a count, and shown as one
_HASHED = 2 * 10**9  # bytes of files that take about as long to read and hash

if TYPE_CHECKING:
    from adapterhub.analysis.norms import NormHeatMap
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.folder_contents import Inspection
    from adapterhub.ref import Ref
    from adapterhub.remotes.catalog import Catalog


@command(
    "show",
    example="""
    adapterhub show team/sql:v2
    adapterhub show ./sql --plot sql.png""",
)
@click.argument("source", metavar="SRC")
@base_option("show norms relative to its weights (a Hugging Face folder).")
@plot_option("the norms, by layer and module, and the pass rates of tests, by version")
@headers_only_option("fast, but without norms.")
@click.option("--full", is_flag=True, help="Compute norms and digests even if that takes over two seconds.")
@remote_option
@click.pass_obj
def show(
    settings: Settings, *, source: str, base: str | None, plot: str | None, headers_only: bool, full: bool, remote: str | None
) -> None:
    """Show an adapter: its base, size and shape, how it was made, where it acts, its files and their digests.

    SRC is a ref, also on a hub of adapterhub; for a folder, file or other address the command shows what a push would store,
    and under which digest. Where it acts is the norm of its delta in each module, scaling included, by layer: a picture on a
    terminal, numbers elsewhere. What takes over two seconds, as its shapes and sizes tell, is left out unless --full, --base
    or --plot asks for it.
    """
    if headers_only and (base or plot or full):
        option = next(name for name, value in (("--base", base), ("--plot", plot), ("--full", full)) if value)
        raise UsageError("--headers-only", f"reads no values, and {option} needs them", "Leave one of them out")
    source = source_at_remote(source, remote)
    demand = _NormDemand(base, plot, full)
    norms: NormHeatMap | str | None = None
    if (opened := _catalog_with(source, settings)) is not None:
        with opened[0] as catalog:
            with source_names.no_path_either(source):
                document: Mapping[str, Any] = catalog.show(opened[1])
            if plot:
                demand = replace(demand, draw_below=_pass_rate_drawing(catalog, opened[1].name, document["number"]))
        output.warn_deprecated(document["ref"], document["deprecated"])
        if document["withdrawn"] is not None:  # its files are opened no more
            output.say(output.one_line(f"warning: {document['ref']} was withdrawn: {document['withdrawn']}"))
            headers_only = True
        if not inputs.is_elsewhere(source) and (feedback := _feedback(document, settings)):
            document = {**document, "feedback": feedback}
        if inputs.is_elsewhere(source) and not headers_only:
            with inputs.open_source(source, settings, notes=False, for_report=True) as adapter_source:
                norms = _norms(str(adapter_source.path), settings, demand)
        elif not headers_only:
            norms = _norms(source, settings, demand)
    else:
        with inputs.open_source(source, settings, for_report=True) as adapter_source:
            with inputs.as_folder(adapter_source) as folder:
                document, inspected = _path_document(source, folder, full=full)
            norms = None if headers_only else _norms(str(adapter_source.path), settings, demand, inspected)
    if norms is not None:
        document = {**document, "norms": heat.document(norms)}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(document, norms))


def _feedback(document: Mapping[str, Any], settings: Settings) -> dict[str, int]:
    """Return how many answers of a version people found good and bad, as `serve` recorded them; empty for none."""
    from adapterhub.serve.usage import answer_log, record_place

    path = registry_folder(settings) / record_place.FILE
    good, bad = answer_log.feedback_counts(path, f"{document['name']}@{document['digest']}")
    return {"good": good, "bad": bad} if good or bad else {}


def _pass_rate_drawing(catalog: Catalog, name: str, number: int) -> Callable[[Any], None] | None:
    """Return what draws the pass rates of all versions of a name; None if it has none."""
    from adapterhub.cli.views import pass_rate_plot
    from adapterhub.ref import Ref

    lines = pass_rate_plot.pass_rates(catalog.log(Ref(name)))
    return partial(pass_rate_plot.draw, lines=lines, number=number) if lines else None


def _catalog_with(source: str, settings: Settings) -> tuple[Catalog, Ref] | None:
    """Open the catalog that has a version, and return it with the ref; None for a path and for other addresses."""
    if inputs.is_elsewhere(source):
        return catalogs.open_hub(source)
    ref = inputs.ref_of(source, settings)
    return None if ref is None else (catalogs.open_local(settings), ref)


@dataclass(frozen=True)
class _NormDemand:
    """The options for which norms are computed however long it takes.

    Attributes:
        draw_below: Draws below the norms in the picture of `plot`.
    """

    base: str | None
    plot: str | None
    full: bool
    draw_below: Callable[[Any], None] | None = None

    def __bool__(self) -> bool:
        return bool(self.base or self.plot or self.full)


def _path_document(location: str, folder: Path, *, full: bool) -> tuple[dict[str, Any], Inspection]:
    """Return the document of a folder, without digests if its files are large, unless `full`; and what was read for it."""
    from adapterhub.manifest import derive, folder_contents, oci_manifest, package_files

    sizes = {path: (folder / path).stat().st_size for path in package_files.survey(folder)[0]}
    hashes = full or sum(sizes.values()) <= _HASHED
    with progress.bytes_bar("reading") if full else nullcontext() as show:
        contents = folder_contents.read_folder(folder, hashes=hashes, on_bytes=counter(show, sum(sizes.values())))
    draft = derive.draft_contents(contents)
    document: dict[str, Any] = dict.fromkeys(
        ("ref", "name", "number", "deprecated", "withdrawn", "digest", "time", "oci_manifest")
    )
    document |= {"path": location, "size": sum(sizes.values()), "tags": [], "protected": [], "evaluations": []}
    if not hashes:
        entries = [{"path": path, "size": size} for path, size in sorted(sizes.items()) if path != ADAPTER_JSON]
        return {**document, "manifest": {**draft.manifest().to_dict(), "files": entries}}, draft.inspected
    manifest, raw = draft.finalize(contents.files)
    oci_document = oci_manifest.complete(contents.files, manifest, raw)
    packaged = json_file.parse_object(oci_document.raw, location)
    document |= {
        "digest": oci_document.digest,
        "size": oci_document.size,
        "manifest": manifest.to_dict(),
        "oci_manifest": packaged,
    }
    return document, draft.inspected


def _text(document: Mapping[str, Any], norms: NormHeatMap | str | None) -> None:
    from adapterhub.manifest.document import AdapterManifest

    manifest = AdapterManifest.salvage(document["manifest"])
    for line in [*output.pairs(_pairs(document, manifest), screen=output.width()), *heat.lines(norms)]:
        output.write(line)
    files = [[entry.path, output.size(entry.size), output.digest(entry.digest)] for entry in manifest.files]
    if files:
        output.write()
        columns = (Column("FILE"), Column("SIZE", right=True), Column("DIGEST", drop=1))
        output.write_table(columns, files)


def _pairs(document: Mapping[str, Any], manifest: AdapterManifest) -> dict[str, str]:
    base, training = manifest.base, manifest.training
    data = (training.data if training else None) or ()
    lines = {
        "adapter": document["ref"] or document.get("path"),
        "tags": ", ".join(f"{tag} (protected)" if tag in document["protected"] else tag for tag in document["tags"]),
        "digest": output.digest(document["digest"])
        if document["digest"]
        else "left out, the files are large; --full computes it",
        "size": output.size(document["size"]),
        "pushed": document["time"],
        "description": manifest.description,
        "license": manifest.license,
        "base": " ".join(part for part in (base.repo, base.revision) if part),
        "architecture": base.architecture,
        "family": base.model_type if not base.architecture else "",
        "fingerprint": output.digest(base.fingerprint or ""),
        "trained in": base.quantization,
        "method": _method(manifest),
        "not understood": manifest.reason if manifest.understood is False else "",
        "targets": ", ".join(manifest.targets),
        "weights": f"{output.number(manifest.parameters)} parameters, {manifest.dtype}, {manifest.format}"
        if manifest.format
        else "",
        "metrics": _metrics(training.metrics if training else None),
        "evaluated": "; ".join(f"{item['name']}: {_metrics(item['metrics'])}" for item in document["evaluations"]),
        "feedback": "{good:,} good, {bad:,} bad".format(**document["feedback"]) if document.get("feedback") else "",
        "data": ", ".join(f"{item.name or item.path}{f' ({item.split})' if item.split else ''}" for item in data),
        "parents": ", ".join(parent.ref or parent.digest for parent in manifest.parents),
    }
    return {key: str(value) for key, value in lines.items() if value}


def _method(manifest: AdapterManifest) -> str:
    if not manifest.method:
        return ""
    properties = [manifest.method]
    properties += [f"r {manifest.rank}"] * bool(manifest.rank) + [f"alpha {manifest.alpha}"] * (manifest.alpha is not None)
    properties += [
        f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in (manifest.numbers or {}).items()
    ]
    return ", ".join([*properties, *["rsLoRA"] * manifest.rslora])


def _metrics(metrics: object) -> str:
    """Return the numbers among metrics; large ones are counts, such as of parameters or operations."""
    numbers = metrics.items() if isinstance(metrics, Mapping) else ()
    plain_numbers = ((key, value) for key, value in numbers if is_number(value))
    return ", ".join(
        f"{key} {output.number(round(value)) if abs(value) >= _COUNT else f'{value:g}'}" for key, value in plain_numbers
    )


def _norms(source: str, settings: Settings, demand: _NormDemand, inspected: Inspection | None = None) -> NormHeatMap | str:
    """Return the norms of an adapter, and draw them to a PNG if asked for; or the reason why there are none.

    What was `inspected` already is not read again.

    Raises:
        AdapterhubError: There are none, and an option asked for them.
    """
    from adapterhub import picture
    from adapterhub.analysis import norms as analysis
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import convert

    if demand.plot:
        picture.check()
        atomic.check_free(Path(demand.plot), folder=False)
    spec = inputs.read_base(demand.base, settings) if demand.base else None
    weights = inputs.weights(demand.base, settings) if demand.base else None
    try:
        if not demand and (seconds := _seconds(source, settings, inspected)) > _SECONDS:
            return f"left out, about {seconds:.0f} seconds of work; --full computes them"
        bar = progress.count_bar("computing norms") if demand else nullcontext()
        with (
            inputs.open_source(source, settings, notes=False, for_report=True) as adapter_source,
            bar as show,
        ):  # the notes were shown with the document
            complete = inspected.complete_adapter if inspected and spec is None else None
            adapter = complete or convert.read(adapter_source.path, base=spec, mapped=True)
            norms = analysis.build_heat_map(adapter, base=weights, progress=show)
            label = adapter_source.location
    except AdapterhubError as error:
        if demand.base or demand.plot:
            raise
        return output.one_line(f"not available: {error}")
    if demand.plot:
        analysis.plot(norms, Path(demand.plot), title=label, draw_below=demand.draw_below)
    return norms


def _seconds(source: str, settings: Settings, inspected: Inspection | None) -> float:
    """Estimate the time that the norms take, from the headers of an adapter."""
    from adapterhub.analysis import norms as picture
    from adapterhub_converters.adapter import Adapter
    from adapterhub_converters.formats import convert, peft

    if inspected is not None and isinstance(inspected.adapter, Adapter):
        return picture.estimated_seconds(inspected.adapter)

    with inputs.in_place(source, settings) as path:
        return picture.estimated_seconds(peft.read_shapes(path) if convert.sniff(path) == "peft" else convert.read(path))
