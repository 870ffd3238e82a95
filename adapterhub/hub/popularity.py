"""Rankings of names by downloads and stars, as of the last minute, for the sort of the Hugging Face Hub's list of models.

A ranking has the names with any. It is computed anew after a multiple of the time that it took, by one thread, while the others
get the earlier one.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

from adapterhub_converters.lazy_dataclass import dataclass

from .downloads import first_recent_day
from .hub_database import HubDatabase

DOWNLOADS, LIKES = "downloads", "likes"
_TTL, _PAUSE = 60.0, 20  # seconds, and times what it took: at most a twentieth of a processor
_MAX_NAMES = 100_000  # of a ranking: the first; those below are listed with the names without any
_HIGHEST = "GROUP BY name ORDER BY total DESC, name DESC LIMIT ?"
_SQL = {
    DOWNLOADS: f"SELECT name, sum(count) AS total FROM downloads WHERE day > ? {_HIGHEST}",  # noqa: S608 - ours
    LIKES: f"SELECT name, count(*) AS total FROM stars WHERE ? <> '' {_HIGHEST}",  # noqa: S608 - ours
}


@dataclass(frozen=True)
class Ranking:
    """Counts and names, in ascending order."""

    places: tuple[tuple[int, str], ...] = ()

    @cached_property
    def names(self) -> frozenset[str]:
        """The names."""
        return frozenset(name for _, name in self.places)

    def after(self, place: tuple[int, str] | None, *, ascending: bool) -> Iterator[tuple[int, str]]:
        """Yield the places after one, which need not be there any more, or all."""
        if ascending:
            return islice(self.places, bisect_right(self.places, place) if place else 0, None)
        at = bisect_right(self.places, place) if place else len(self.places)
        at -= bool(place and at and self.places[at - 1] == place)
        return (self.places[index] for index in range(at - 1, -1, -1))


class Rankings:
    """The rankings of a hub."""

    def __init__(self, database: HubDatabase) -> None:
        self._database, self._lock = database, threading.Lock()
        self._rankings: dict[str, tuple[float, Ranking]] = {}

    def get(self, kind: str) -> Ranking:
        """Return the ranking by DOWNLOADS or LIKES."""
        until, ranking = self._rankings.get(kind, (0.0, None))
        if until < time.monotonic() and self._lock.acquire(blocking=ranking is None):
            try:
                until, ranking = self._rankings.get(kind, (0.0, None))
                if ranking is None or until < time.monotonic():
                    ranking = self._compute(kind)
            finally:
                self._lock.release()
        return ranking or Ranking()

    def _compute(self, kind: str) -> Ranking:
        start = time.monotonic()
        rows = self._database.select(_SQL[kind], first_recent_day(), _MAX_NAMES)
        ranking = Ranking(tuple(sorted((int(total), str(name)) for name, total in rows)))
        end = time.monotonic()
        self._rankings[kind] = end + max(_TTL, _PAUSE * (end - start)), ranking
        return ranking
