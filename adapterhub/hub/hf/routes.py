"""The routes of the Hugging Face Hub's API, by method and path."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from . import (
    access_requests,
    accounts,
    discussions,
    headers,
    lfs,
    likes,
    proposing,
    reading,
    repositories,
    upstream_reading,
    writing,
)
from .hf_errors import Handler, endpoint_of

_MODEL = "/api/models/{namespace}/{repo}"
_GET: dict[str, Handler] = {
    "/api/agent-harnesses": accounts.agent_harnesses,
    "/api/whoami-v2": accounts.whoami,
    "/api/models": reading.list_models,
    "/api/users/{namespace}/overview": reading.overview,
    "/api/organizations/{namespace}/overview": reading.overview,
    "/api/models-tags-by-type": reading.tags_by_type,
    "/api/users/{namespace}/likes": likes.liked,
    _MODEL: reading.model_info,
    f"{_MODEL}/revision/{{revision}}": reading.model_info,
    f"{_MODEL}/tree/{{revision}}": reading.tree,
    f"{_MODEL}/tree/{{revision}}/{{path:path}}": reading.tree,
    f"{_MODEL}/refs": reading.refs,
    f"{_MODEL}/discussions": discussions.list_discussions,
    f"{_MODEL}/discussions/{{number}}": discussions.discussion,
    f"{_MODEL}/commits/{{revision}}": reading.history,
    f"{_MODEL}/safetensors-metadata/{{path:path}}": headers.headers,
    f"{_MODEL}/auth-check": accounts.auth_check,
    f"{_MODEL}/likers": likes.likers,
    f"{_MODEL}/user-access-request/{{status}}": access_requests.list_requests,
    "/{namespace}/{repo}/resolve/{revision}/{path:path}": reading.resolve,
    "/{namespace}/{repo}/raw/{revision}/{path:path}": reading.resolve,
    "/{namespace}/{repo}/info/refs": accounts.git,
    "/lfs/{namespace}/{repo}/{oid}": lfs.get,
    "/api/telemetry/{path:path}": accounts.nothing,
    "/api/models/{repo}": reading.without_namespace,
    "/api/models/{repo}/revision/{revision}": reading.without_namespace,
    "/api/models/{repo}/tree/{revision}": reading.without_namespace,
    "/api/models/{repo}/tree/{revision}/{path:path}": reading.without_namespace,
    "/{repo}/resolve/{revision}/{path:path}": reading.without_namespace,
}
_POST: dict[str, Handler] = {
    f"{_MODEL}/paths-info/{{revision}}": reading.paths_info,
    "/api/models/{repo}/paths-info/{revision}": reading.without_namespace,
    "/api/repos/create": repositories.create,
    "/api/repos/move": repositories.move,
    "/api/validate-yaml": repositories.validate_yaml,
    f"{_MODEL}/branch/{{branch}}": repositories.create_branch,
    f"{_MODEL}/tag/{{revision}}": repositories.create_tag,
    f"{_MODEL}/preupload/{{revision}}": writing.preupload,
    f"{_MODEL}/commit/{{revision}}": writing.commit,
    f"{_MODEL}/discussions": proposing.create,
    f"{_MODEL}/discussions/{{number}}/merge": discussions.merge,
    f"{_MODEL}/discussions/{{number}}/status": discussions.set_status,
    f"{_MODEL}/super-squash/{{branch}}": writing.squash,
    f"{_MODEL}/like": likes.like,
    f"{_MODEL}/ask-access": access_requests.ask_access,
    "/{namespace}/{repo}/ask-access": access_requests.ask_access,
    f"{_MODEL}/user-access-request/handle": access_requests.handle,
    f"{_MODEL}/user-access-request/grant": access_requests.grant,
    "/{namespace}/{repo}.git/info/lfs/objects/batch": lfs.batch,
    "/lfs/{namespace}/{repo}/{oid}": lfs.verify,
}
_PUT: dict[str, Handler] = {
    f"{_MODEL}/settings": repositories.settings,
    "/lfs/{namespace}/{repo}/{oid}": lfs.put,
}
_DELETE: dict[str, Handler] = {
    "/api/repos/delete": repositories.delete,
    f"{_MODEL}/like": likes.like,
    f"{_MODEL}/branch/{{branch}}": repositories.delete_branch,
    f"{_MODEL}/tag/{{revision}}": repositories.delete_tag,
}
_WITH_NAMESPACE: dict[str, Handler] = {
    _MODEL: upstream_reading.model_info,
    f"{_MODEL}/revision/{{revision}}": upstream_reading.model_info,
    f"{_MODEL}/tree/{{revision}}": upstream_reading.tree,
    f"{_MODEL}/tree/{{revision}}/{{path:path}}": upstream_reading.tree,
    f"{_MODEL}/refs": upstream_reading.refs,
    f"{_MODEL}/commits/{{revision}}": upstream_reading.history,
    f"{_MODEL}/safetensors-metadata/{{path:path}}": upstream_reading.redirected,
    "/{namespace}/{repo}/resolve/{revision}/{path:path}": upstream_reading.resolve,
    "/{namespace}/{repo}/raw/{revision}/{path:path}": upstream_reading.resolve,
    f"{_MODEL}/paths-info/{{revision}}": upstream_reading.paths_info,
}
# What answers for a model that is not here, by path.
_UPSTREAM = {**_WITH_NAMESPACE, **{path.replace("{namespace}/", ""): handler for path, handler in _WITH_NAMESPACE.items()}}

# Files of what this hub does not have, at addresses that no adapter can have.
_OTHERS = (
    *(f"/{kind}/{{namespace}}/{{repo}}/resolve/{{path:path}}" for kind in ("datasets", "spaces", "buckets", "kernels")),
    "/papers/{paper:float}.md",
)


def routes() -> list[BaseRoute]:
    """Return the routes, in the order in which they are tried."""
    tables = {"GET": _GET, "POST": _POST, "PUT": _PUT, "DELETE": _DELETE}
    table_routes: list[BaseRoute] = [
        Route(path, endpoint_of(handler, _UPSTREAM.get(path)), methods=[method])
        for method, table in tables.items()
        for path, handler in table.items()
    ]
    return [
        *table_routes,
        *(Route(path, endpoint_of(accounts.unknown)) for path in _OTHERS),
        Route("/uploads", endpoint_of(accounts.unknown), methods=["POST"]),
        Route("/api/{path:path}", endpoint_of(accounts.unknown), methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
