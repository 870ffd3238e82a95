"""`adapterhub diff`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, base_option, command
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote

if TYPE_CHECKING:
    from adapterhub.analysis.diff_result import Difference, ModuleChange, TensorChange
    from adapterhub.checks import Verdict

_SHOWN = 12  # the most rows of a table
_MAX_LINE = 200  # characters of a changed line of a text
_CELL, _KEY = 24, 48  # characters of a value and of its key
# Key of PEFT's config to the fact of adapter.json that follows from it.
_FACTS = {
    "r": "r", "lora_alpha": "alpha", "use_rslora": "rslora", "target_modules": "targets", "task_type": "task",
    "base_model_name_or_path": "base.repo", "revision": "base.revision",
}  # fmt: skip
_NAMES = ("ref", "name", "path")  # keys that name a parent or a data file


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
    from adapterhub.operations import diff as diff_operation

    spec = inputs.read_base(base, settings) if base else None
    difference = diff_operation.diff(
        source_at_remote(a, remote), source_at_remote(b, remote), base=spec, workspace=workspace(settings)
    )
    output.emit(_document(difference), as_json=settings.as_json, text=lambda: _text(difference))
    return 1 if exit_code and not difference.same else 0


def _document(difference: Difference) -> dict[str, Any]:
    return {
        "a": difference.names[0],
        "b": difference.names[1],
        "digests": {"a": difference.digests[0], "b": difference.digests[1]},
        "same_version": difference.same_version,
        "same": difference.same,
        "identical": difference.identical,
        "change": difference.change,
        "files": [
            {
                "path": file.path,
                "status": file.status,
                "a": file.old and asdict(file.old),
                "b": file.new and asdict(file.new),
                **({"lines": list(file.lines)} if file.lines else {}),
            }
            for file in difference.files
        ],
        "facts": [{"key": fact.key, "a": fact.old, "b": fact.new} for fact in difference.facts],
        "modules": {module.name: asdict(module) for module in difference.modules},
        "tensors": {tensor.name: asdict(tensor) for tensor in difference.tensors},
        "config": [asdict(key) for key in difference.config],
        "conditions": [asdict(key) for key in difference.conditions],
        "runtimes": {
            name: {"a": _verdict(before), "b": _verdict(after)} for name, (before, after) in difference.verdicts.items()
        },
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": verdict.verdict, "reasons": list(verdict.reasons), "convert_to": verdict.convert_to}


def _text(difference: Difference) -> None:
    screen = output.width()
    head, detail = _summary(difference)
    line = output.one_line(f"{difference.names[0]} -> {difference.names[1]}: {head}{detail}")
    colored = output.color(head, "green" if difference.same else "yellow")
    for number, piece in enumerate(output.wrap(line, screen, indent=2)):
        output.write(piece.replace(f": {head}", f": {colored}", 1) if not number else piece)
    for section in (
        _file_lines(difference),
        _fact_lines(difference),
        _config_lines(difference),
        _shape_lines(difference),
        _module_lines(difference),
        _tensor_lines(difference),
        _runtime_lines(difference),
    ):
        lines = list(section)
        if lines:
            output.write()
        for text in lines:
            output.write(text)


def _summary(difference: Difference) -> tuple[str, str]:
    """Return the verdict, and what it is based on."""
    if difference.same_version:
        return "the same version", f", {output.digest(difference.digests[0])}"
    counts = ((len(difference.files), "file"), (len(difference.facts), "fact"))
    differing = " and ".join(output.plural(count, noun) for count, noun in counts if count)
    differ = (
        f"; {differing} {'differs' if differing.startswith('1 ') and ' and ' not in differing else 'differ'}"
        if differing
        else ""
    )
    total = len(difference.modules)
    if difference.identical:
        return "the same function", f", {output.plural(total, 'module')}, every number equal{differ}" if total else differ
    if difference.same:
        most = max(
            [module.change or 0.0 for module in difference.modules] + [tensor.change or 0.0 for tensor in difference.tensors]
        )
        return "the same function", f", rounding aside (at most {most:.1e} of a module){differ}"
    changed = difference.count("changed")
    clauses = [f"{changed} of {output.plural(total, 'module')} changed"] if changed else []
    clauses += [f"{count} {status}" for status in ("added", "removed") if (count := difference.count(status))]
    clauses += [f"{count} not compared" for count in (difference.count("unknown"),) if count]
    other_count = sum(tensor.status not in ("same", "rounded") for tensor in difference.tensors)
    clauses += [f"{output.plural(other_count, 'other tensor')}"] if other_count else []
    clauses += [f"{key.key} differs" for key in difference.conditions]
    total_change = f"; the whole by {_percent(difference.change)}" if difference.change is not None else ""
    return "different", f": {', '.join(clauses)}{total_change}"


def _cut(lines: Sequence[str], rows: int) -> Iterator[str]:
    """Yield the head of a table, its first rows, and the number of the others."""
    yield from lines[: 1 + _SHOWN]
    if rows > _SHOWN:
        yield output.remainder_line(rows - _SHOWN)


def _file_lines(difference: Difference) -> Iterator[str]:
    rows = [
        [file.path, file.status, *(output.size(side.size) if side else "-" for side in (file.old, file.new))]
        for file in difference.files
    ]
    columns = (Column("FILE"), Column("CHANGE"), Column("A", right=True), Column("B", right=True))
    if rows:
        yield from _cut(output.table(columns, rows, screen=output.width()), len(rows))
    for file in difference.files:
        if file.lines:
            yield ""
            yield output.one_line(f"{file.path}:")
            for line in file.lines[:_SHOWN]:
                text = output.one_line(f"  {line[0]} {line[1:_MAX_LINE]}")
                yield output.color(text, "red" if line[0] == "-" else "green")
            if len(file.lines) > _SHOWN:
                yield f"  {output.remainder_line(len(file.lines) - _SHOWN, 'lines')}"


def _fact_lines(difference: Difference) -> Iterator[str]:
    """Yield the facts; a fact that is an object is shown by the names of its fields."""

    def display_value(value: Any) -> Any:
        return ", ".join(value) if isinstance(value, dict) else value

    yield from _values("FACT", [(fact.key, display_value(fact.old), display_value(fact.new)) for fact in difference.facts])


def _config_lines(difference: Difference) -> Iterator[str]:
    """Yield the keys of the configs that are not shown as facts."""
    facts = {fact.key for fact in difference.facts}
    conditions = {key.key for key in difference.conditions}
    keys = [*difference.conditions, *(key for key in difference.config if key.key not in conditions)]
    yield from _values("CONFIG", [(key.key, key.a, key.b) for key in keys if _FACTS.get(key.key) not in facts])


def _values(title: str, changes: Sequence[tuple[str, Any, Any]]) -> Iterator[str]:
    """Yield a table of keys with both values, as wide as the screen."""
    if not changes:
        return
    keys = [output.cut(key, _KEY) for key, _, _ in changes]
    screen = output.width()
    cell_width = _CELL if screen is None else max(_CELL // 2, (screen - max(map(len, keys[:_SHOWN])) - 4) // 2)
    rows = [
        [key, *(output.cut(text, cell_width) for text in _value_texts(a, b))]
        for key, (_, a, b) in zip(keys, changes, strict=True)
    ]
    yield from _cut(output.table((Column(title), Column("A"), Column("B")), rows[:_SHOWN]), len(rows))


def _value_texts(before: Any, after: Any) -> tuple[str, str]:
    """Return both values as texts; for two lists or maps, only what differs."""
    if isinstance(before, list) and isinstance(after, list):
        return _value_text(_without(before, after)), _value_text(_without(after, before))
    if isinstance(before, dict) and isinstance(after, dict):
        first, second = ({k: v for k, v in x.items() if (k, v) not in y.items()} for x, y in ((before, after), (after, before)))
        return _value_text(first), _value_text(second)
    return _value_text(before), _value_text(after)


def _without(items: list[Any], excluded: list[Any]) -> list[Any]:
    """Return the items that are not in `excluded`, in linear time, because the lists come from somebody else."""
    excluded_texts = set(map(_canonical_text, excluded))
    return [item for item in items if _canonical_text(item) not in excluded_texts]


def _canonical_text(item: Any) -> str:
    return json.dumps(item, sort_keys=True)


def _value_text(value: Any) -> str:
    """Return a value for people: the name and digest of an object, the items of a list."""
    if value in (None, [], {}):
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_value_text, value))
    if isinstance(value, dict):
        named = [value[key] for key in _NAMES if isinstance(value.get(key), str)]
        return f"{named[0]} {str(value.get('digest') or '')[7:19]}".rstrip() if named else json.dumps(value, ensure_ascii=False)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return output.digest(text) if text.startswith("sha256:") else text


def _shape_lines(difference: Difference) -> Iterator[str]:
    """Yield changes of ranks, scales and types, with the number of modules, unless a fact shows the same for all modules."""
    facts = {fact.key for fact in difference.facts}
    shape_pairs = [(module.a, module.b) for module in difference.modules if module.a and module.b]
    for name, text in (
        ("r", lambda side: str(side.r)),
        ("alpha", lambda side: f"{side.alpha:g}{' (rsLoRA)' if side.rslora else ''}"),
        ("scaling", lambda side: f"{side.scaling:.4g}"),
        ("dtype", lambda side: side.dtype),
        ("kind", lambda side: side.kind),
    ):
        changes = Counter((text(a), text(b)) for a, b in shape_pairs if text(a) != text(b))
        if name not in facts or len(changes) > 1:
            yield from _change_lines(name, changes)


def _change_lines(name: str, changes: Counter[tuple[str, str]]) -> Iterator[str]:
    for (before, after), count in changes.most_common(3):
        yield f"{name} {before} -> {after} in {output.plural(count, 'module')}"
    if len(changes) > 3:
        yield output.remainder_line(len(changes) - 3, f"changes of {name}")


def _module_lines(difference: Difference) -> Iterator[str]:
    order = {"unknown": 0, "removed": 1, "added": 2, "changed": 3}
    changed = [module for module in difference.modules if module.status in order]
    changed.sort(key=lambda module: (order[module.status], -(module.change or 0.0)))
    if not changed:
        return
    prefix = _common_prefix([module.name for module in changed])
    rows = [[module.name.removeprefix(prefix), *_numbers(module), module.note or _rank(module)] for module in changed]
    title = f"MODULE of {prefix.rstrip('.')}" if prefix else "MODULE"
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
    before, after = module.a, module.b
    if before and after:
        return f"r {before.r} -> {after.r}" if before.r != after.r else ""
    side = before or after
    return f"r {side.r}" if side else ""


def _percent(change: float | None) -> str:
    if change is None:
        return "-"
    return f"{change:.1%}" if change >= 0.001 else f"{change:.1e}"


def _common_prefix(names: Sequence[str]) -> str:
    """Return the common prefix of all module paths, up to a dot."""
    # The first and the last name in sorted order share the prefix that all have.
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")
    length = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    return first[: first.rfind(".", 0, length) + 1]


def _tensor_lines(difference: Difference) -> Iterator[str]:
    changed: list[TensorChange] = [tensor for tensor in difference.tensors if tensor.status not in ("same", "rounded")]
    rows = [[t.name, _percent(t.change) if t.change is not None else t.status, t.note] for t in changed]
    if rows:
        columns = (Column("OTHER TENSOR"), Column("CHANGE", right=True), Column("", wrap=True))
        yield from _cut(output.table(columns, rows[:_SHOWN], screen=output.width()), len(rows))


def _runtime_lines(difference: Difference) -> Iterator[str]:
    rows = [
        [name, before.verdict, after.verdict, output.one_line("; ".join((after.reasons or before.reasons)[:1]))]
        for name, (before, after) in difference.verdicts.items()
    ]
    if rows:
        columns = (Column("RUNTIME"), Column("A"), Column("B"), Column("WHY", wrap=True))
        yield from output.table(columns, rows, screen=output.width())
