"""The routes of the API, by method and path."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from . import changing, reading, releasing
from .api_requests import PREFIX, Handler, endpoint_of

_NAME = f"{PREFIX}/names/{{namespace}}/{{repo}}"
_VERSION = f"{_NAME}/versions/{{reference}}"
_TAG = f"{_NAME}/tags/{{tag}}"
_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/api/adapterhub", reading.about),
    ("GET", f"{PREFIX}/versions", reading.versions),
    ("GET", f"{PREFIX}/search", reading.search),
    ("POST", f"{PREFIX}/find", reading.find),
    ("GET", f"{PREFIX}/usage", reading.usage),
    ("DELETE", _NAME, changing.delete_name),
    ("POST", f"{_NAME}/restore", changing.restore_name),
    ("GET", f"{_NAME}/log", reading.log),
    ("PUT", f"{_NAME}/deprecation", changing.deprecate),
    ("DELETE", f"{_NAME}/deprecation", changing.deprecate),
    ("POST", f"{_NAME}/versions", changing.publish),
    ("GET", _VERSION, reading.show),
    ("GET", f"{_VERSION}/lineage", reading.lineage),
    ("PUT", f"{_VERSION}/deprecation", changing.deprecate),
    ("DELETE", f"{_VERSION}/deprecation", changing.deprecate),
    ("POST", f"{_VERSION}/approvals", releasing.approve),
    ("PUT", f"{_VERSION}/withdrawal", releasing.withdraw),
    ("DELETE", f"{_VERSION}/withdrawal", releasing.undo_withdrawal),
    ("GET", f"{_TAG}/promotion", releasing.assess),
    ("POST", f"{_TAG}/promotion", releasing.promote),
    ("POST", f"{_TAG}/rollback", releasing.rollback),
    ("GET", _TAG, reading.tag),
    ("PUT", _TAG, changing.put_tag),
    ("DELETE", _TAG, changing.delete_tag),
    ("POST", f"{_TAG}/restore", changing.restore_tag),
    ("PUT", f"{_TAG}/protection", changing.protect),
    ("DELETE", f"{_TAG}/protection", changing.protect),
)


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [Route(path, endpoint_of(handler), methods=[method]) for method, path, handler in _ROUTES]
