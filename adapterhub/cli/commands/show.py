"""`adapterhub show`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import complete_ref, on_remote, open_registry, remote_option
from adapterhub.cli.options import Settings, base_option, command, headers_only_option, plot_option
from adapterhub.cli.output import Column
from adapterhub.cli.views import norms as heat
from adapterhub_converters.errors import AdapterhubError, UsageError

if TYPE_CHECKING:
    from adapterhub.analysis.norms import Heat
    from adapterhub.manifest.document import AdapterManifest


@command(
    "show",
    example="""
    adapterhub show team/sql:v2
    adapterhub show ./sql --plot sql.png""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@base_option("show norms relative to its weights (a Hugging Face folder).")
@plot_option("the norms, by layer and module")
@headers_only_option("fast, but without norms.")
@remote_option
@click.pass_obj
def show(
    settings: Settings, *, source: str, base: str | None, plot: str | None, headers_only: bool, remote: str | None
) -> None:
    """Show an adapter: its base, size and shape, how it was made, where it acts, its files and their digests.

    SRC is a ref; for a folder, file or address the command shows what a push would store, and under which digest. Where it acts
    is the norm of its delta in each module, scaling included, by layer: a picture on a terminal, numbers elsewhere.
    """
    if headers_only and (base or plot):
        raise UsageError("--headers-only", "reads no values, and --base and --plot need them", "Leave it out")
    source = on_remote(source, remote)
    ref = inputs.ref_of(source, settings)
    if ref is not None:
        with open_registry(settings) as registry:
            document = registry.show(ref)
        output.deprecated(document["ref"], document["deprecated"])
        norms = None if headers_only else _norms(source, settings, base=base, plot=plot)
    else:
        with inputs.opened(source, settings) as found:
            with inputs.as_folder(found) as folder:
                document = _path(source, folder)
            norms = None if headers_only else _norms(str(found.path), settings, base=base, plot=plot)
    if norms is not None:
        document = {**document, "norms": heat.document(norms)}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(document, norms))


def _path(where: str, folder: Path) -> dict[str, Any]:
    from adapterhub.manifest import describe, oci_manifest

    made = oci_manifest.build(folder)
    manifest, _ = describe.settle(folder)
    described: dict[str, Any] = {
        "ref": None,
        "name": None,
        "number": None,
        "tags": [],
        "protected": [],
        "deprecated": None,
        "digest": made.digest,
        "size": made.size,
        "time": None,
        "evaluations": [],
    }
    packaged = oci_manifest.parse_json(made.raw, where)
    return {**described, "path": where, "manifest": manifest.to_dict(), "oci_manifest": packaged}


def _text(document: Mapping[str, Any], norms: Heat | str | None) -> None:
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
        "digest": output.digest(document["digest"]),
        "size": output.size(document["size"]),
        "pushed": document["time"],
        "description": manifest.description,
        "license": manifest.license,
        "base": " ".join(part for part in (base.repo, base.revision) if part),
        "architecture": base.architecture,
        "fingerprint": output.digest(base.fingerprint or ""),
        "trained in": base.quantization,
        "method": _method(manifest),
        "targets": ", ".join(manifest.targets),
        "weights": f"{output.number(manifest.parameters)} parameters, {manifest.dtype}, {manifest.format}"
        if manifest.format
        else "",
        "metrics": ", ".join(f"{key} {value:g}" for key, value in _numbers(training.metrics if training else None)),
        "evaluated": "; ".join(
            f"{item['name']}: {', '.join(f'{key} {value:g}' for key, value in item['metrics'].items())}"
            for item in document["evaluations"]
        ),
        "data": ", ".join(str(item.name or item.path) for item in data),
        "parents": ", ".join(parent.ref or parent.digest for parent in manifest.parents),
    }
    return {key: str(value) for key, value in lines.items() if value}


def _method(manifest: AdapterManifest) -> str:
    if not manifest.method:
        return ""
    scale = ", rsLoRA" if manifest.rslora else ""
    return f"{manifest.method}, r {manifest.r}, alpha {manifest.alpha}{scale}"


def _numbers(metrics: object) -> Iterator[tuple[str, float]]:
    if isinstance(metrics, Mapping):
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield str(key), float(value)


def _norms(source: str, settings: Settings, *, base: str | None, plot: str | None) -> Heat | str:
    """The norms of an adapter, also drawn to `plot`; or the reason for their absence, unless an option asked for them."""
    from adapterhub.analysis import norms as picture
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import convert

    if plot:
        atomic.check_free(Path(plot), folder=False)
    spec = inputs.read_base(base, settings) if base else None
    try:
        with inputs.opened(source, settings) as found:
            norms = picture.heat(convert.read(found.path, base=spec), base=inputs.weights(base, settings) if base else None)
            where = found.where
    except AdapterhubError as error:
        if base or plot:
            raise
        return output.one_line(str(error))
    if plot:
        picture.plot(norms, Path(plot), title=where)
    return norms
