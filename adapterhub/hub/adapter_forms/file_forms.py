"""Forms that commit files to `main`, or propose them: the card, as it was edited on a page, and uploaded files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import NoReturn

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest
from adapterhub.hub import proposals, request_context, request_texts
from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.api.name_changes import check_writer
from adapterhub.hub.commits import Commit
from adapterhub.hub.hf import proposing
from adapterhub.hub.hf.commit_requests import Changes, Tree
from adapterhub.hub.hf.hf_errors import MovedError, ResponseError
from adapterhub.hub.hf.reading import name_of, visible_view
from adapterhub.hub.hf.writing import commit_in_turn
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import stream_body
from adapterhub.hub.web.adapter_settings import CARD, MAX_CARD, UploadedPage, card_page
from adapterhub.hub.web.posting import check_origin, check_session, read_fields
from adapterhub.hub.web.site import PageRequest, answer_page, redirect_to, render_page
from adapterhub.hub.workers import Worker
from adapterhub.manifest.package_files import SIGNATURE, check_paths, divide_names
from adapterhub.registry.repository_documents import MAIN
from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError

from .form_endpoint import errors_in_words
from .multipart import MultipartReader, boundary_of
from .proposal_forms import proposal_url

_MAX_FORM = 4 * MAX_CARD  # bytes of a card in a form, where a letter may take nine
_MAX_FILES = 1000  # of an upload
_MAX_FIELDS, _MAX_FIELD = 20, 2000  # other fields, and bytes of one
_MOVED = (
    "Somebody else has committed meanwhile. Copy what you want to keep of their card, then commit again: it replaces theirs."
)
_FileWork = Callable[[Hub, Identity, str, dict[str, str], Tree], Awaitable[UploadedPage]]
_ERRORS = (AdapterhubError, ForbiddenError, NoTokenError, MovedError, ResponseError)


async def _sender(request: Request, fields: dict[str, str] | None = None, *, proposes: bool = False) -> Identity | Response:
    """Return who may write to the name in the path, or propose something; or the refusal.

    With fields, they are checked to come from a page of the session.
    """
    name = name_of(request)

    def check(page_request: PageRequest, worker: Worker) -> Identity:
        check_origin(page_request)
        if page_request.who is None:
            raise NoTokenError
        if fields is not None:
            check_session(page_request, fields)
        if proposes:
            with errors_in_words(name):
                visible_view(worker, page_request.hub, page_request.who, name)
            proposals.upload_name(page_request.hub.access, page_request.who, name)
            return page_request.who
        with errors_in_words(name):
            # `main` may be without a version: then the API's own check finds no adapter yet.
            view = page_request.hub.visible(worker, page_request.who, name)
            if view is None or view.newest:
                check_writer(worker, page_request.hub, page_request.who, name, size=0)
        return page_request.hub.access.check_write(page_request.who, name)

    return await answer_page(request, check)


async def _error_page(request: Request, error: Exception) -> Response:
    """Return the page of an error."""

    def fail(_page_request: PageRequest, _worker: Worker) -> NoReturn:
        with errors_in_words(name_of(request)):
            raise error

    answer: Response = await answer_page(request, fail)
    return answer


# ---- the card


async def commit_card(request: Request) -> Response:
    """POST /-/adapters/{namespace}/{repo}/card: commit the card, if nobody has committed since it was read."""
    sender = await _sender(request)
    if isinstance(sender, Response):
        return sender
    fields = await read_fields(request, _MAX_FORM)
    sender = await _sender(request, fields)
    if isinstance(sender, Response):
        return sender
    hub, name = request.app.state.hub, name_of(request)
    try:
        commit = await _commit_card(hub, sender, name, fields)
    except ResponseError as error:
        if error.status != 412:
            return await _error_page(request, error)

        def show_again(page_request: PageRequest, worker: Worker) -> Response:
            """Show what was written, to be committed after what was committed meanwhile, which it then replaces."""
            current = card_page(page_request, worker)
            page = replace(current, text=_text_of(fields), title=fields.get("title", ""), wrong=_MOVED, newer_text=current.text)
            return render_page(page_request, page, 409)

        return await answer_page(request, show_again)
    except _ERRORS as error:
        return await _error_page(request, error)
    return redirect_to(f"/{name}/commit/{commit.id}")


def _text_of(fields: dict[str, str]) -> str:
    """Return the card in a form, in which browsers end lines with CR LF."""
    return fields.get("text", "").replace("\r\n", "\n")


async def _commit_card(hub: Hub, identity: Identity, name: str, fields: dict[str, str]) -> Commit:
    raw = _text_of(fields).encode("utf-8", "replace")
    if len(raw) > MAX_CARD:
        raise UsageError("card", f"has more than {MAX_CARD >> 10} KiB")
    if not fields.get("parent"):
        raise UsageError("parent", "is missing", "Load the page again")
    staged = hub.stage_files(name)
    try:
        file = await hub.workers.read(staged.add, raw)
        title = fields.get("title", "").strip()[:200] or f"Update {CARD}"
        changes = Changes(staged, title, parent=fields["parent"], files={CARD: file}, inline={CARD})
        commit, _ = await commit_in_turn(hub, identity, f"{name}@{MAIN}", changes)
        await hub.workers.read(staged.accept)
    finally:
        await asyncio.shield(hub.workers.read(staged.close))
    request_context.current().record_detail(commit=commit.id)
    return commit


# ---- files


async def upload_files(request: Request) -> Response:
    """POST /-/adapters/{namespace}/{repo}/upload: commit files in a form, with the checks of a push."""
    return await _answer_files(request, _commit_files)


async def propose_files(request: Request) -> Response:
    """POST /-/adapters/{namespace}/{repo}/propose: propose files in a form as the next version."""
    return await _answer_files(request, _propose_files, proposes=True)


async def _answer_files(request: Request, work: _FileWork, *, proposes: bool = False) -> Response:
    """Answer a form with files with the page that `work` returns."""
    sender = await _sender(request, proposes=proposes)
    if isinstance(sender, Response):
        return sender
    hub, name = request.app.state.hub, name_of(request)
    try:
        reader = MultipartReader(stream_body(request), boundary_of(request.headers.get("content-type", "")))
        counted_name = proposals.upload_name(hub.access, sender, name) if proposes else name
        fields, files = await _read_parts(request, hub, counted_name, reader, proposes=proposes)
        # Looked up again: the role may be gone since the files began to arrive.
        sender = await _sender(request, fields, proposes=proposes)
        if isinstance(sender, Response):
            return sender
        page = await work(hub, sender, name, fields, files)
    except _RefusalError as refusal:
        return refusal.response
    except _ERRORS as error:
        return await _error_page(request, error)
    return await answer_page(request, lambda page_request, _worker: render_page(page_request, page))


class _RefusalError(Exception):
    """The sender of a form may not send files."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


