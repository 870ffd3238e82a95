"""Repair known defects of a PEFT adapter in a copy; propose fixes that cannot be proven.

Tensors prove names, ranks, target modules, biases and magnitudes; the base's weights and `adapter.json` prove a few more. A
scale is never repaired: tensors do not contain theirs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.checks import Problem, check
from adapterhub_converters.containers import atomic
from adapterhub_converters.lazy_dataclass import dataclass

from .config_repairs import repair_config
from .draft import Proposal, Repair, open_draft, write_draft
from .tensor_repairs import bring_experts_forward, drop_copies, rename_tensors

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

__all__ = ["FixResult", "Proposal", "Repair", "fix"]


@dataclass(frozen=True)
class FixResult:
    """The result of `fix`.

    Attributes:
        out: The new folder; None if nothing was written.
        remaining: Problems that a check still finds.
        left_out: Files of the source that do not belong to an adapter and were not copied.
    """

    out: Path | None
    repairs: tuple[Repair, ...]
    proposals: tuple[Proposal, ...]
    remaining: tuple[Problem, ...]
    left_out: tuple[str, ...] = ()


def fix(
    path: Path,
    out: Path,
    *,
    base: BaseSpec | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dry_run: bool = False,
) -> FixResult:
    """Repair a copy of the PEFT folder or lone state dict `path` as the folder `out`, completely or not at all.

    Args:
        path: Never changed.
        out: Must not exist, or be an empty folder; nothing is written if there is nothing to repair.
        base: The base model: decides prefixes, and with its weights which copies of them to drop.
        alpha: The alpha of a lone state dict without a config; likewise `rslora`.
        dry_run: Write nothing.

    Raises:
        OutputExistsError: `out` exists and is not an empty folder.
        RefusedError: The source is not a PEFT adapter, has no alpha, or has a config and `alpha` or `rslora` were given.
    """
    if not dry_run:
        # Before the work: an existing output should not be noticed only at the end.
        atomic.check_free(out)
    with open_draft(path, alpha=alpha, rslora=rslora) as draft:
        rename_tensors(draft, base)
        drop_copies(draft, base)
        repair_config(draft, base)
        bring_experts_forward(draft, base)
        if not draft.repairs:
            return FixResult(None, (), tuple(draft.proposals), _remaining_problems(path, base))
        with _folder(out, dry_run=dry_run) as folder:
            left_out = write_draft(draft, folder)
            remaining = _remaining_problems(folder, base)
    return FixResult(None if dry_run else out, tuple(draft.repairs), tuple(draft.proposals), remaining, left_out)


def _remaining_problems(path: Path, base: BaseSpec | None) -> tuple[Problem, ...]:
    """Return the problems that a check finds in an adapter."""
    return tuple(check(path, base=base, headers_only=True).problems)


@contextlib.contextmanager
def _folder(out: Path, *, dry_run: bool) -> Iterator[Path]:
    """Yield the folder to write to: `out`, which appears only if it is complete, or a temporary one for a dry run."""
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            yield Path(temporary)
    else:
        with atomic.pending_output(out) as folder:
            yield folder
