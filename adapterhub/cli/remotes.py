"""Access to remotes with the credentials of the user who runs the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError

from .environment import workspace
from .options import Settings

if TYPE_CHECKING:
    from adapterhub.remotes.location import Place, Surroundings
    from adapterhub.remotes.protocol import Connected


def surroundings() -> Surroundings:
    """Return the files and variables in which credentials are kept."""
    return workspace(Settings()).surroundings()


def connect(place: Place) -> Connected:
    """Open a place; the caller closes it."""
    return workspace(Settings()).connect(place)


def lacking(text: str, what: str) -> UsageError:
    """Return the error for a feature that the remote at an address does not have."""
    with opened(text) as remote:
        return remote.lacking(what)


def opened(text: str) -> Connected:
    """Open an address; the caller closes it."""
    from adapterhub.remotes import location

    return connect(location.parse(text))