async def _read_parts(
    request: Request, hub: Hub, counted_name: str, reader: MultipartReader, *, proposes: bool
) -> tuple[dict[str, str], Tree]:
    """Return the fields of a form, and its files, which are stored by now and count as uploads for `counted_name`."""
    name, fields = name_of(request), dict[str, str]()
    files: Tree = {}
    while part := await reader.next_part():
        if part.filename is None:
            # Counted for each, as fields without a byte take memory too.
            if len(fields) >= _MAX_FIELDS:
                raise UsageError("form", f"has more than {_MAX_FIELDS} fields besides its files")
            fields[part.name] = await _read_field(reader, part.name, _MAX_FIELD)
            continue
        if not files:  # nothing is stored for a form of another site
            refusal = await _sender(request, fields, proposes=proposes)
            if isinstance(refusal, Response):
                raise _RefusalError(refusal)
        if len(files) >= _MAX_FILES:
            raise RefusedError(name, f"more than {_MAX_FILES:,} files", "Make several commits")
        if part.filename:
            check_paths([part.filename], name, RefusedError)
            files[part.filename] = await _receive(hub, counted_name, reader.data())
        else:  # no file was chosen
            await _read_field(reader, part.name, 0)
    if not files:
        raise UsageError("file", "is missing", "Choose the files")
    return fields, files


async def _read_field(reader: MultipartReader, name: str, limit: int) -> str:
    """Return the text of a part of at most `limit` bytes."""
    raw = b""
    async for piece in reader.data():
        raw += piece
        if len(raw) > limit:
            raise UsageError(name[:80], "is too long for this form")
    text = raw.decode("utf-8", "replace")
    request_texts.check_texts([name, text], "form")
    return text


async def _receive(hub: Hub, name: str, data: AsyncIterator[bytes]) -> tuple[Digest, int]:
    """Store a file of which neither digest nor size is known, and count it as uploaded."""
    upload = await hub.uploads.begin(name)
    try:
        await hub.uploads.append(upload, data)
    except BaseException:
        await asyncio.shield(hub.uploads.cancel(upload))
        raise
    size = upload.size
    return await hub.uploads.finish(upload, f"sha256:{upload.hasher.hexdigest()}"), size


def _title_of(fields: dict[str, str], files: Tree) -> str:
    """Return the title of a form, or one that names its files."""
    return fields.get("title", "").strip()[:200] or f"Upload {', '.join(sorted(files))[:150]}"


async def _commit_files(hub: Hub, identity: Identity, name: str, fields: dict[str, str], files: Tree) -> UploadedPage:
    staged = hub.stage_files(name)
    try:
        changes = Changes(staged, _title_of(fields, files), files=files)
        commit, notes = await commit_in_turn(hub, identity, f"{name}@{MAIN}", changes)
    finally:
        await asyncio.shield(hub.workers.read(staged.close))
    request_context.current().record_detail(commit=commit.id)
    kept_files = sorted(path for path in files if path == SIGNATURE or commit.files.get(path) == files[path])
    left_out = sorted(files.keys() - set(kept_files))
    return UploadedPage("Uploaded", f"/{name}/commit/{commit.id}", kept_files, left_out, notes)


async def _propose_files(hub: Hub, identity: Identity, name: str, fields: dict[str, str], files: Tree) -> UploadedPage:
    kept_files, _ = divide_names({*files} - {SIGNATURE})
    number, proposal = await proposing.propose_files(hub, identity, name, _title_of(fields, files), files)
    left_out = sorted(files.keys() - set(kept_files))
    return UploadedPage("Proposed", proposal_url(name, number), kept_files, left_out, proposal.objection)
