"""The routes of pages, by method and path. Anything but adapters is below /-/, which cannot be the name of a namespace."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import NotFoundError

from . import adapter_pages, admin, browsing, compare, signing_in
from .site import SIGN_IN, Page, PageRequest, page_endpoint, static

_NAME = "/{namespace}/{repo}"
_VERSION = f"{_NAME}/v{{number}}"


def _unknown(page_request: PageRequest, _worker: Worker) -> Page:
    raise NotFoundError(page_request.path[:200], "there is no such page")


def routes() -> list[BaseRoute]:
    """Return the routes, in the order in which they are tried; the last one matches everything."""
    return [
        Route("/", page_endpoint(browsing.search_page)),
        Route("/-/static/{digest}/{name}", static),
        Route("/-/bases", page_endpoint(browsing.bases_page)),
        Route("/login", signing_in.login),
        Route(SIGN_IN, page_endpoint(signing_in.sign_in_page, public=True)),
        Route(SIGN_IN, signing_in.sign_in, methods=["POST"]),
        Route(signing_in.PROVIDER, signing_in.leave),
        Route(signing_in.BACK, signing_in.arrive),
        Route("/-/sign-out", signing_in.sign_out, methods=["POST"]),
        Route("/-/admin", page_endpoint(admin.admin_page)),
        Route("/-/admin/settle", admin.settle, methods=["POST"]),
        Route("/-/admin/revoke", admin.revoke, methods=["POST"]),
        Route(f"{_NAME}/tree/{{revision}}", page_endpoint(adapter_pages.revision)),
        Route(f"{_NAME}/tree/{{revision}}/{{path:path}}", page_endpoint(adapter_pages.revision)),
        Route(f"{_NAME}/blob/{{revision}}/{{path:path}}", page_endpoint(adapter_pages.revision)),
        Route(f"{_NAME}/commit/{{revision}}", page_endpoint(adapter_pages.revision)),
        Route(f"{_NAME}/versions", page_endpoint(adapter_pages.versions_page)),
        Route(f"{_NAME}/compare", compare.compare_page),
        Route(_VERSION, page_endpoint(adapter_pages.adapter_page)),
        Route(f"{_VERSION}/tensors", page_endpoint(adapter_pages.tensors_page)),
        Route(f"{_VERSION}/heat.svg", adapter_pages.heat_picture),
        Route(f"{_VERSION}/norms", adapter_pages.norms_page),
        Route(f"{_VERSION}/lineage", page_endpoint(adapter_pages.lineage_page)),
        Route(_NAME, page_endpoint(adapter_pages.adapter_page)),
        Route("/{namespace}", page_endpoint(browsing.namespace_page)),
        Route("/{path:path}", page_endpoint(_unknown)),
    ]
