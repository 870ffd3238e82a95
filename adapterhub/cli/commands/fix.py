"""`adapterhub fix`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, alpha_option, base_option, command, dry_run_option, output_option, rslora_option
from adapterhub.cli.views import groups

if TYPE_CHECKING:
    from adapterhub.checks.repair import FixResult
    from adapterhub.checks.report import Problem


@command(
    "fix",
    example="""
    adapterhub fix ./sql --dry-run
    adapterhub fix ./sql -o ./sql-fixed --base ./Qwen3-0.6B
    adapterhub fix lora.safetensors --alpha 16 -o ./sql""",
)
@click.argument("source", metavar="SRC")
@output_option("new folder. [default: ./NAME-fixed]")
@dry_run_option
@base_option("decides on prefixes, and on copies of its weights.")
@alpha_option
@rslora_option
@click.pass_obj
def fix(
    settings: Settings, *, source: str, out: str | None, dry_run: bool, base: str | None, alpha: float | None, rslora: bool
) -> None:
    """Repair known defects of a PEFT adapter in a copy; SRC itself is never changed.

    Only what the tensors prove is repaired: names, ranks, target modules, biases, magnitudes. What they cannot prove, such as
    a scale, is proposed with the edit or command that does it. docs/validate.md lists the repairs.
    """
    from adapterhub.checks import repair as library

    spec = inputs.read_base(base, settings) if base else None
    with inputs.open_source(source, settings) as adapter_source:
        name = adapter_source.folder.resolve().name if adapter_source.path.is_dir() else adapter_source.path.stem
        target = Path(out) if out else Path(f"{name}-fixed")
        fixed = library.fix(adapter_source.path, target, base=spec, alpha=alpha, rslora=rslora, dry_run=dry_run)
        label = adapter_source.location
    output.emit(_document(label, fixed), as_json=settings.as_json, text=lambda: _text(label, fixed, dry_run=dry_run, base=base))


def _document(location: str, fixed: FixResult) -> dict[str, Any]:
    return {
        "source": location,
        "output": str(fixed.out) if fixed.out else None,
        "repaired": [asdict(repair) for repair in fixed.repairs],
        "proposed": [asdict(proposal) for proposal in fixed.proposals],
        "left": [_problem(problem) for problem in fixed.remaining],
        "left_out": list(fixed.left_out),
    }


def _problem(problem: Problem) -> dict[str, Any]:
    from adapterhub.cli.views import reports  # late: the checks import numpy

    fields = {name: value for name, value in problem._asdict().items() if name != "cause"}
    return {"severity": problem.severity, **fields, "hint": reports.hint_of(problem)}


def _text(location: str, fixed: FixResult, *, dry_run: bool, base: str | None) -> None:
    if not fixed.repairs:
        head = f"{location}: nothing to repair, nothing written"
    elif dry_run:
        head = f"{location}: {output.plural(len(fixed.repairs), 'repair')}, nothing written (--dry-run)"
    else:
        head = f"{fixed.out}: {output.plural(len(fixed.repairs), 'repair')}"
    output.write(output.one_line(head))
    items = [groups.Item(f"repaired[{repair.code}]", "", repair.what, color="green") for repair in fixed.repairs]
    items += [
        groups.Item(f"proposed[{proposal.code}]", "", proposal.what, proposal.do, color="yellow")
        for proposal in fixed.proposals
    ]
    for line in groups.lines(items, output.width()):
        output.write(line)
    if fixed.left_out:
        output.write(output.one_line(f"not copied: {', '.join(fixed.left_out)}"))
    counts = [
        output.plural(n, kind) for kind in ("error", "warning") if (n := sum(p.severity == kind for p in fixed.remaining))
    ]
    if counts:
        remaining_path = shlex.quote(str(fixed.out or location))
        base_option = f" --base {shlex.quote(base)}" if base else ""
        output.write(
            output.one_line(f"remaining: {', '.join(counts)}; see `adapterhub validate {remaining_path}{base_option}`")
        )
