"""Which versions of a name a gc keeps, as an entry `keep` of the name's log says, and for how long unneeded blobs."""

from __future__ import annotations

from adapterhub_converters.lazy_dataclass import dataclass

GRACE_HOURS = 24.0
"""Hours that a blob stays once no version needs it, unless a gc is told otherwise."""
_UNITS = ((7 * 86400, "week"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


@dataclass(frozen=True, slots=True)
class KeepRule:
    """The versions that stay; all others but those with a tag may go.

    Attributes:
        last: The number of newest versions.
        ttl: Seconds for which every version stays after its push; 0 for no such time.
    """

    last: int = 1
    ttl: int = 0

    def __str__(self) -> str:
        """Return the versions in words."""
        newest = f"the {self.last} newest" if self.last > 1 else "the newest" if self.last else ""
        recent = f"those of the last {_duration(self.ttl)}" if self.ttl else ""
        *parts, last_part = [part for part in (newest, recent, "tagged versions") if part]
        return f"{', '.join(parts)}{',' if len(parts) > 1 else ''} and {last_part}" if parts else last_part


def keep_rule(last: int | None, ttl: int | None) -> KeepRule | None:
    """Return the rule of two values that may be missing; None, which keeps every version, if both are."""
    if last is None and ttl is None:
        return None
    return KeepRule(1 if last is None else last, ttl or 0)


def _duration(seconds: int) -> str:
    size, unit = next((size, unit) for size, unit in _UNITS if seconds % size == 0)
    count = seconds // size
    return unit if count == 1 else f"{count} {unit}s"
