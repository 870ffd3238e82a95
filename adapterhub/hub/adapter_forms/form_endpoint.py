"""What the forms share: the name in the path, the lock of the name, and errors in words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from functools import wraps

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.hf import proposing
from adapterhub.hub.hf.hf_errors import MovedError, ResponseError
from adapterhub.hub.hf.reading import name_of, visible_view
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci.oci_errors import OciError
from adapterhub.hub.web.form_requests import MAX_FORM, answer_form
from adapterhub.hub.web.site import PageRequest, redirect_to
from adapterhub.hub.workers import Worker
from adapterhub.ref import parse_name
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError

FormCheck = Callable[[PageRequest, Worker, str, dict[str, str]], object]
"""Refuses a client that may not make the change of a name that a form with these fields asks for."""
FormChange = Callable[[PageRequest, Worker, str, dict[str, str]], str]
"""The change of a name that a form with these fields asks for: returns the address to go to."""
_SETTINGS = "/-/adapters"


def settings_url(name: str) -> str:
    """Return the address of the settings of an adapter."""
    return f"{_SETTINGS}/{name}"


@contextmanager
def errors_in_words(name: str) -> Iterator[None]:
    """Turn the errors of the protocols into those that pages show."""
    try:
        yield
    except MovedError as moved:
        raise RefusedError(moved.old, f"was moved to {moved.new}", "Change it there") from moved
    except (ResponseError, OciError) as error:
        kind = NotFoundError if error.status == 404 else RefusedError
        raise kind(name, error.message.removeprefix(f"{name}: ")) from error


def check_writer(page_request: PageRequest, worker: Worker, name: str, _fields: dict[str, str]) -> None:
    """Refuse a client that does not see a name, or may not write to it."""
    visible_view(worker, page_request.hub, page_request.who, name)
    page_request.hub.access.check_write(page_request.who, name)


def change_endpoint(
    work: FormChange,
    *,
    check: FormCheck | None = check_writer,
    renames: bool = False,
    decides: bool = False,
    limit: int = MAX_FORM,
) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a form that changes the name in its path.

    Args:
        work: The change.
        check: Refuses clients before they wait for the lock of the name; None for what they change of themselves, without one.
        renames: Whether it moves the name to that of its field `to`.
        decides: Whether it decides on a proposal.
        limit: Bytes of the form.
    """

    @wraps(work)
    async def endpoint(request: Request) -> Response:
        hub: Hub = request.app.state.hub
        name = name_of(request)

        def run(page_request: PageRequest, worker: Worker, fields: dict[str, str]) -> Response:
            with errors_in_words(name):
                return redirect_to(work(page_request, worker, name, fields))

        def run_check(page_request: PageRequest, worker: Worker, fields: dict[str, str]) -> None:
            with errors_in_words(name):
                if check:
                    check(page_request, worker, name, fields)

        def lock(fields: dict[str, str]) -> AbstractAsyncContextManager[None]:
            if check is None:
                return nullcontext()
            if decides:
                return proposing.turn(hub, name)
            return hub.locks.move(name, new_name(name, fields)) if renames else hub.change(name)

        return await answer_form(request, run, check=run_check, lock=lock, limit=limit)

    return endpoint


def new_name(name: str, fields: dict[str, str]) -> str:
    """Return the other name that a form moves an adapter to."""
    text = fields.get("to", "").strip().lower()
    if text == name:
        raise ConflictError(name, "is its name already", "Choose another name")
    return parse_name(text, text[:200])
