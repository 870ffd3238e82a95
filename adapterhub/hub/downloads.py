"""Downloads counted by version, day and protocol.

What counts is a GET of the largest file of a version from its first byte, or of its manifest by an OCI client; not a HEAD, the
rest of a file, or a file that a client has already. Counts of a few seconds are written together; a killed process loses its.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from adapterhub.digest import Digest
from adapterhub.index.queries import VersionRow
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_database import HubDatabase

HUGGING_FACE, OCI, PAGES = "hf", "oci", "pages"
"""Protocols: that of the Hugging Face Hub with Git LFS, that of OCI registries, and the pages, which count no downloads."""
RECENT_DAYS = 30
"""Days that the field `downloads` of a model is about, as on the Hugging Face Hub."""
MAX_DAYS = 400
"""Days for which downloads are kept by day; of the years before them, the sum is kept."""
_NEW_YEAR = "-01-01"
_MAX_COMPACTED = 40  # days at a time
_ADD = (
    "INSERT INTO downloads (name, number, day, protocol, count) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT (name, number, day, protocol) DO UPDATE SET count = downloads.count + excluded.count"
)
_INTERVAL = 5.0  # seconds between two writes
_TTL, _MAX_TOTALS = 30.0, 20_000  # seconds and names for which a sum is kept in memory


@dataclass(frozen=True, slots=True)
class DownloadCount:
    """The downloads of a version on a day, written YYYY-MM-DD, in UTC, by a protocol."""

    number: int
    day: str
    protocol: str
    count: int


class Downloads:
    """The downloads of a hub."""

    def __init__(self, database: HubDatabase) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._pending: Counter[tuple[str, int, str, str]] = Counter()
        self._totals: dict[str, tuple[float, int]] = {}
        self._due = time.monotonic() + _INTERVAL

    def count(self, row: VersionRow, protocol: str) -> None:
        """Count a download of a version."""
        with self._lock:
            self._pending[row.name, row.number, _day(time.time()), protocol] += 1
            is_due = self._due < time.monotonic()
        if is_due:
            self.write()

    def count_file(
        self, row: VersionRow | None, files: Mapping[str, tuple[Digest, int]], digest: Digest, range_header: str | None
    ) -> None:
        """Count a download if a request for a file of a version is for its largest one, from the first byte."""
        if row is None or (range_header is not None and not range_header.startswith("bytes=0-")):
            return
        if digest == max(files.values(), key=lambda file: file[1])[0]:
            self.count(row, HUGGING_FACE)

    def write(self) -> None:
        """Write what was counted since the last time."""
        with self._lock:
            counts, self._pending = self._pending, Counter()
            self._due = time.monotonic() + _INTERVAL
        if counts:
            self._database.execute_many(_ADD, [(*key, count) for key, count in sorted(counts.items())])

    def compact(self) -> None:
        """Write what was counted, and add the days of years before the last MAX_DAYS to the first day of their year."""
        self.write()
        first_day = _day(time.time() - MAX_DAYS * 86400)[:4] + _NEW_YEAR
        oldest = "SELECT min(day) FROM downloads WHERE day < ? AND substr(day, 5) <> ?"
        for _ in range(_MAX_COMPACTED):
            with self._database.transaction():
                ((day,),) = self._database.select(oldest, first_day, _NEW_YEAR)
                if day is None:
                    return
                # Deleted first: another process that does the same gets none of these rows.
                rows = self._database.select("DELETE FROM downloads WHERE day = ? RETURNING name, number, protocol, count", day)
                values = [(name, number, day[:4] + _NEW_YEAR, protocol, count) for name, number, protocol, count in rows]
                self._database.execute_many(_ADD, values)

    def recent(self, names: Collection[str]) -> dict[str, int]:
        """Return the downloads of names in the last RECENT_DAYS, as of half a minute ago."""
        now = time.monotonic()
        totals = {name: self._totals.get(name, (0.0, 0)) for name in names}
        stale_names = [name for name, (until, _) in totals.items() if until < now]
        if stale_names:
            fresh = dict.fromkeys(stale_names, 0) | self._recent(stale_names)
            if len(self._totals) + len(fresh) > _MAX_TOTALS:
                self._totals = {}
            self._totals |= {name: (now + _TTL, total) for name, total in fresh.items()}
            totals |= {name: (0.0, total) for name, total in fresh.items()}
        return {name: total for name, (_, total) in totals.items()}

    def _recent(self, names: Sequence[str]) -> dict[str, int]:
        marks = ", ".join("?" * len(names))
        sql = f"SELECT name, sum(count) FROM downloads WHERE name IN ({marks}) AND day > ? GROUP BY name"  # noqa: S608 - marks
        return {str(name): int(total) for name, total in self._database.select(sql, *names, first_recent_day())}


def first_recent_day() -> str:
    """Return the day after which downloads are recent."""
    return _day(time.time() - RECENT_DAYS * 86400)


def download_counts(database: HubDatabase, name: str, limit: int) -> list[DownloadCount]:
    """Return the counts of a name, the last day and the newest version first, at most `limit` of them."""
    sql = "SELECT number, day, protocol, count FROM downloads WHERE name = ? ORDER BY day DESC, number DESC, protocol LIMIT ?"
    return [DownloadCount(*row) for row in database.select(sql, name, limit)]


def downloads_by_version(database: HubDatabase, name: str) -> dict[int, int]:
    """Return all downloads of each version of a name."""
    sql = "SELECT number, sum(count) FROM downloads WHERE name = ? GROUP BY number"
    return {int(number): int(total) for number, total in database.select(sql, name)}


def rename(database: HubDatabase, old: str, new: str) -> None:
    """Move the counts of a name to its new name, within a transaction."""
    sql = (
        "INSERT INTO downloads (name, number, day, protocol, count)"
        " SELECT ?, number, day, protocol, count FROM downloads WHERE name = ?"
        " ON CONFLICT (name, number, day, protocol) DO UPDATE SET count = downloads.count + excluded.count"
    )
    database.execute(sql, new, old)
    database.execute("DELETE FROM downloads WHERE name = ?", old)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
