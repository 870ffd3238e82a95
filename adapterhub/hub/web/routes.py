"""The routes of pages, by method and path. Anything but adapters is below /-/, which cannot be the name of a namespace."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import NotFoundError

from . import adapters, admin, browsing, compare, signing_in
from .site import SIGN_IN, Asked, Page, showing, static

_NAME = "/{namespace}/{repo}"
_VERSION = f"{_NAME}/v{{number}}"


def _unknown(page_request: Asked, _worker: Worker) -> Page:
    raise NotFoundError(page_request.path[:200], "there is no such page")


def routes() -> list[BaseRoute]:
    """Return the routes, in the order in which they are tried; the last one matches everything."""
    return [
        Route("/", showing(browsing.search_page)),
        Route("/-/static/{digest}/{name}", static),
        Route("/-/bases", showing(browsing.bases_page)),
        Route("/login", signing_in.login),
        Route(SIGN_IN, showing(signing_in.sign_in_page, public=True)),
        Route(SIGN_IN, signing_in.sign_in, methods=["POST"]),
        Route(signing_in.PROVIDER, signing_in.leave),
        Route(signing_in.BACK, signing_in.arrive),
        Route("/-/sign-out", signing_in.sign_out, methods=["POST"]),
        Route("/-/admin", showing(admin.admin_page)),
        Route("/-/admin/settle", admin.settle, methods=["POST"]),
        Route("/-/admin/revoke", admin.revoke, methods=["POST"]),
        Route(f"{_NAME}/tree/{{revision}}", showing(adapters.revision)),
        Route(f"{_NAME}/tree/{{revision}}/{{path:path}}", showing(adapters.revision)),
        Route(f"{_NAME}/blob/{{revision}}/{{path:path}}", showing(adapters.revision)),
        Route(f"{_NAME}/commit/{{revision}}", showing(adapters.revision)),
        Route(f"{_NAME}/versions", showing(adapters.versions_page)),
        Route(f"{_NAME}/compare", compare.compare_page),
        Route(_VERSION, showing(adapters.adapter_page)),
        Route(f"{_VERSION}/tensors", showing(adapters.tensors_page)),
        Route(f"{_VERSION}/heat.svg", adapters.heat_picture),
        Route(f"{_VERSION}/norms", adapters.norms_page),
        Route(f"{_VERSION}/lineage", showing(adapters.lineage_page)),
        Route(_NAME, showing(adapters.adapter_page)),
        Route("/{namespace}", showing(browsing.namespace_page)),
        Route("/{path:path}", showing(_unknown)),
    ]
