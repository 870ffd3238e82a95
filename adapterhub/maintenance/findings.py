"""The findings of a registry check, and the hints they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check.

    Attributes:
        code: Kind of finding, a stable name.
        severity: `error` if promised data is affected, else `note`.
        where: File or ref.
        what: The problem.
        hint: How to fix it.
        remedy: Stable name of the hint, like the `code` of an error; empty where none is needed.
        fields: The values that the hint names, like the `fields` of an error.
    """

    code: str
    severity: Literal["error", "note"]
    where: str
    what: str
    hint: str = ""
    remedy: str = ""
    fields: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f". {self.hint}" if self.hint else "")


Findings = list[Finding]

# Each pair: a hint, and its stable name.
GC = ("A gc removes what is old enough", "collect-garbage")
REPAIR = (
    "Repair it from another registry or the adapter's folder, or delete the file and push the same files again",
    "repair",
)
REPAIR_MISSING = ("Repair it from another registry or the adapter's folder, or push the same files again", "repair-missing")
REBUILD = ("Rebuild the index", "rebuild-index")
