"""What a gateway reads again while it runs: its routes and keys, and the policies of the project and of the registry."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from adapterhub.project import PROJECT
from adapterhub.workspace import project_file
from adapterhub_converters.errors import AdapterhubError

from . import route_file
from .route_file import Routes
from .settings import GatewaySettings

log = logging.getLogger("adapterhub.serve")
Stamps = tuple[tuple[int, int, int] | None, ...]


class Rules:
    """The routes and the policy, as they were read last.

    Attributes:
        routes: Those of the file of routes.
        policy: What the function of the workspace returned, which reads the project's file.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._read = self._before = self._stamps()
        self.routes = route_file.read(settings.routes) if settings.routes else Routes()
        self.policy = settings.workspace.rules()

    def read(self) -> None:
        """Read both again; what is malformed changes nothing."""
        self._read = self._stamps()
        if self._settings.routes is not None:
            try:
                self.routes = route_file.read(self._settings.routes, self.routes)
            except AdapterhubError as error:
                log.error("the routes stay as they were: %s", error)
            else:
                log.info("%d routes and %d keys", len(self.routes.routes), len(self.routes.keys))
        try:
            before, self.policy = self.policy, self._settings.workspace.rules()
        except AdapterhubError as error:
            log.error("the policy stays as it was: %s", error)
        else:
            if before != self.policy:
                log.info("the policy has changed")

    def have_changed(self) -> bool:
        """Whether a file is another than was read, and the same as at the last look: nobody writes it just now."""
        before, self._before = self._before, self._stamps()
        return self._read != self._before == before

    def _stamps(self) -> Stamps:
        return tuple(map(_stamp, (self._settings.routes, *self._policies())))

    def _policies(self) -> Iterator[Path | None]:
        """The files of the policies: that of the project, and that of the registry, which is read with each version."""
        with suppress(OSError):  # the working folder is gone
            yield project_file(Path.cwd())
        with suppress(OSError, AdapterhubError):
            yield self._settings.workspace.folder() / PROJECT


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    with suppress(OSError):
        if path is not None:
            found = path.stat()
            return found.st_ino, found.st_size, found.st_mtime_ns
    return None
