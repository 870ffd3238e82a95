"""`adapterhub diff`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import on_remote, remote_option
from adapterhub.cli.options import Settings, base_option, command
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.analysis.diff import Difference, KeyChange, ModuleChange, Side, TensorChange
    from adapterhub.checks import Verdict

_SHOWN = 12  # rows of a table
_CELL = 24  # characters of a config value


@command(
    "diff",
    example="""
    adapterhub diff team/sql:v1 team/sql:v2
    adapterhub diff ./sql ./sql.gguf --base ./Qwen3-0.6B --exit-code""",
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@base_option("the one of both: a Hugging Face folder or a .gguf file.")
@click.option("--exit-code", is_flag=True, help="Exit 1 if they compute different functions.")
@remote_option
@click.pass_obj
def diff(settings: Settings, *, a: str, b: str, base: str | None, exit_code: bool, remote: str | None) -> int:
    """Compare two adapters, or two versions of one, as functions.

    A and B are folders, files, refs or addresses, in any format; with --remote, refs there. Modules are compared by the
    matrices they add to the base, whatever their ranks, scales and factors: a conversion is no difference. Differences below
    float32's rounding count as equal. Exits 0, or with --exit-code 1 when the two compute different functions.
    """
    from adapterhub.analysis import diff as library

    spec = inputs.read_base(base, settings) if base else None
    a, b = on_remote(a, remote), on_remote(b, remote)
    with inputs.opened(a, settings) as first, inputs.opened(b, settings) as second:
        found = library.diff(first.path, second.path, base=spec)
        names = first.where, second.where
    output.emit(_document(names, found), as_json=settings.as_json, text=lambda: _text(names, found))
    return 1 if exit_code and not found.same else 0


def _document(names: tuple[str, str], found: Difference) -> dict[str, Any]:
    return {
        "a": names[0],
        "b": names[1],
        "same": found.same,
        "identical": found.identical,
        "change": found.change,
        "modules": {module.name: asdict(module) for module in found.modules},
        "tensors": {tensor.name: asdict(tensor) for tensor in found.tensors},
        "config": [asdict(key) for key in found.config],
        "conditions": [asdict(key) for key in found.conditions],
        "runtimes": {name: {"a": _verdict(one), "b": _verdict(two)} for name, (one, two) in found.verdicts.items()},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": verdict.verdict, "reasons": list(verdict.reasons), "convert_to": verdict.convert_to}


def _text(names: tuple[str, str], found: Difference) -> None:
    screen = output.width()
    head, rest = _summary(found)
    line = output.one_line(f"{names[0]} -> {names[1]}: {head}{rest}")
    colored = output.color(head, "green" if found.same else "yellow")
    for number, piece in enumerate(output.wrapped(line, screen, indent=2)):
        output.write(piece.replace(f": {head}", f": {colored}", 1) if not number else piece)
    for section in (
        _config_lines(found),
        _shape_lines(found),
        _module_lines(found),
        _tensor_lines(found),
        _runtime_lines(found),
    ):
        lines = list(section)
        if lines:
            output.write()
        for text in lines:
            output.write(text)


def _summary(found: Difference) -> tuple[str, str]:
    total = len(found.modules)
    if found.identical:
        return "the same", f", {output.plural(total, 'module')}, every number equal"
    if found.same:
        most = max([module.change or 0.0 for module in found.modules] + [tensor.change or 0.0 for tensor in found.tensors])
        return "the same function", f", rounding aside (at most {most:.1e} of a module)"
    changed = found.count("changed")
    parts = [f"{changed} of {output.plural(total, 'module')} changed"] if changed else []
    parts += [f"{count} {status}" for status in ("added", "removed") if (count := found.count(status))]
    parts += [f"{count} not compared" for count in (found.count("unknown"),) if count]
    others = sum(tensor.status not in ("same", "rounded") for tensor in found.tensors)
    parts += [f"{output.plural(others, 'other tensor')}"] if others else []
    parts += [f"{key.key} differs" for key in found.conditions]
    whole = f"; the whole by {_percent(found.change)}" if found.change is not None else ""
    return "different", f": {', '.join(parts)}{whole}"


def _cut(lines: Sequence[str], rows: int) -> Iterator[str]:
    """The head of a table, the first rows, and the number of the rest."""
    yield from lines[: 1 + _SHOWN]
    if rows > _SHOWN:
        yield output.more(rows - _SHOWN)


def _config_lines(found: Difference) -> Iterator[str]:
    conditions = {key.key for key in found.conditions}
    keys = [*found.conditions, *(key for key in found.config if key.key not in conditions)]
    rows = [[key.key, *_values(key)] for key in keys]
    columns = (Column("CONFIG"), Column("A"), Column("B"))
    if rows:
        yield from _cut(output.table(columns, rows, screen=output.width()), len(rows))


def _values(key: KeyChange) -> list[str]:
    """Both values, shortened; of two lists or maps only the difference."""
    one, two = key.a, key.b
    if isinstance(one, list) and isinstance(two, list):
        return [_short(", ".join(_word(item) for item in x if item not in y) or None) for x, y in ((one, two), (two, one))]
    if isinstance(one, dict) and isinstance(two, dict):
        return [_short({k: v for k, v in x.items() if (k, v) not in y.items()} or None) for x, y in ((one, two), (two, one))]
    return [_short(one), _short(two)]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = "-" if value is None else _word(value)
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"


def _shape_lines(found: Difference) -> Iterator[str]:
    """Changes of ranks, scales and types, with the number of modules."""
    both = [(module.a, module.b) for module in found.modules if module.a and module.b]
    for name, text in (
        ("r", lambda side: str(side.r)),
        ("alpha", lambda side: f"{side.alpha:g}{' (rsLoRA)' if side.rslora else ''}"),
        ("scaling", lambda side: f"{side.scaling:.4g}"),
        ("dtype", lambda side: side.dtype),
        ("kind", lambda side: side.kind),
    ):
        yield from _became(name, both, text)


def _became(name: str, both: Sequence[tuple[Side, Side]], text: Callable[[Side], str]) -> Iterator[str]:
    changes = Counter((text(a), text(b)) for a, b in both if text(a) != text(b))
    for (one, two), count in changes.most_common(3):
        yield f"{name} {one} -> {two} in {output.plural(count, 'module')}"
    if len(changes) > 3:
        yield output.more(len(changes) - 3, f"changes of {name}")


def _module_lines(found: Difference) -> Iterator[str]:
    order = {"unknown": 0, "removed": 1, "added": 2, "changed": 3}
    changed = [module for module in found.modules if module.status in order]
    changed.sort(key=lambda module: (order[module.status], -(module.change or 0.0)))
    if not changed:
        return
    shared = _shared([module.name for module in changed])
    rows = [[module.name.removeprefix(shared), *_numbers(module), module.note or _rank(module)] for module in changed]
    title = f"MODULE of {shared.rstrip('.')}" if shared else "MODULE"
    columns = (
        Column(title), Column("CHANGE", right=True), Column("SIZE", right=True, drop=1), Column("COSINE", right=True, drop=2),
        Column("", wrap=True),
    )  # fmt: skip
    yield from _cut(output.table(columns, rows[:_SHOWN], screen=output.width()), len(rows))
    if any(module.status == "changed" for module in changed):
        yield output.color("change: |B-A| / |A|; size: |B| / |A|; the largest first", "dim")


def _numbers(module: ModuleChange) -> list[str]:
    if module.status in ("added", "removed"):
        return [module.status, "-", "-"]
    ratio = "-" if module.ratio is None else f"{module.ratio:.3f}"
    cosine = "-" if module.cosine is None else f"{module.cosine:.4f}"
    return [_percent(module.change) if module.change is not None else module.status, ratio, cosine]


def _rank(module: ModuleChange) -> str:
    one, two = module.a, module.b
    if one and two:
        return f"r {one.r} -> {two.r}" if one.r != two.r else ""
    side = one or two
    return f"r {side.r}" if side else ""


def _percent(change: float | None) -> str:
    if change is None:
        return "-"
    return f"{change:.1%}" if change >= 0.001 else f"{change:.1e}"


def _shared(names: Sequence[str]) -> str:
    """The common prefix of all module paths, up to a dot."""
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")
    length = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    return first[: first.rfind(".", 0, length) + 1]


def _tensor_lines(found: Difference) -> Iterator[str]:
    changed: list[TensorChange] = [tensor for tensor in found.tensors if tensor.status not in ("same", "rounded")]
    rows = [[t.name, _percent(t.change) if t.change is not None else t.status, t.note] for t in changed]
    if rows:
        columns = (Column("OTHER TENSOR"), Column("CHANGE", right=True), Column("", wrap=True))
        yield from _cut(output.table(columns, rows[:_SHOWN], screen=output.width()), len(rows))


def _runtime_lines(found: Difference) -> Iterator[str]:
    rows = [
        [name, one.verdict, two.verdict, output.one_line("; ".join((two.reasons or one.reasons)[:1]))]
        for name, (one, two) in found.verdicts.items()
    ]
    if rows:
        columns = (Column("RUNTIME"), Column("A"), Column("B"), Column("WHY", wrap=True))
        yield from output.table(columns, rows, screen=output.width())
