"""`adapterhub fix`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, command

if TYPE_CHECKING:
    from adapterhub.check.repair import Fixed


@command(
    "fix",
    short="Mend what is certainly wrong, in a copy.",
    example="""
    adapterhub fix ./sql --dry-run
    adapterhub fix ./sql -o ./sql-mended --base ./Qwen3-0.6B
    adapterhub fix lora.safetensors --alpha 16 -o ./sql""",
)
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", "out", metavar="OUT", help="The folder to make. [default: ./NAME-fixed]")
@click.option("--dry-run", is_flag=True, help="Say what would be mended and write nothing.")
@click.option("--base", metavar="BASE", help="The model it is for; settles prefixes and copies of its weights.")
@click.option("--alpha", metavar="N", type=float, help="Of a lone state dict, which says no alpha.")
@click.option("--rslora", is_flag=True, help="A lone state dict was trained with rsLoRA.")
@click.pass_obj
def fix(
    settings: Settings, *, source: str, out: str | None, dry_run: bool, base: str | None, alpha: float | None, rslora: bool
) -> None:
    """Mend what is certainly wrong with a PEFT adapter, in a copy; SRC itself is never changed.

    Certain is what the tensors say: names, ranks, which modules, biases, magnitudes. What cannot be known, above all a
    scale, is only proposed, with the edit or command that would do it. What is mended is listed in docs/validate.md.
    """
    from adapterhub.check import repair as library

    spec = inputs.read_base(base, settings) if base else None
    with inputs.opened(source, settings) as found:
        name = found.folder.resolve().name if found.path.is_dir() else found.path.stem
        target = Path(out) if out else Path(f"{name}-fixed")
        fixed = library.fix(found.path, target, base=spec, alpha=alpha, rslora=rslora, dry_run=dry_run)
        where = found.where
    output.emit(_document(where, fixed), as_json=settings.as_json, text=lambda: _text(where, fixed, dry_run=dry_run))


def _document(where: str, fixed: Fixed) -> dict[str, Any]:
    return {
        "source": where,
        "output": str(fixed.out) if fixed.out else None,
        "repaired": [asdict(repair) for repair in fixed.repairs],
        "proposed": [asdict(proposal) for proposal in fixed.proposals],
        "left": [{"severity": problem.severity, **asdict(problem)} for problem in fixed.left],
        "left_out": list(fixed.left_out),
    }


def _text(where: str, fixed: Fixed, *, dry_run: bool) -> None:
    screen = output.width()
    if not fixed.repairs:
        head = f"{where}: nothing to mend, nothing written"
    elif dry_run:
        head = f"{where}: {output.plural(len(fixed.repairs), 'mend')}, nothing written (--dry-run)"
    else:
        head = f"{fixed.out}: {output.plural(len(fixed.repairs), 'mend')}"
    output.write(output.one_line(head))
    for repair in fixed.repairs:
        _lines(f"repaired[{repair.code}]", repair.what, "green", screen)
    for proposal in fixed.proposals:
        _lines(f"proposed[{proposal.code}]", proposal.what, "yellow", screen)
        for line in output.wrapped(f"    {proposal.do}", screen, indent=4):
            output.write(line)
    if fixed.left_out:
        output.write(output.one_line(f"not copied: {', '.join(fixed.left_out)}"))
    counts = [output.plural(n, kind) for kind in ("error", "warning") if (n := sum(p.severity == kind for p in fixed.left))]
    if counts:
        again = fixed.out or where
        output.write(output.one_line(f"still: {', '.join(counts)}; `adapterhub validate {again}` says which"))


def _lines(head: str, what: str, name: str, screen: int | None) -> None:
    lines = output.wrapped(output.one_line(f"{head} {what}"), screen, indent=4)
    output.write(output.color(head, name) + lines[0].removeprefix(head))
    for line in lines[1:]:
        output.write(line)
