"""Routes for the operator of a hub."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from adapterhub.hub.hf.hf_errors import endpoint_of

from . import health, prometheus


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [
        Route("/health", health.health),
        Route("/ready", health.ready),
        Route("/metrics", endpoint_of(prometheus.page)),
    ]
