"""The report of a merge of adapters, and descriptions of the methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.options import Settings
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.merging import MergeReport, ModuleMerge
    from adapterhub.registry.registry import Version

_WORST = 10  # rows of the table on a terminal


def document(location: str, version: Version | None, report: MergeReport, parents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report as JSON; the keys are stable."""
    return {
        "output": location,
        "ref": str(version.ref) if version else None,
        "digest": version.digest if version else None,
        "method": report.method,
        "parameters": dict(report.parameters),
        "seed": report.seed,
        "error": report.error,
        "parents": list(parents),
        "modules": {
            name: {
                "ranks": list(module.ranks),
                "rank": module.rank,
                "error": module.error,
                "lost_energy": module.lost,
                "cosines": [list(row) for row in module.cosines],
                "sign_disagreement": module.signs,
                "sign_disagreement_exact": module.exact,
            }
            for name, module in report.modules.items()
        },
        "notes": list(report.notes),
    }


def lines(location: str, manifest: AdapterManifest, report: MergeReport) -> Iterator[str]:
    """Yield the lines of the report."""
    modules = report.modules
    ranks = sorted({module.rank for module in modules.values()}) or [0]
    rank = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}"
    count = output.plural(len(modules), "module")
    yield f"{location}: {report.method}, {count}, {rank}, {output.number(manifest.parameters)} parameters"
    settings = [f"{name} {value}" for name, value in report.parameters.items()]
    if report.seed is not None:
        settings.append(f"seed {report.seed}")
    if settings:
        yield f"  {', '.join(settings)}"
    lost = max((module.lost for module in modules.values()), default=0.0)
    yield f"  {_loss(lost, report.error)}"
    cosines = [row[j] for module in modules.values() for i, row in enumerate(module.cosines) for j in range(i)]
    if cosines:
        apart = max(module.signs for module in modules.values())
        yield f"  cosines between the adapters' deltas {min(cosines):.2f} to {max(cosines):.2f}, signs apart up to {apart:.0%}"
        # An exact merge has no worst modules; a pipe gets all rows of any merge.
        if lost or report.error or not output.is_terminal():
            yield from _table(report)
    for note in report.notes:
        yield output.one_line(f"  note: {note}")


_SMALL = 1e-3  # shares below are shown as powers of ten


def _loss(lost: float, error: float) -> str:
    """Return what a merge lost, in one line: the share of energy of the worst module, and its relative error."""
    if not lost and not error:
        return "exact: nothing was lost"
    shares = [f"{share:.1%}" if share >= _SMALL else f"{share:.1e}" for share in (lost, error)]
    truncated = f"truncation lost up to {shares[0]} of a module's energy" if lost else "nothing was truncated"
    return f"{truncated}; relative error up to {shares[1]}"


_COLUMNS = (
    Column("MODULE"),
    Column("RANKS", right=True, drop=4),
    Column("R", right=True, drop=3),
    Column("COSINE", right=True),
    Column("SIGNS APART", right=True, drop=1),
    Column("ENERGY LOST", right=True),
    Column("ERROR", right=True, drop=2),
)


def _table(report: MergeReport) -> Iterator[str]:
    """Yield the modules with the largest losses and disagreements; all of them in a pipe."""
    shared = {name: module for name, module in report.modules.items() if len(module.ranks) > 1}
    order = sorted(shared.items(), key=lambda item: (-round(item[1].lost, 4), -item[1].signs, item[0]))
    visible = order[:_WORST] if output.is_terminal() else order
    yield ""
    yield from output.table(_COLUMNS, [_cells(name, module) for name, module in visible], screen=output.width())
    if len(visible) < len(order):
        yield output.remainder_line(len(order) - len(visible), "with smaller losses")
    if not all(module.exact for module in shared.values()):
        yield "signs apart: over a random sample of 65,536 elements of each module"


def _cells(name: str, module: ModuleMerge) -> list[str]:
    cosines = [row[j] for i, row in enumerate(module.cosines) for j in range(i)]
    ranks = "+".join(map(str, module.ranks))
    numbers = [f"{min(cosines):.3f}", f"{module.signs:.1%}", f"{module.lost:.2%}", f"{module.error:.1e}"]
    return [name, ranks, str(module.rank), *numbers]


def explain(settings: Settings, name: str | None) -> None:
    """Describe one method, or list them all."""
    from adapterhub.merging.adapters.methods import METHODS, Method, method_named

    def describe_method(method: Method) -> dict[str, Any]:
        parameters = {
            key: {
                "type": "word" if parameter.kind is str else "number",
                "default": parameter.default,
                "limits": str(parameter.limits),
                "meaning": parameter.meaning,
            }
            for key, parameter in method.parameters.items()
        }
        text = inspect.cleandoc(method.run.__doc__ or "")
        return {"name": method.name, "summary": method.summary, "description": text, "parameters": parameters}

    if name is None:
        rows = [[method.name, method.summary] for method in METHODS.values()]
        columns = (Column("METHOD"), Column("DESCRIPTION", wrap=True))
        listed = {"methods": [describe_method(method) for method in METHODS.values()]}

        def text() -> None:
            output.write_table(columns, rows)
            output.say("See `adapterhub merge --explain METHOD`.")

        output.emit(listed, as_json=settings.as_json, text=text)
        return
    method_document = describe_method(method_named(name))
    lines = [method_document["name"], "", *method_document["description"].splitlines()]
    for key, item in method_document["parameters"].items():
        lines += ["", f"--set {key}={item['default']}", f"{item['meaning']}: a {item['type']}, {item['limits']}"]
    output.emit(method_document, as_json=settings.as_json, text=lambda: output.write_lines(lines))
