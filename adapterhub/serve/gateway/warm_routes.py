"""The targets of routes that are warm or pinned: loaded before the first request, and pinned ones never displaced."""

from __future__ import annotations

import logging

from adapterhub.ref import Ref
from adapterhub.serve.engines import EngineDownError
from adapterhub_converters.errors import AdapterhubError

from .engine_versions import EngineVersions
from .lookup import Lookup, ResolvedVersion
from .openai_errors import ProblemError
from .route_file import Routes

log = logging.getLogger("adapterhub.serve")


class WarmRoutes:
    """The versions that warm and pinned routes mean, as last loaded into the engine."""

    def __init__(self, lookup: Lookup, versions: EngineVersions) -> None:
        self._lookup, self._versions = lookup, versions
        self._seen: dict[Ref, str] = {}  # the version that each ref meant, or why it could not be loaded
        self._told = ""

    async def refresh(self, routes: Routes) -> None:
        """Load the versions that warm routes mean now, unless that was tried before, and pin those of pinned routes."""
        pinned = dict.fromkeys(ref for route in routes.routes.values() if route.pin for ref in route.refs())
        warm = pinned | dict.fromkeys(ref for route in routes.routes.values() if route.warm for ref in route.refs())
        self._seen = {ref: seen for ref, seen in self._seen.items() if ref in warm}
        versions = {ref: version for ref in warm if (version := await self._find(ref))}
        to_pin = dict.fromkeys(version.model for ref, version in versions.items() if ref in pinned)
        room = self._versions.max_adapters - 1  # for the requests of all others
        self._versions.pin(frozenset([*to_pin][:room]))
        self._tell(len(to_pin), room)
        for ref, version in [*versions.items()][: self._versions.max_adapters]:
            if self._seen.get(ref) != version.model:
                self._seen[ref] = version.model
                await self._load(version)

    async def _find(self, ref: Ref) -> ResolvedVersion | None:
        try:
            return await self._lookup.find(ref)
        except AdapterhubError as error:
            if self._seen.get(ref) != str(error):
                log.warning("a warm route waits for its version: %s", error)
            self._seen[ref] = str(error)
            return None

    async def _load(self, version: ResolvedVersion) -> None:
        try:
            async with self._versions.use([(version, 1.0)]):
                pass
        except (AdapterhubError, EngineDownError, ProblemError) as error:
            log.warning("%s cannot be made ready: %s", version.model, error)

    def _tell(self, count: int, room: int) -> None:
        """Log that more versions are pinned than there is room for, once for each number."""
        text = f"{count} versions are pinned, and the engine has room for {room} of them" if count > room else ""
        if text and text != self._told:
            log.error("%s; the others may be displaced", text)
        self._told = text
