"""Names that stand for one version or one form of another repository, as read-only repositories of their own.

`team/sql.v3` is version 3 of `team/sql`, forever: a name that fits where a revision does not, as in a server that loads an
adapter by its name alone. `team/sql.gguf` is the newest version as a GGUF, and `team/sql.v3.mlx` version 3 as mlx-lm has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_converters import linear
from adapterhub_converters.errors import RefusedError

_ALIAS = linear.Pattern(r"(.+?)(?:\.v([1-9][0-9]{0,7}))?(?:\.(gguf|mlx))?")


@dataclass(frozen=True, slots=True)
class Alias:
    """What a name stands for.

    Attributes:
        name: The repository.
        number: A version of it; 0 for the newest.
        form: The format that the version is converted to, empty for its own.
    """

    name: str
    number: int = 0
    form: str = ""

    @property
    def source(self) -> str:
        """The name of what is converted."""
        return f"{self.name}.v{self.number}" if self.number else self.name


def parse(name: str) -> Alias | None:
    """What a name stands for; None for one that is only a name."""
    found = _ALIAS.fullmatch(name) if "." in name else None
    if not found or not (found[2] or found[3]):
        return None
    return Alias(found[1], int(found[2] or 0), found[3] or "")


def check_own(name: str) -> None:
    """Refuse a name that stands for another repository, before anything is written to it."""
    if parse(name) is not None:
        what = "stands for a version or a format of another repository, and is read only"
        raise RefusedError(name, what, "Choose a name without that ending")
