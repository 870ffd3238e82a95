"""Adapters into an adapter, as `adapterhub merge` shows it: where it goes, how far the parents disagreed, what was lost."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings
from adapterhub.cli.output import Column
from adapterhub.cli.progress import count_bar
from adapterhub_converters.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from adapterhub.manifest.document import AdapterManifest, BaseInfo
    from adapterhub.merge import Merged, MergeReport
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Version

_WORST = 10  # modules that a terminal shows


def destination(text: str, settings: Settings) -> Path | Ref:
    """The folder or the ref that OUT is; UsageError where it may be both.

    One word, or a path that begins with a dot or a slash, is a folder; what has a colon and is a ref is that. `a/b` is a ref
    where there is no folder `a`, and else could be either.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.location import is_address

    if is_address(text):
        raise UsageError(text, "is elsewhere, and a merge is made here", "Write a ref like team/both, and copy it from there")
    path = Path(text)
    try:
        ref = Ref.parse(text)
    except UsageError:
        if ":" in text and not path.parent.is_dir():
            raise
        return path
    if ref.number or ref.digest or ref.range:
        raise UsageError(text, "names a version, and a merge makes a new one", f"Write {ref.name}, or {ref.name}:TAG")
    if not ref.tag and path.parent.is_dir():
        raise UsageError(text, "may be a folder or an adapter", f"Write ./{text} for the folder, {text}:latest for the adapter")
    return ref


def into_adapter(
    settings: Settings,
    found: Sequence[inputs.Source],
    weights: Sequence[float],
    target: Path | Ref,
    *,
    method: str = "cat",
    rank_budget: int | None = None,
    plot: str | None = None,
    **how: Any,
) -> None:
    """Merge, push if the target is a ref, and say what came of it."""
    from adapterhub.registry import recipe
    from adapterhub_converters.containers import atomic

    if plot:
        from adapterhub.cli.views import merge_plot

        merge_plot.check()
        atomic.check_free(Path(plot), folder=False)
    base = _common_base(found)
    parents = [inputs.parent(source, weight) for source, weight in zip(found, weights, strict=True)]

    def make(out: Path) -> tuple[MergeReport, AdapterManifest]:
        with count_bar("merging") as progress:
            return recipe.merge(parents, out, method=method, budget=rank_budget, base=base, progress=progress, **how)

    version = None
    if isinstance(target, Path):
        report, made = make(target)
    else:
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            folder = Path(temporary) / target.name.rpartition("/")[2]
            report, made = make(folder)
            version = _pushed(folder, target, settings)
    where = str(version.ref if version else target)
    if plot:
        merge_plot.draw(report, Path(plot), title=where)
    document = _document(where, version, report, made)
    output.emit(document, as_json=settings.as_json, text=lambda: output.write("\n".join(_lines(where, made, report))))


def _pushed(folder: Path, target: Ref, settings: Settings) -> Version:
    from . import registry as commands

    found = inputs.Source(folder, folder, str(target))
    commands.checked(found, None, force=False)
    with open_registry(settings, make=True) as registry:
        return registry.push(folder, target)


def _common_base(found: Sequence[inputs.Source]) -> BaseInfo | None:
    """The base that the adapters' manifests pin; RefusedError when they pin two."""
    from adapterhub.manifest.document import AdapterManifest

    pinned: dict[str, BaseInfo] = {}
    for source in found:
        manifest = AdapterManifest.read(source.folder)
        if manifest and manifest.base.fingerprint:
            pinned.setdefault(manifest.base.fingerprint, manifest.base)
    if len(pinned) > 1:
        names = " and ".join(base.repo or fingerprint[:19] for fingerprint, base in pinned.items())
        raise RefusedError("base", f"the adapters were trained on different models: {names}", "Merge adapters of one base")
    return next(iter(pinned.values()), None)


