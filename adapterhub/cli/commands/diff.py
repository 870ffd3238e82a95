"""`adapterhub diff`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import on_remote, remote_option, workspace
from adapterhub.cli.options import Settings, base_option, command
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.analysis.diff import Difference, ModuleChange, TensorChange
    from adapterhub.checks import Verdict

_SHOWN = 12  # rows of a table
_CELL, _KEY = 24, 48  # characters of a value and of its key
# Key of PEFT's config to the fact of adapter.json that follows from it.
_FACTS = {
    "r": "r", "lora_alpha": "alpha", "use_rslora": "rslora", "target_modules": "targets", "task_type": "task",
    "base_model_name_or_path": "base.repo", "revision": "base.revision",
}  # fmt: skip
_NAMES = ("ref", "name", "path")  # of a parent or a file of data


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
    """Show what changed between two adapters, or two versions of one: files, facts, and what they compute.

    A and B are folders, files, refs or addresses, in any format; with --remote, refs there. Facts come from adapter.json:
    license, base, rank, training, parents, metrics. Modules are compared by the matrices they add to the base, whatever their
    ranks, scales and factors: a conversion is no difference. Differences below float32's rounding count as equal. Exits 0, or
    with --exit-code 1 when the two compute different functions.
    """
    from adapterhub import comparing

    spec = inputs.read_base(base, settings) if base else None
    found = comparing.diff(on_remote(a, remote), on_remote(b, remote), workspace(settings), base=spec)
    output.emit(_document(found), as_json=settings.as_json, text=lambda: _text(found))
    return 1 if exit_code and not found.same else 0


def _document(found: Difference) -> dict[str, Any]:
    return {
        "a": found.names[0],
        "b": found.names[1],
        "digests": {"a": found.digests[0], "b": found.digests[1]},
        "same_version": found.same_version,
        "same": found.same,
        "identical": found.identical,
        "change": found.change,
        "files": [
            {"path": one.path, "status": one.status, "a": one.old and asdict(one.old), "b": one.new and asdict(one.new)}
            for one in found.files
        ],
        "facts": [{"key": fact.key, "a": fact.old, "b": fact.new} for fact in found.facts],
        "modules": {module.name: asdict(module) for module in found.modules},
        "tensors": {tensor.name: asdict(tensor) for tensor in found.tensors},
        "config": [asdict(key) for key in found.config],
        "conditions": [asdict(key) for key in found.conditions],
        "runtimes": {name: {"a": _verdict(one), "b": _verdict(two)} for name, (one, two) in found.verdicts.items()},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": verdict.verdict, "reasons": list(verdict.reasons), "convert_to": verdict.convert_to}


def _text(found: Difference) -> None:
    screen = output.width()
    head, rest = _summary(found)
    line = output.one_line(f"{found.names[0]} -> {found.names[1]}: {head}{rest}")
    colored = output.color(head, "green" if found.same else "yellow")
    for number, piece in enumerate(output.wrapped(line, screen, indent=2)):
        output.write(piece.replace(f": {head}", f": {colored}", 1) if not number else piece)
    for section in (
        _file_lines(found),
        _fact_lines(found),
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
    """The verdict, and what it is based on."""
    if found.same_version:
        return "the same version", f", {output.digest(found.digests[0])}"
    counts = ((len(found.files), "file"), (len(found.facts), "fact"))
    more = " and ".join(output.plural(count, noun) for count, noun in counts if count)
    differ = f"; {more} {'differs' if more.startswith('1 ') and ' and ' not in more else 'differ'}" if more else ""
    total = len(found.modules)
    if found.identical:
        return "the same function", f", {output.plural(total, 'module')}, every number equal{differ}" if total else differ
    if found.same:
        most = max([module.change or 0.0 for module in found.modules] + [tensor.change or 0.0 for tensor in found.tensors])
        return "the same function", f", rounding aside (at most {most:.1e} of a module){differ}"
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


def _file_lines(found: Difference) -> Iterator[str]:
    rows = [
        [one.path, one.status, *(output.size(side.size) if side else "-" for side in (one.old, one.new))] for one in found.files
    ]
    columns = (Column("FILE"), Column("CHANGE"), Column("A", right=True), Column("B", right=True))
    if rows:
        yield from _cut(output.table(columns, rows, screen=output.width()), len(rows))


def _fact_lines(found: Difference) -> Iterator[str]:
    """The facts; of a record that only one of the two has, its fields."""

    def shown(value: Any) -> Any:
        return ", ".join(value) if isinstance(value, dict) else value

    yield from _values("FACT", [(fact.key, shown(fact.old), shown(fact.new)) for fact in found.facts])


def _config_lines(found: Difference) -> Iterator[str]:
    """The keys of the configs that are not shown as facts."""
    facts = {fact.key for fact in found.facts}
    conditions = {key.key for key in found.conditions}
    keys = [*found.conditions, *(key for key in found.config if key.key not in conditions)]
    yield from _values("CONFIG", [(key.key, key.a, key.b) for key in keys if _FACTS.get(key.key) not in facts])


def _values(title: str, changes: Sequence[tuple[str, Any, Any]]) -> Iterator[str]:
    """A table of keys with both their values, as wide as the screen."""
    if not changes:
        return
    keys = [output.cut(key, _KEY) for key, _, _ in changes]
    screen = output.width()
    wide = _CELL if screen is None else max(_CELL // 2, (screen - max(map(len, keys[:_SHOWN])) - 4) // 2)
    rows = [[key, *(output.cut(text, wide) for text in _both(a, b))] for key, (_, a, b) in zip(keys, changes, strict=True)]
    yield from _cut(output.table((Column(title), Column("A"), Column("B")), rows[:_SHOWN]), len(rows))


def _both(one: Any, two: Any) -> tuple[str, str]:
    """Both values as texts; of two lists or maps only the difference."""
    if isinstance(one, list) and isinstance(two, list):
        return _word(_without(one, two)), _word(_without(two, one))
    if isinstance(one, dict) and isinstance(two, dict):
        first, second = ({k: v for k, v in x.items() if (k, v) not in y.items()} for x, y in ((one, two), (two, one)))
        return _word(first), _word(second)
    return _word(one), _word(two)


def _without(items: list[Any], others: list[Any]) -> list[Any]:
    """The items that are not among the others, in linear time: the lists are a stranger's."""
    there = set(map(_plain, others))
    return [item for item in items if _plain(item) not in there]


