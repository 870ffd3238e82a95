"""The routes of OAuth, by method and path."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from adapterhub.hub.hf.hf_errors import endpoint_of

from . import device, token_endpoint


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [
        Route("/oauth/device", endpoint_of(device.begin), methods=["POST"]),
        Route("/oauth/token", endpoint_of(token_endpoint.token), methods=["POST"]),
        Route("/device", device.page, methods=["GET"]),
        Route("/device", device.decide, methods=["POST"]),
    ]
