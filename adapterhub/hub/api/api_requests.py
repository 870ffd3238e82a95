"""Requests and errors of the API: the name and version of a path, and errors that a client can raise again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.http_server.request_bodies import BodyError
from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View
from adapterhub.hub.hf.hf_errors import MovedError, ResponseError, error_response, failure_response
from adapterhub.hub.hf.reading import path_part
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci.oci_errors import OciError
from adapterhub.hub.workers import Worker
from adapterhub.ref import LATEST, Ref, is_name
from adapterhub.remotes.answer_fields import DENIED, ERROR_KINDS
from adapterhub.remotes.local_catalog import LocalCatalog, Visibility
from adapterhub_converters.display import printable
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    NotFoundError,
    RefusedError,
    UsageError,
)

PREFIX = "/api/adapterhub/v1"
DRY_RUN = "dry_run"
"""A parameter of the query: the change is only rehearsed, and answered as if it were made."""
_MAX_FIELD = 300  # characters of a text in an error
_MAX_UNLISTED = 64 << 20  # bytes of weights that one request may have read for their tensors
_NO_NAME = "-/-"  # a valid path, and no valid name
Handler = Callable[[Hub, Request], Awaitable[Response]]
_OCI_ERRORS: dict[int, type[AdapterhubError]] = {404: NotFoundError, 409: ConflictError}
_FAILURES = (BodyError, OciError, ResponseError, NoTokenError, ForbiddenError, AdapterhubError)


def endpoint_of(handler: Handler, *, rehearses: bool) -> Callable[[Request], Awaitable[Any]]:
    """Return the endpoint of a handler, with its errors turned into responses, which `rehearses` if it is asked to."""

    @wraps(handler)
    async def endpoint(request: Request) -> Any:
        try:
            if not rehearses and request.method not in ("GET", "HEAD") and is_set(request, DRY_RUN):
                raise UsageError(DRY_RUN, "is for changes of names, tags and versions", "Leave it out to make the change")
            return await handler(request.app.state.hub, request)
        except MovedError as moved:
            if request.method in ("GET", "HEAD"):
                return moved.response(request)
            # Clients send no body again to another address, so whoever changes something is told the name.
            error: Exception = RefusedError(moved.old, f"was moved to {moved.new}", f"Write {moved.new}")
        except _FAILURES as failure:
            error = failure
        return _error_response(error, has_condition="if-match" in request.headers)

    return endpoint


def is_set(request: Request, key: str) -> bool:
    """Return whether a parameter of the query is true."""
    return request.query_params.get(key, "").lower() in ("true", "1")


def _error_response(failure: Exception, *, has_condition: bool) -> Response:
    """Return the response to an error, with its parts if the request is at fault."""
    if isinstance(failure, BodyError):
        return error_response(failure.status, str(failure), headers=failure.headers())
    if isinstance(failure, OciError):
        where, _, what = failure.message.partition(": ")
        failure = _OCI_ERRORS.get(failure.status, RefusedError)(where, what)
    response = failure_response(failure)
    if isinstance(failure, ForbiddenError):
        return JSONResponse({"error": str(failure), "kind": DENIED, "what": str(failure)}, 403, _message_header(response))
    kind = next((kind for kind, cls in ERROR_KINDS.items() if isinstance(failure, cls)), "")
    if not isinstance(failure, AdapterhubError) or not kind or response.status_code >= 500:
        return response
    status = 412 if has_condition and kind == "conflict" else response.status_code
    fields = {key: printable(value)[:_MAX_FIELD] for key, value in failure.fields.items() if isinstance(value, str)}
    parts = {key: printable(text)[:2000] for key, text in vars(failure).items() if key in ("where", "what", "hint", "code")}
    document = {"error": printable(str(failure))[:2000], "kind": kind, **parts, "fields": fields}
    return JSONResponse(document, status, _message_header(response))


def _message_header(response: Response) -> dict[str, str]:
    return {"x-error-message": response.headers.get("x-error-message", "")}


def name_of(request: Request) -> str:
    """Return the name in a path, which may be no valid one."""
    return f"{path_part(request, 'namespace')}/{path_part(request, 'repo')}"


def tag_of(request: Request) -> str:
    """Return the tag in a path."""
    return path_part(request, "tag")


def ref_of(request: Request, name: str) -> Ref:
    """Return the version in a path: a tag, `v3`, a range, or a digest or its first digits; the newest without one."""
    return ref_to(name, path_part(request, "reference") or LATEST)


def ref_to(name: str, reference: str) -> Ref:
    """Return the ref of a version of a name; RefError for an invalid reference."""
    return Ref.parse(f"{name}{'@' if reference.startswith('sha256:') else ':'}{reference}")


def visible_view(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> View:
    """Return a repository with versions that the client may see.

    Raises:
        NotFoundError: There is none, or it is hidden from the client, or the name is an alias of another repository.
        MovedError: It has another name now.
    """
    view = hub.visible(worker, identity, name)
    if view is not None and view.repository and view.repository.moved_to:
        if hub.visible(worker, identity, view.repository.moved_to) is None:
            raise _no_such_adapter(name)
        raise MovedError(name, view.repository.moved_to)
    if view is None or view.newest is None or view.frozen:
        raise _removed(name) if _is_removed(worker, hub, identity, name) else _no_such_adapter(name)
    return view


def _is_removed(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> bool:
    """Return whether a name was removed that the client could see."""
    if not is_name(name):
        return False
    # A hidden name looks up one that cannot exist, so that it takes as long as a missing one.
    is_visible = hub.may_read_name(worker, identity, name)
    return worker.registry.ledger.current(name if is_visible else _NO_NAME).deleted


def _removed(name: str) -> NotFoundError:
    return NotFoundError(name, "was removed", "Restore it", code="removed", name=name)


def check_known(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> None:
    """Raise NotFoundError unless a name has a log that the client may see: that of an adapter, or of a removed one."""
    if not is_name(name):
        raise _no_such_adapter(name)
    repository = worker.repositories.get(name)
    if repository and repository.moved_to and hub.may_read(worker, identity, name, repository):
        visible_view(worker, hub, identity, name)  # raises MovedError
    # A hidden name looks up one that cannot exist, so that it takes as long as a missing one.
    is_visible = hub.may_read(worker, identity, name, repository)
    if worker.registry.ledger.current(name if is_visible else _NO_NAME).seq == 0:
        raise _no_such_adapter(name)


def _no_such_adapter(name: str) -> NotFoundError:
    # Without a similar name, which the client might not be allowed to know.
    return NotFoundError(name[:210], "no such adapter", code="no-such-adapter")


def check_reader(hub: Hub, identity: Identity | None) -> None:
    """Raise NoTokenError for a stranger at a hub that requires a login."""
    if identity is None and hub.access.require_login:
        raise NoTokenError


def catalog_for(worker: Worker, hub: Hub, identity: Identity | None) -> LocalCatalog:
    """Return the catalog of what a client may see."""
    decisions: dict[str, bool] = {}
    may_read = partial(hub.may_read_name, worker, identity)

    def sees(name: str) -> bool:
        if name not in decisions:
            decisions[name] = may_read(name)
        return decisions[name]

    return LocalCatalog(worker.registry, Visibility(sees, hub.hidden_names(worker, identity), _MAX_UNLISTED))
