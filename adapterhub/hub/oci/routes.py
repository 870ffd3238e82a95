"""The routes of OCI distribution, by method and path."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from adapterhub.hub.hub import Hub

from . import blobs, manifest_handlers, read_handlers, tokens
from .oci_errors import Handler, OciError, endpoint_of

_MANIFEST = "/v2/{name:path}/manifests/{reference}"
_BLOB = "/v2/{name:path}/blobs/{digest}"
_SESSION = "/v2/{name:path}/blobs/uploads/{session}"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/v2/", tokens.ping),
    ("GET", "/v2", tokens.ping),
    ("GET", "/v2/token", tokens.token),
    ("POST", "/v2/token", tokens.token),
    ("GET", "/v2/_catalog", read_handlers.catalog),
    ("GET", _MANIFEST, read_handlers.get_manifest),
    ("PUT", _MANIFEST, manifest_handlers.put),
    ("DELETE", _MANIFEST, manifest_handlers.delete),
    ("POST", "/v2/{name:path}/blobs/uploads/", blobs.begin),
    ("POST", "/v2/{name:path}/blobs/uploads", blobs.begin),
    ("GET", _SESSION, blobs.status),
    ("PATCH", _SESSION, blobs.append),
    ("PUT", _SESSION, blobs.finish),
    ("DELETE", _SESSION, blobs.cancel),
    ("GET", _BLOB, read_handlers.get_blob),
    ("DELETE", _BLOB, blobs.delete),
    ("GET", "/v2/{name:path}/tags/list", read_handlers.tags),
    ("GET", "/v2/{name:path}/referrers/{digest}", read_handlers.referrers),
)


def routes() -> list[BaseRoute]:
    """Return the routes, in the order in which they are tried."""
    table_routes: list[BaseRoute] = [Route(path, endpoint_of(handler), methods=[method]) for method, path, handler in _ROUTES]
    # The catch-all answers in the registry's error format.
    return [*table_routes, Route("/v2/{path:path}", endpoint_of(unknown), methods=list(_METHODS))]


async def unknown(_hub: Hub, request: Request) -> Response:
    """Refuse endpoints that this registry does not have."""
    raise OciError(404, "UNSUPPORTED", f"{request.method} {request.url.path[:200]}: this registry has no such endpoint")
