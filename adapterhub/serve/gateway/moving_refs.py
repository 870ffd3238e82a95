"""Refs that may move: those of routes and those asked for lately, looked at again and again, so that a move is prepared."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import field

from adapterhub.digest import Digest
from adapterhub.ref import Ref
from adapterhub.serve import model_names
from adapterhub.serve.engines import EngineDownError
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from .engine_versions import EngineVersions
from .lookup import Lookup, ResolvedVersion
from .metrics import Metrics
from .route_file import Route

log = logging.getLogger("adapterhub.serve")
_MAX_WATCHED = 64  # moving refs that are watched, the most recently requested ones
_WATCH_SECONDS = 600.0  # seconds that a ref is watched after its last request


@dataclass(slots=True)
class _WatchedRef:
    """A moving ref, the digest it meant last, and the time it was last asked for."""

    ref: Ref
    digest: Digest | None = None
    asked_at: float = field(default_factory=time.monotonic)


class MovingRefs:
    """The refs that a gateway watches."""

    def __init__(self, lookup: Lookup, versions: EngineVersions, metrics: Metrics) -> None:
        self._lookup, self._versions, self._metrics = lookup, versions, metrics
        self._watched: OrderedDict[str, _WatchedRef] = OrderedDict()

    async def find(self, ref: Ref) -> ResolvedVersion:
        """Look up a ref, and watch it from now on if it may move."""
        version = await self._lookup.find(ref)
        if model_names.is_moving(ref):
            watched = self._watched.setdefault(str(ref), _WatchedRef(ref))
            watched.asked_at, watched.digest = time.monotonic(), version.digest
            self._watched.move_to_end(str(ref))
            if len(self._watched) > _MAX_WATCHED:
                self._watched.popitem(last=False)
        return version

    async def refresh(self, routes: Iterable[Route]) -> None:
        """Look up all watched refs and those of routes, and prepare the versions that they have moved to."""
        for watched in self._refs_to_watch(routes):
            try:
                await self._check_moved(watched)
            except (AdapterhubError, EngineDownError):
                pass  # requests will report it
            except Exception:
                log.exception("%s cannot be checked; it will be tried again", watched.ref)

    def _refs_to_watch(self, routes: Iterable[Route]) -> list[_WatchedRef]:
        """Return the moving refs to check: those of routes, and those asked for recently."""
        for route in list(routes)[:_MAX_WATCHED]:
            for ref in route.refs():
                self._watched.setdefault(str(ref), _WatchedRef(ref)).asked_at = time.monotonic()
        since = time.monotonic() - _WATCH_SECONDS
        for name in [name for name, watched in self._watched.items() if watched.asked_at < since]:
            del self._watched[name]
        return [*self._watched.values()]

    async def _check_moved(self, watched: _WatchedRef) -> None:
        """Check whether a ref has moved, and prepare its new version."""
        version = await self._lookup.find(watched.ref)
        if version.digest == watched.digest:
            return
        if watched.digest is not None:
            self._metrics.moves.inc()
            fields = {"ref": str(watched.ref), "version": version.model}
            log.info("%s is %s now", watched.ref, version.digest, extra={"fields": fields})
        watched.digest = version.digest
        await self._versions.prefetch(version)
