"""How bytes move to and from elsewhere: the options that push, pull and copy share, and files that are sent ahead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .progress import EVENTS, QUIET, bytes_bar

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.remotes.copy import Copied
    from adapterhub.remotes.protocol import Source, Target

_JOBS, _RATE = f"{__name__}.jobs", f"{__name__}.rate"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}


class _Rate(click.ParamType[float]):
    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([kmg]?)", str(value), re.IGNORECASE)
        rate = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
        if rate < 1:
            self.fail(f"{value!r} is no number of bytes a second; write it like 500k or 10M", param, ctx)
        return rate


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, _option: click.Parameter, value: Any) -> None:
        context.meta[key] = value

    return keep


def transfer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that moves bytes; what they say is kept for `how` and for the bars."""
    for option in (
        click.option(
            "--events",
            is_flag=True,
            expose_value=False,
            callback=_keep(EVENTS),
            help="Progress as JSON lines on stderr.",
        ),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_keep(QUIET), help="Show no progress."),
        click.option(
            "--limit-rate",
            metavar="RATE",
            type=_Rate(),
            expose_value=False,
            callback=_keep(_RATE),
            help="At most so many bytes a second, like 10M.",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(1, 32),
            default=4,
            show_default=True,
            expose_value=False,
            callback=_keep(_JOBS),
            help="Files at once.",
        ),
    ):
        function = option(function)
    return function


def how() -> dict[str, Any]:
    """What the options of the command that runs say to `copying.copy` and `folders.download`."""
    from adapterhub.remotes.parallel import Pace

    context = click.get_current_context(silent=True)
    said = context.meta if context else {}
    return {"jobs": said.get(_JOBS) or 4, "pace": Pace(said.get(_RATE))}


class Ahead:
    """Has large files sent while they are hashed, where a place can take them so and surely has none of them."""

    def __init__(self, remote: Target, host: str) -> None:
        self._remote, self._host = remote, host
        self._may: bool | None = None if hasattr(remote, "put_unnamed") else False
        self._sent = 0

    def __call__(self, path: str, size: int, source: Source) -> Digest | None:
        """The digest of a file that was sent; None where it has to be hashed first."""
        remote: Any = self._remote
        if self._may is None:
            self._may = remote.is_new()
        if not self._may:
            return None
        from adapterhub.manifest.oci_manifest import Descriptor
        from adapterhub.remotes.parallel import Move

        with bytes_bar(f"copying to {self._host}") as show:
            move = Move([Descriptor("", "", size, path)], show, pace=how()["pace"])
            digest = str(remote.put_unnamed(size, path, move.watched(source)))
        self._sent += size
        return digest

    def added(self, copied: Copied) -> Copied:
        """What was copied, with what was sent ahead."""
        from dataclasses import replace

        return replace(copied, sent=copied.sent + self._sent)
