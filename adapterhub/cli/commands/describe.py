"""`adapterhub describe`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, base_option, command, dry_run_option, set_option
from adapterhub_converters.errors import FormatError, UsageError

if TYPE_CHECKING:
    from adapterhub.manifest.fact_changes import FactChange
    from adapterhub.operations.describe import DescribeResult

_SHOWN = 60  # the most characters of a value
_SCHEMA = ("$schema", "schema_version")
_CONFIG = "base.config."  # new values are only counted, because people look for changed ones


@command(
    "describe",
    example="""
    adapterhub describe ./sql --base ./Qwen3-0.6B
    adapterhub describe ./sql --license Apache-2.0 --description "Turns questions into SQLite."
    adapterhub describe ./sql --set base.repo=Qwen/Qwen3-0.6B --dry-run""",
)
@click.argument("folder", metavar="DIR")
@base_option("pin it as the model the adapter was trained on; read from its headers.")
@click.option("--license", metavar="SPDX", help="License of the adapter, like Apache-2.0.")
@click.option("--description", metavar="TEXT", help="What the adapter is for, in one paragraph.")
@click.option("--name", metavar="NAME", help="Name of the adapter.")
@click.option("--task", metavar="TASK", help="Task as PEFT names it, like CAUSAL_LM.")
@set_option("any key of adapter.toml")
@dry_run_option
@click.pass_obj
def describe(
    settings: Settings,
    /,
    *,
    folder: str,
    base: str | None,
    changes: tuple[str, ...],
    dry_run: bool,
    **declared: str | None,
) -> None:
    """Write or renew the adapter.json in DIR, in place, and show what changed.

    Digests of edited files are updated; the record of a training or a merge is kept. --base pins the base model, so that
    `adapterhub validate SRC --base BASE` recognizes it; a base that the adapter does not fit is refused. Weights that changed
    are refused, as the record is not theirs.
    """
    from adapterhub.operations import describe as describe_operation

    facts: dict[str, Any] = {key: value for key, value in declared.items() if value is not None}
    for pair in changes:
        _set_value(facts, pair)
    spec = inputs.read_base(base, settings) if base else None
    result = describe_operation.describe_folder(folder, facts, base=spec, dry_run=dry_run)
    document = {
        "path": str(result.path),
        "new": result.new,
        "written": result.written,
        "changes": [asdict(change) for change in result.changes],
        "manifest": result.manifest.to_dict(),
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _text(result))


def _set_value(facts: dict[str, Any], pair: str) -> None:
    """Put the value of `a.b=value` into nested tables: as JSON if it is valid JSON, else as text."""
    key, equals, text = pair.partition("=")
    keys = ["base", "repo"] if key == "base" else key.split(".")  # what people mean by a base is its name
    if not equals or not all(keys) or len(keys) > 8:
        raise UsageError("--set", f"{pair[:80]!r} is not KEY=VALUE", "Write it like base.repo=Qwen/Qwen3-0.6B")
    for table in keys[:-1]:
        facts = facts.setdefault(table, {})
        if not isinstance(facts, dict):
            break
    if not isinstance(facts, dict) or keys[-1] in facts:
        raise UsageError("--set", f"{key[:80]} is set twice", "Leave one out")
    facts[keys[-1]] = _value(text)


def _value(text: str) -> Any:
    from adapterhub_converters.containers import json_file

    try:
        # Wrapped, because `parse_object` takes objects only.
        return json_file.parse_object(f'{{"value": {text}}}', "--set")["value"]
    except FormatError:
        return text


def _text(result: DescribeResult) -> None:
    if not result.changes:
        output.write(f"{result.path}: up to date")
        return
    verb = ("wrote" if result.new else "renewed") if result.written else "would write" if result.new else "would renew"
    output.write(f"{verb} {result.path}")
    relevant = [
        change for change in result.changes if not (result.new and (change.key in _SCHEMA or change.new in (None, [], {}, "")))
    ]
    config = [change for change in relevant if change.key.startswith(_CONFIG) and change.old is None]
    for change in relevant:
        if change not in config:
            output.write(output.one_line(f"  {change.key}: {_change_text(change, result.new)}"))
    if config:
        output.write(f"  {_CONFIG[:-1]}: {output.plural(len(config), 'value')}")


def _change_text(change: FactChange, new: bool) -> str:
    return _short(change.new) if new else f"{_short(change.old)} -> {_short(change.new)}"


def _short(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = output.digest(text) if text.startswith("sha256:") else text
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
