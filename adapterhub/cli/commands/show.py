"""`adapterhub show`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import (
    complete_ref,
    open_registry,
)
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.views import norms as heat
from adapterhub_converters.errors import AdapterhubError, UsageError

if TYPE_CHECKING:
    from adapterhub.analysis.norms import Heat


@command(
    "show",
    short="Say what an adapter is.",
    example="""
    adapterhub show team/sql:v2
    adapterhub show ./sql --plot sql.png""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.option("--base", metavar="BASE", help="Show norms over those of this model's weights (a Hugging Face folder).")
@click.option("--plot", metavar="PNG", help="Draw the norms as a picture as well; it must not be there yet.")
@click.option("--headers-only", is_flag=True, help="Read no values: no norms, takes no time.")
@click.pass_obj
def show(settings: Settings, *, source: str, base: str | None, plot: str | None, headers_only: bool) -> None:
    """Say what an adapter is: its base, size and shape, how it was made, where it acts, its files and their digests.

    SRC is a ref, or a folder, file or address: then it says what a push would store, and under which digest. Where it acts
    is the norm of what it adds to each module, its scale included, layer by layer: a picture on a terminal, numbers elsewhere.
    """
    if headers_only and (base or plot):
        raise UsageError("--headers-only", "reads no values to draw", "Leave it out, or --base and --plot")
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
    import json

    from adapterhub.manifest import describe, oci_manifest

    made = oci_manifest.build(folder)
    document, _ = describe.settle(folder)
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
    return {**described, "path": where, "facts": document, "manifest": json.loads(made.raw)}


def _text(document: Mapping[str, Any], norms: Heat | str | None) -> None:
    for line in [*output.pairs(_pairs(document), screen=output.width()), *heat.lines(norms)]:
        output.write(line)
    files = [
        [entry["path"], output.size(entry["size"]), output.digest(entry["digest"])]
        for entry in document["facts"].get("files", [])
    ]
    if files:
        output.write()
        columns = (Column("FILE"), Column("SIZE", right=True), Column("DIGEST", drop=1))
        for line in output.table(columns, files, screen=output.width()):
            output.write(line)


def _pairs(document: Mapping[str, Any]) -> dict[str, str]:
    facts = document["facts"]
    base = facts.get("base") or {}
    training = facts.get("training") or {}
    lines = {
        "adapter": document["ref"] or document.get("path"),
        "tags": ", ".join(f"{tag} (protected)" if tag in document["protected"] else tag for tag in document["tags"]),
        "digest": output.digest(document["digest"]),
        "size": output.size(document["size"]),
        "pushed": document["time"],
        "description": facts.get("description"),
        "license": facts.get("license"),
        "base": " ".join(str(part) for part in (base.get("repo"), base.get("revision")) if part),
        "architecture": base.get("architecture"),
        "fingerprint": output.digest(base.get("fingerprint") or ""),
        "trained in": base.get("quantization"),
        "method": _method(facts),
        "targets": ", ".join(facts.get("targets") or []),
        "weights": f"{output.number(facts['parameters'])} parameters, {facts['dtype']}, {facts['format']}"
        if "format" in facts
        else "",
        "metrics": ", ".join(f"{key} {value:g}" for key, value in _numbers(training.get("metrics"))),
        "evaluated": "; ".join(
            f"{item['name']}: {', '.join(f'{key} {value:g}' for key, value in item['metrics'].items())}"
            for item in document["evaluations"]
        ),
        "data": ", ".join(str(item.get("name") or item.get("path")) for item in training.get("data") or []),
        "parents": ", ".join(f"{parent.get('ref') or parent['digest']}" for parent in facts.get("parents") or []),
    }
    return {key: str(value) for key, value in lines.items() if value}


def _method(facts: Mapping[str, Any]) -> str:
    if not facts.get("method"):
        return ""
    scale = ", rsLoRA" if facts.get("rslora") else ""
    return f"{facts['method']}, r {facts.get('r')}, alpha {facts.get('alpha')}{scale}"


def _numbers(metrics: object) -> Iterator[tuple[str, float]]:
    if isinstance(metrics, Mapping):
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield str(key), float(value)


def _norms(source: str, settings: Settings, *, base: str | None, plot: str | None) -> Heat | str:
    """The norms of an adapter, drawn to `plot` as well; or why there are none, where nothing asked for them by name."""
    from adapterhub.analysis import norms as picture
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import convert

    if plot:
        atomic.check_free(Path(plot), folder=False)
    spec = inputs.read_base(base, settings) if base else None
    try:
        with inputs.opened(source, settings) as found:
            norms = picture.heat(convert.read(found.path, base=spec), base=inputs.existing(base) if base else None)
            where = found.where
    except AdapterhubError as error:
        if base or plot:
            raise
        return output.one_line(str(error))
    if plot:
        picture.plot(norms, Path(plot), title=where)
    return norms
