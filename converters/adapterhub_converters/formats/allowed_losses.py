"""Losses that a conversion may cause: written in spite of a refusal, as far as allowed, and marked in the report.

`lossy` makes the smaller adapter; this writes it, and prepares pairs whose numbers depend on the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.adapter import Adapter, Factored, Loss, LossReport
from adapterhub_converters.errors import RefusedError, refused_error

from . import lossy
from .lossy import LossAllowance

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

Write = Callable[[Adapter, Path], LossReport]


def write_with_losses(write: Write, adapter: Adapter, path: Path, base: BaseSpec | None, allowed: LossAllowance) -> LossReport:
    """Write the adapter; approximate or drop what is refused, as far as allowed, and write the remainder again."""
    try:
        return write(adapter, path)
    except RefusedError as error:
        refusal = error
    # A writer that stops at its first problem has no list of items.
    items = refusal.items or (f"{refusal.where}: {refusal.what}",)
    reduced = lossy.reduce_adapter(adapter, items, allowed, base)
    try:
        report = write(reduced.adapter, path) if reduced.losses else None
    except RefusedError as error:
        refusal = error
        report = None
    if report is None:
        hint, code, fields = refusal.hint, refusal.code, dict(refusal.fields)
        if not hint and reduced.options:
            hint, code, fields = lossy.hint(reduced.options), "loss-not-allowed", {"options": reduced.options}
        # Reasons for the refusal come first; a failed approximation adds its own.
        if reasons := [*dict.fromkeys([*refusal.items, *reduced.failed])]:
            raise refused_error(refusal.where, reasons, hint, code=code, **fields)
        raise RefusedError(refusal.where, refusal.what, hint, (), code=code, **fields)
    replaced_names = {line.name for line in reduced.losses}
    losses = [*(line for line in report.losses if line.name not in replaced_names), *reduced.losses]
    return dataclasses.replace(report, losses=tuple(sorted(losses, key=lambda line: line.name)))


def without_base_dependence(adapter: Adapter, base: BaseSpec | None) -> Adapter:
    """Return the adapter without copies of the base's weights, and as plain LoRA if it is PiSSA.

    It is unchanged if the base's weights are not available.
    """
    if base is None or base.folder is None:
        return adapter
    from . import base_weights  # of a folder with the base's weights

    folder = base.folder
    with contextlib.suppress(RefusedError):  # not the base's own table: the writer refuses it by name
        adapter = base_weights.without_copies(adapter, folder)
    # PiSSA moved part of the base into the factors, so only the base's numbers tell what they add.
    return base_weights.plain_lora(adapter, folder) if adapter.meta.init == "pissa" else adapter


def with_rounding_notes(adapter: Adapter, report: LossReport, settled: Adapter) -> LossReport:
    """Return the report with every pair that was recomputed before writing, with the same function, marked as rounded."""
    notes = {t: "factors are products, rounded once in float32" for t, d in adapter.deltas.items() if isinstance(d, Factored)}
    if settled.meta.init != adapter.meta.init:
        notes = dict.fromkeys(adapter.deltas, "plain LoRA of twice the rank, from a decomposition of the base in float32")
    if not notes:
        return report
    losses = [
        dataclasses.replace(line, loss=Loss.ROUNDED, note=notes[target])
        if line.loss < Loss.ROUNDED and (target := line.name.rpartition(".")[0]) in notes
        else line
        for line in report.losses
    ]
    return dataclasses.replace(report, losses=tuple(losses))
