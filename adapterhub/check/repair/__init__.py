"""Mends what is certainly wrong with a PEFT adapter, in a copy, each by name; what is uncertain is only proposed.

Certain is what the tensors themselves say (names, ranks, which modules, biases, magnitudes) and what the base's weights or
`adapter.json` say. A scale is never among it: tensors don't tell theirs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapterhub.check import Problem, check
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import atomic

from . import config, copies, keys, write
from .draft import Mend, Proposal, opened

__all__ = ["Fixed", "Mend", "Proposal", "fix"]


@dataclass(frozen=True)
class Fixed:
    """What was mended, what is proposed, and what `validate` still says of the result.

    `out` is None where nothing was written: nothing had to be mended, or nothing should be written.
    """

    out: Path | None
    mends: tuple[Mend, ...]
    proposals: tuple[Proposal, ...]
    left: tuple[Problem, ...]
    left_out: tuple[str, ...] = ()
    """Files of the source that are no part of an adapter, and were not copied."""


def fix(
    path: Path,
    out: Path,
    *,
    base: BaseSpec | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dry_run: bool = False,
) -> Fixed:
    """Mend a copy of the PEFT folder or lone state dict `path` as the folder `out`, whole or not at all.

    Args:
        path: Never changed.
        out: Must not exist, or be an empty folder; nothing is written there if there is nothing to mend.
        base: What the adapter is for: settles prefixes, and with its weights copies of them.
        alpha: Of a lone state dict that has no config; likewise `rslora`.
        dry_run: Write nothing.
    """
    if not dry_run:
        atomic.check_free(out)
    with opened(path, alpha=alpha, rslora=rslora) as state:
        keys.mend(state, base)
        copies.mend(state, base)
        config.mend(state, base)
        if not state.mends:
            return Fixed(None, (), tuple(state.proposals), _left(path, base))
        with _place(out, dry_run=dry_run) as folder:
            left_out = write.write(state, folder)
            left = _left(folder, base)
    return Fixed(None if dry_run else out, tuple(state.mends), tuple(state.proposals), left, left_out)


def _left(path: Path, base: BaseSpec | None) -> tuple[Problem, ...]:
    return tuple(check(path, base=base, headers_only=True).problems)


@contextlib.contextmanager
def _place(out: Path, *, dry_run: bool) -> Iterator[Path]:
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            yield Path(temporary)
    else:
        with atomic.whole(out) as folder:
            yield folder