def _document(where: str, version: Version | None, report: MergeReport, made: AdapterManifest) -> dict[str, Any]:
    return {
        "output": where,
        "ref": str(version.ref) if version else None,
        "digest": version.digest if version else None,
        "method": report.method,
        "parameters": dict(report.parameters),
        "seed": report.seed,
        "error": report.error,
        "parents": made.to_dict()["parents"],
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


def _lines(where: str, made: AdapterManifest, report: MergeReport) -> Iterator[str]:
    modules = report.modules
    ranks = sorted({module.rank for module in modules.values()}) or [0]
    rank = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}"
    count = output.plural(len(modules), "module")
    yield f"{output.printable(where)}: {report.method}, {count}, {rank}, {output.number(made.parameters)} parameters"
    settings = [f"{name} {value}" for name, value in report.parameters.items()]
    if report.seed is not None:
        settings.append(f"seed {report.seed}")
    if settings:
        yield f"  {', '.join(settings)}"
    lost = max((module.lost for module in modules.values()), default=0.0)
    yield f"  truncation left out at most {lost:.2%} of a module's energy; relative error at most {report.error:.2e}"
    cosines = [row[j] for module in modules.values() for i, row in enumerate(module.cosines) for j in range(i)]
    if cosines:
        yield f"  cosines between the adapters' deltas {min(cosines):.2f} to {max(cosines):.2f}"
        yield from _table(report)
    for note in report.notes:
        yield output.one_line(f"  note: {note}")


_COLUMNS = (
    Column("MODULE"),
    Column("RANKS", right=True, drop=3),
    Column("R", right=True, drop=2),
    Column("COSINE", right=True),
    Column("SIGNS APART", right=True),
    Column("ENERGY LOST", right=True),
    Column("ERROR", right=True, drop=1),
)


def _table(report: MergeReport) -> Iterator[str]:
    """The modules where most is lost, and of those the ones that most adapters pull apart; all of them in a pipe."""
    shared = {name: module for name, module in report.modules.items() if len(module.ranks) > 1}
    order = sorted(shared.items(), key=lambda item: (-round(item[1].lost, 4), -item[1].signs, item[0]))
    shown = order[:_WORST] if output.is_terminal() else order
    yield ""
    yield from output.table(_COLUMNS, [_cells(name, module) for name, module in shown], screen=output.width())
    if len(shown) < len(order):
        yield f"and {len(order) - len(shown)} more, where less is lost; --json has them all"
    if not all(module.exact for module in shared.values()):
        yield "signs apart: over 65,536 elements of each module, drawn by chance"


def _cells(name: str, module: Merged) -> list[str]:
    cosines = [row[j] for i, row in enumerate(module.cosines) for j in range(i)]
    ranks = "+".join(map(str, module.ranks))
    numbers = [f"{min(cosines):.3f}", f"{module.signs:.1%}", f"{module.lost:.2%}", f"{module.error:.1e}"]
    return [name, ranks, str(module.rank), *numbers]


def explain(settings: Settings, name: str | None) -> None:
    """What one method does, or which there are."""
    from adapterhub.merge.adapters.methods import METHODS, Method, method_named

    def document(method: Method) -> dict[str, Any]:
        parameters = {
            key: {"default": parameter.default, "limits": str(parameter.limits)} for key, parameter in method.parameters.items()
        }
        text = inspect.cleandoc(method.run.__doc__ or "")
        return {"name": method.name, "summary": method.summary, "description": text, "parameters": parameters}

    if name is None:
        rows = [[method.name, method.summary] for method in METHODS.values()]
        columns = (Column("METHOD"), Column("WHAT IT DOES", wrap=True))
        listed = {"methods": [document(method) for method in METHODS.values()]}

        def text() -> None:
            output.write("\n".join(output.table(columns, rows, screen=output.width())))
            output.say("`adapterhub merge --explain METHOD` says more.")

        output.emit(listed, as_json=settings.as_json, text=text)
        return
    found = document(method_named(name))
    lines = [found["name"], "", *found["description"].splitlines()]
    lines += [f"--{key}: {item['limits']}, by default {item['default']}" for key, item in found["parameters"].items()]
    output.emit(found, as_json=settings.as_json, text=lambda: output.write("\n".join(lines)))
