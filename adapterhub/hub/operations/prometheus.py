"""Metrics for Prometheus: requests by route template, their times and bytes, uploads, versions, storage, the process.

No label is the name of an adapter or an account: one tenant learns nothing about another, and the number of series is bounded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.hf.hf_errors import ResponseError
from adapterhub.hub.hub import Hub
from adapterhub.hub.timed_value import TimedValue
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import RegistryTotals

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_SUMS_TTL = 30.0  # seconds for which sums over the registry are reused


class Metrics:
    """The metrics of one hub.

    Attributes:
        registry: What anybody may see who may ask: requests and the process.
        sums: Sums over all names, hidden ones too, and what the hub works on: they would tell whether bytes are here already.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self.registry, self.sums = CollectorRegistry(), CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hub_requests", "Requests.", ("method", "route", "status"), **options)
        self.seconds = Histogram(
            "hub_request_seconds", "Time until the end of the answer.", ("route",), buckets=_SECONDS, **options
        )
        self.received = Counter("hub_received_bytes", "Bytes of bodies that arrived.", **options)
        self.sent = Counter("hub_sent_bytes", "Bytes of bodies that were sent.", **options)
        ProcessCollector(**options)
        options = {"registry": self.sums}
        self.uploads = Gauge("hub_uploads_open", "Uploads that have begun and not ended.", **options)
        self.versions = Gauge("hub_versions", "Versions of adapters.", **options)
        self.names = Gauge("hub_names", "Names that have versions.", **options)
        self.stored = Gauge("hub_stored_bytes", "Bytes of the distinct files of all versions.", **options)
        self.free = Gauge("hub_disk_free_bytes", "Bytes that are free on the disk of the store.", **options)
        self._paths = {route.endpoint: route.path for route in routes if isinstance(route, Route)}
        self._labeled: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._totals = TimedValue[RegistryTotals](_SUMS_TTL)

    def path(self, scope: Scope) -> str:
        """Return the template of the route that answers a request."""
        return self._paths.get(scope["endpoint"], "other") if "endpoint" in scope else "other"

    def count(self, scope: Scope, status: int, seconds: float, *, received: int, sent: int) -> None:
        """Count an answered request, with the bytes of its body and of the response's."""
        key = scope["method"] if scope["method"] in _METHODS else "other", self.path(scope), status
        # `labels` takes a lock and builds strings: too much for each request.
        labeled = self._labeled.get(key)
        if labeled is None:
            labeled = self._labeled[key] = self.requests.labels(*key), self.seconds.labels(key[1])
        labeled[0].inc()
        labeled[1].observe(seconds)
        if received:
            self.received.inc(received)
        if sent:
            self.sent.inc(sent)

    async def page(self, hub: Hub, *, with_sums: bool) -> bytes:
        """Return the metrics as text."""
        page: bytes = await hub.workers.read(generate_latest, self.registry)
        if not with_sums:
            return page
        self.uploads.set(hub.uploads.count)
        await hub.workers.run(self._sum)
        sums: bytes = await hub.workers.read(generate_latest, self.sums)
        return page + sums

    def _sum(self, worker: Worker) -> None:
        # They read the whole index, and several servers of Prometheus may scrape at once.
        totals = self._totals.get(lambda: queries.registry_totals(worker.registry.index))
        self.names.set(totals.names)
        self.versions.set(totals.versions)
        self.stored.set(totals.bytes)
        self.free.set(shutil.disk_usage(worker.registry.root).free)


class MetricsMiddleware:
    """Middleware that times and counts every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, started, status, counted, received, sent = self._metrics, time.monotonic(), 500, False, 0, 0

        async def count_received() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def count_sent(message: Message) -> None:
            nonlocal status, counted, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent += len(message.get("body", b""))
                if not message.get("more_body"):
                    counted = True  # count before the last byte is sent: a client that then reads the metrics finds its request
                    metrics.count(scope, status, time.monotonic() - started, received=received, sent=sent)
            await send(message)

        try:
            await self._app(scope, count_received, count_sent)
        finally:
            if not counted:
                metrics.count(scope, status, time.monotonic() - started, received=received, sent=sent)


async def page(hub: Hub, request: Request) -> Response:
    """GET /metrics; needs a token where everything else does, and one that reads everything for the sums over all names."""
    identity = hub.identify(request)
    if identity is None and hub.access.require_login:
        raise ResponseError(401, "", "the metrics of this hub need a token")
    metrics: Metrics = request.app.state.metrics
    with_sums = identity is not None and identity.has_role("read", EVERYWHERE)
    return Response(await metrics.page(hub, with_sums=with_sums), media_type=_TYPE)
