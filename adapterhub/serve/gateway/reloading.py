"""The files that a gateway reads again while it runs: routes and keys, and the policies of the project and the registry."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from adapterhub.http_server.watched_files import WatchedFiles
from adapterhub.operations.workspace import project_file
from adapterhub.project import PROJECT
from adapterhub_converters.errors import AdapterhubError

from . import route_file
from .gateway_settings import GatewaySettings
from .route_file import Routes

log = logging.getLogger("adapterhub.serve")


class Rules:
    """The routes and the policy, as last read.

    Attributes:
        routes: The contents of the route file.
        policy: The result of the workspace's function that reads the project's file.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._files = WatchedFiles(lambda: (settings.routes, *self._policies()))
        self.routes = route_file.read(settings.routes) if settings.routes else Routes()
        self.policy = settings.workspace.rules()

    def read(self) -> None:
        """Read both again; a malformed file leaves its part unchanged."""
        self._files.mark_read()
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
        """Return whether a file has changed since it was read, and nobody is still writing it."""
        return self._files.have_changed()

    def _policies(self) -> Iterator[Path | None]:
        """Yield the policy files of the project and of the registry; the latter is read with each version."""
        with suppress(OSError):  # the working folder may be gone
            yield project_file(Path.cwd())
        with suppress(OSError, AdapterhubError):
            yield self._settings.workspace.folder() / PROJECT
