"""Measurements of versions, recorded in the log of a name; `manifest.measurement` has the text form of one, `gates` bounds."""

from __future__ import annotations

from adapterhub.index import queries
from adapterhub.index.queries import LogState
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import Ref
from adapterhub.store.store import Entry

from .moves import now
from .registry import Registry


def record(registry: Registry, ref: Ref, evaluation: Evaluation) -> bool:
    """Record a measurement in the log of a version; return False if the last one under its name is the same."""
    row = registry.row(ref)
    text = evaluation.dump()
    new = False

    def decide(state: LogState) -> Entry | None:
        nonlocal new
        # Looked up again under the lock: the version may have been removed since.
        registry.row(Ref(ref.name, number=row.number))
        new = queries.marks(registry.index, "evaluate", row.name).get(f"{row.number} {evaluation.name}") != text
        if not new:
            return None
        return Entry(row.name, state.seq + 1, "evaluate", now(), number=row.number, previous=state.head, message=text)

    registry.move(row.name, decide)
    return new
