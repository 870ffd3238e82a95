"""Aliases: names that refer to one version or one format of another repository, as read-only repositories of their own.

`team/sql.v3` is version 3 of `team/sql`, forever: useful where a name fits but a revision does not, as in a server that loads
an adapter by name alone. `team/sql.gguf` is the newest version as a GGUF file, `team/sql.v3.mlx` version 3 in mlx-lm's format.
"""

from __future__ import annotations

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

_ALIAS = safe_regex.Pattern(r"(.+?)(?:\.v([1-9][0-9]{0,7}))?(?:\.(gguf|mlx))?")


@dataclass(frozen=True, slots=True)
class Alias:
    """The version and format a name refers to.

    Attributes:
        name: The repository.
        number: The version; 0 for the newest.
        form: The format the version is converted to; empty for its own.
    """

    name: str
    number: int = 0
    form: str = ""

    @property
    def source(self) -> str:
        """The name of the repository before the conversion."""
        return f"{self.name}.v{self.number}" if self.number else self.name


def parse(name: str) -> Alias | None:
    """Return what a name refers to as an alias; None for an ordinary name."""
    # Most names have no dot and need no regular expression.
    match = _ALIAS.fullmatch(name) if "." in name else None
    if not match or not (match[2] or match[3]):
        return None
    return Alias(match[1], int(match[2] or 0), match[3] or "")


def check_writable_name(name: str) -> None:
    """Refuse to write to an alias, before anything is written."""
    if parse(name) is not None:
        problem = "is an alias for a version or a format of another repository, and is read-only"
        raise RefusedError(name, problem, "Choose a name without that ending")
