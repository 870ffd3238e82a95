"""`adapterhub merge --into`: adapters into a base."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings
from adapterhub.cli.progress import bytes_bar
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.merge import Change, FuseReport, Options
    from adapterhub_converters.bases import BaseSpec

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SHOWN = 5  # modules of which least is kept
_INDENT = "  "
_DOUBT = 0.01  # of what is kept: less is not shown

_OPTIONS = (
    click.option("--dtype", type=click.Choice(("bf16", "f16", "f32")), help="With --into: floats to write. [default: BASE's]"),
    click.option(
        "--requantize",
        type=click.Choice(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "nf4")),
        help="With --into, into a GGUF: the type that floats, and quantized tensors that change, get. nf4: linear layers of a "
        "Hugging Face folder, as bitsandbytes has them.",
    ),
    click.option("--shard-size", metavar="SIZE", help="With --into: files of at most so much, like 5GB."),
    click.option(
        "--onto",
        type=click.Choice(("original", "as-trained")),
        help="With --into: BASE as it is, or first rounded as training saw it (adapter.json says how). [default: original]",
    ),
    click.option("--dequantize", is_flag=True, help="With --into: let a quantized Hugging Face model become one in floats."),
    click.option("--force", is_flag=True, help="With --into: write it even if a quantized target swallows the adapter."),
    click.option(
        "--recipe-only",
        is_flag=True,
        help="With --into: keep no model but a recipe of a few kilobytes for `adapterhub materialize`. OUT is a .json file, or "
        "a word, its name in the registry. The merge runs once, into a temporary place beside, for the digests of its files.",
    ),
    click.option("--no-digest", is_flag=True, help="With --recipe-only: don't run the merge; nothing to compare with later."),
    click.option("--dry-run", "--plan", "dry_run", is_flag=True, help="With --into: say what would be, and write nothing."),
)


_NAMES = ("dtype", "requantize", "shard_size", "onto", "dequantize", "force", "recipe_only", "no_digest", "dry_run")


def options(command: F) -> F:
    """The options of a merge into a base, as one argument `into`."""

    @functools.wraps(command)
    def call(*args: Any, **given: Any) -> Any:
        return command(*args, into={name: given.pop(name) for name in _NAMES}, **given)

    made: Any = call
    for option in reversed(_OPTIONS):
        made = option(made)
    found: F = made
    return found


def refuse(into: Mapping[str, Any]) -> None:
    """UsageError for options that mean nothing without --into."""
    given = next((name for name, value in into.items() if value), None)
    if given:
        raise UsageError(f"--{given.replace('_', '-')}", "is for a merge into a base", "Add --into BASE")


def run(
    settings: Settings,
    found: Sequence[inputs.Source],
    weights: Sequence[float],
    places: tuple[str, str],
    into: Mapping[str, Any],
) -> None:
    """Merge into a base, or say what would be; `places` are the base and what to write."""
    from adapterhub.merge import prepared
    from adapterhub_converters import bases
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import convert

    base, out = inputs.weights(places[0], settings), Path(places[1])
    asked = _asked(found, weights, base, into)
    if base.is_dir() and not into["recipe_only"] and base.resolve() in out.resolve().parents:
        raise UsageError(str(out), f"lies in the base, {places[0]}, which would not be the same any more", "Name another place")
    if into["no_digest"] and not into["recipe_only"]:
        raise UsageError("--no-digest", "is for a recipe", "Add --recipe-only")
    gguf = base.is_dir() and out.suffix == ".gguf" and not into["recipe_only"]
    if not into["dry_run"] and not into["recipe_only"]:
        atomic.check_free(out, folder=not gguf and (base.is_dir() or bool(asked.shard_size)))
    spec = bases.read_base(base)
    adapters = [convert.read(source.path, base=spec) for source in found]
    merge = prepared(list(zip(adapters, weights, strict=True)), base, asked, gguf=gguf)
    warnings = (*_of_other_bases(found, spec, places[0]), *merge.report.warnings)
    for warning in warnings:
        output.say(output.one_line(f"warning: {warning}"))
    if into["recipe_only"] and not into["dry_run"]:
        from . import variants

        variants.keep(settings, merge, asked, variants.Place(base, *places), digest=not into["no_digest"])
        return
    report = merge.report
    if not into["dry_run"]:
        with bytes_bar("merging") as progress:
            report = merge.write(out, progress)
    document_ = document(dataclasses.replace(report, warnings=warnings))
    output.emit(document_, as_json=settings.as_json, text=lambda: text(report))


def _of_other_bases(found: Sequence[inputs.Source], spec: BaseSpec, typed: str) -> list[str]:
    """A line for each adapter whose manifest pins a base of other names or shapes; a fine-tune of its base has the same."""
    from adapterhub.manifest.document import AdapterManifest

    lines = []
    for source in found:
        manifest = AdapterManifest.read(source.folder)
        pinned = manifest.base.fingerprint if manifest else None
        if manifest and spec.fingerprint and pinned not in (None, spec.fingerprint):
            trained_on = manifest.base.repo or f"the base {str(pinned)[:19]}"
            lines.append(
                f"{source.where} was trained on {trained_on}, and {typed} has tensors of other names or shapes. "
                f"`adapterhub validate {source.where} --base {typed}` says more"
            )
    return lines


def _asked(found: Sequence[inputs.Source], weights: Sequence[float], base: Path, into: Mapping[str, Any]) -> Options:
    from adapterhub.merge import Options

    size = into["shard_size"]
    return Options(
        dtype=into["dtype"],
        requantize=into["requantize"],
        shard_size=_bytes(size) if size else None,
        dequantize=into["dequantize"],
        as_trained=into["onto"] == "as-trained",
        trained_in=trained_in(found),
        force=into["force"],
        lineage=_lineage(found, weights, base),
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit += "B" if unit in ("K", "M", "G", "T") else ""
    if not match or not (count := int(float(match[1]) * _UNITS[unit])):
        raise UsageError("--shard-size", f"{text!r} is no size", "Write it like 5GB or 500MB")
    return count


def trained_in(found: Sequence[inputs.Source]) -> str | None:
    """The quantization that all adapters saw in training, by their manifests; None when none or more than one is recorded."""
    from adapterhub.manifest.document import AdapterManifest

    said = {manifest.base.quantization if (manifest := AdapterManifest.read(source.folder)) else None for source in found}
    return said.pop() if len(said) == 1 else None


def _lineage(found: Sequence[inputs.Source], weights: Sequence[float], base: Path) -> dict[str, Any]:
    from adapterhub_converters.bases import read_base

    spec = read_base(base)
    parents = [inputs.parent(source, weight) for source, weight in zip(found, weights, strict=True)]
    known = {"repo": spec.repo, "revision": spec.revision, "fingerprint": spec.fingerprint}
    return {
        "base": known if spec.repo else {**known, "name": base.resolve().name},
        "adapters": [
            {"digest": parent.digest, **({"ref": parent.ref} if parent.ref else {}), "weight": parent.weight}
            for parent in parents
        ],
    }


def document(report: FuseReport) -> dict[str, Any]:
    """A report with stable keys."""
    return {
        "output": str(report.out) if report.out else None,
        "tensors": report.tensors,
        "size": report.size,
        "touched_size": report.touched_size,
        "touched": {
            name: {
                "relative": change.relative,
                "kept": change.kept,
                "doubt": change.doubt,
                "error_original": change.original,
                "error_as_trained": change.as_trained,
            }
            for name, change in report.touched.items()
        },
        "copied": list(report.copied),
        "skipped": dict(report.skipped),
        "notes": list(report.notes),
        "warnings": list(report.warnings),
    }


def text(report: FuseReport) -> None:
    """A report for people."""
    where = str(report.out) if report.out else "nothing written"
    output.write(
        f"{where}: {output.plural(report.tensors, 'tensor')}, {output.size(report.size)}"
        + (f"; {len(report.touched)} changed, {output.size(report.touched_size)}" if report.touched else "")
    )
    changes = {name: change for name, change in report.touched.items() if change.relative is not None}
    if changes:
        largest = max(change.relative or 0.0 for change in changes.values())
        kept = min(change.kept for change in changes.values() if change.kept is not None)
        _write(f"  largest change {largest:.2%} of a weight's norm; at least {kept:.1%} of it survived rounding")
    errors = [(change.original, change.as_trained) for change in changes.values() if change.original is not None]
    if errors:
        original, trained = (max(error[which] or 0.0 for error in errors) for which in (0, 1))
        _write(f"  at most {original:.2%} off what was trained, onto the original weights; {trained:.2%}, as trained")
    if report.out is None or any(change.original is not None for change in changes.values()):
        for line in _worst(changes):
            output.write(_INDENT + line)
    for name, reason in report.skipped.items():
        _write(f"  left out: {name}: {reason}")
    for note in report.notes:
        _write(f"  note: {note}")


def _write(line: str) -> None:
    for part in output.wrapped(output.one_line(line), output.width(), indent=4):
        output.write(part)


def _worst(changes: Mapping[str, Change]) -> list[str]:
    """The modules of which least is kept."""
    worst = sorted(changes.items(), key=lambda item: item[1].kept or 0.0)[:_SHOWN]
    known = any(change.original is not None for _, change in worst)
    columns = [output.Column("LEAST KEPT"), output.Column("CHANGE", right=True, drop=1), output.Column("KEPT", right=True)]
    if known:
        columns += [output.Column("ERROR ORIGINAL", right=True, drop=2), output.Column("AS TRAINED", right=True, drop=3)]
    rows = []
    for name, change in worst:
        doubt = f" ± {change.doubt:.0%}" if change.doubt > _DOUBT else ""
        row = [name, f"{change.relative:.2%}", f"{change.kept:.1%}{doubt}"]
        if known:
            row += [f"{change.original:.2%}", f"{change.as_trained:.2%}"]
        rows.append(row)
    screen = output.width()
    return output.table(columns, rows, screen=screen and screen - len(_INDENT))