def _plain(item: Any) -> str:
    return json.dumps(item, sort_keys=True)


def _word(value: Any) -> str:
    """A value for people: of an object its name and digest, of a list its items."""
    if value in (None, [], {}):
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    if isinstance(value, dict):
        named = [value[key] for key in _NAMES if isinstance(value.get(key), str)]
        return f"{named[0]} {str(value.get('digest') or '')[7:19]}".rstrip() if named else json.dumps(value, ensure_ascii=False)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return output.digest(text) if text.startswith("sha256:") else text


def _shape_lines(found: Difference) -> Iterator[str]:
    """Changes of ranks, scales and types, with the number of modules, unless a fact has the same of all modules."""
    facts = {fact.key for fact in found.facts}
    both = [(module.a, module.b) for module in found.modules if module.a and module.b]
    for name, text in (
        ("r", lambda side: str(side.r)),
        ("alpha", lambda side: f"{side.alpha:g}{' (rsLoRA)' if side.rslora else ''}"),
        ("scaling", lambda side: f"{side.scaling:.4g}"),
        ("dtype", lambda side: side.dtype),
        ("kind", lambda side: side.kind),
    ):
        changes = Counter((text(a), text(b)) for a, b in both if text(a) != text(b))
        if name not in facts or len(changes) > 1:
            yield from _became(name, changes)


def _became(name: str, changes: Counter[tuple[str, str]]) -> Iterator[str]:
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
