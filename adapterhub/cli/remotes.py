"""Access to remotes with the credentials of the user who runs the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError

from .options import Settings
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.remotes.protocol import OpenRemote
    from adapterhub.remotes.remote_address import RemoteAddress, UserSettings


def surroundings() -> UserSettings:
    """Return the files and variables in which credentials are kept."""
    return workspace(Settings()).surroundings()


def connect(place: RemoteAddress) -> OpenRemote:
    """Open a place; the caller closes it."""
    return workspace(Settings()).connect(place)


def unsupported_error(text: str, feature: str) -> UsageError:
    """Return the error for a feature that the remote at an address does not have."""
    with open_address(text) as remote:
        return remote.unsupported_error(feature)


def open_address(text: str) -> OpenRemote:
    """Open an address; the caller closes it."""
    from adapterhub.remotes import remote_address

    return connect(remote_address.parse(text))
