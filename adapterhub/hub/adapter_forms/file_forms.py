"""Forms that commit files to `main`, or propose them: a text file, as it was edited on a page, and uploaded files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import NoReturn

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest
from adapterhub.hub import commits, proposals, request_context, request_texts
from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.api.name_changes import check_writer
from adapterhub.hub.hf import proposing
from adapterhub.hub.hf.commit_requests import Changes, Tree
from adapterhub.hub.hf.hf_errors import MovedError, ResponseError
from adapterhub.hub.hf.reading import name_of, path_part, visible_view
from adapterhub.hub.hf.writing import commit_in_turn
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import stream_body
from adapterhub.hub.web.adapter_settings import UploadedPage
from adapterhub.hub.web.file_editor import MAX_TEXT, editor_page, read_text
from adapterhub.hub.web.form_requests import check_origin, check_session, read_fields
from adapterhub.hub.web.site import PageRequest, answer_page, redirect_to, render_page
from adapterhub.hub.workers import Worker
from adapterhub.manifest.package_files import SIGNATURE, check_paths, divide_names
from adapterhub.registry.repository_documents import MAIN
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .form_endpoint import errors_in_words
from .multipart import MultipartReader, boundary_of
from .proposal_forms import proposal_url

_MAX_FORM = 4 * MAX_TEXT  # bytes of a text in a form, where a letter may take nine
_MAX_FILES = 1000  # of an upload
_MAX_FIELDS, _MAX_FIELD = 20, 2000  # other fields, and bytes of one
_MOVED = (
    "Somebody else has committed meanwhile. Copy what you want to keep of their text, then send it again: it replaces theirs."
)
_FileWork = Callable[[Hub, Identity, str, dict[str, str], Tree], Awaitable[UploadedPage]]
_EditWork = Callable[[Hub, Identity, str, str, "_Edit"], Awaitable[str]]
_ERRORS = (AdapterhubError, ForbiddenError, NoTokenError, MovedError, ResponseError)


@dataclass(frozen=True)
class _Edit:
    """The bytes of a text file that was edited, and the commit where it was read."""

    path: str
    raw: bytes
    parent: str


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


# ---- an edited file


async def commit_edit(request: Request) -> Response:
    """POST /-/adapters/{namespace}/{repo}/edit/{path}: commit a text file, if nobody has committed since it was read."""
    return await _answer_edit(request, _commit_edit)


async def propose_edit(request: Request) -> Response:
    """POST /-/adapters/{namespace}/{repo}/propose-edit/{path}: propose a text file, if it is on `main` what was read."""
    return await _answer_edit(request, _propose_edit, proposes=True)


async def _answer_edit(request: Request, work: _EditWork, *, proposes: bool = False) -> Response:
    """Answer a form of the editor with a redirect to the address that `work` returns, or with the editor and why not."""
    sender = await _sender(request, proposes=proposes)
    if isinstance(sender, Response):
        return sender
    fields = await read_fields(request, _MAX_FORM)
    sender = await _sender(request, fields, proposes=proposes)
    if isinstance(sender, Response):
        return sender
    hub, name, path = request.app.state.hub, name_of(request), path_part(request, "path")
    try:
        raw = await hub.workers.run(_edited_bytes, hub, sender, f"{name}/{path}", fields)
        title = fields.get("title", "").strip()[:200] or f"Update {path}"
        return redirect_to(await work(hub, sender, name, title, _Edit(path, raw, fields["parent"])))
    except (AdapterhubError, ResponseError) as error:
        refusal = await _error_page(request, error)
        is_late = isinstance(error, ResponseError) and error.status == 412
        return await _show_again(request, fields, "" if is_late else str(error)) if refusal.status_code == 400 else refusal
    except (ForbiddenError, MovedError) as error:
        return await _error_page(request, error)


async def _show_again(request: Request, fields: dict[str, str], problem: str) -> Response:
    """Return the editor with what was written, to be sent again after what was committed meanwhile, which it then replaces."""

    def show(page_request: PageRequest, worker: Worker) -> Response:
        current = editor_page(page_request, worker)
        newer_text = current.text if fields.get("parent") not in ("", current.parent) else ""
        written = replace(current, text=_text_of(fields), title=fields.get("title", "")[:200])
        page = replace(written, wrong=problem or _MOVED, newer_text=newer_text)
        return render_page(page_request, page, 400 if problem else 409)

    return await answer_page(request, show)


def _text_of(fields: dict[str, str]) -> str:
    """Return the text in a form, in which browsers end lines with CR LF."""
    return fields.get("text", "").replace("\r\n", "\n")


def _edited_bytes(worker: Worker, hub: Hub, identity: Identity, address: str, fields: dict[str, str]) -> bytes:
    """Return the bytes of the file `name/path` in a form, with the ends of lines that the file has on `main`.

    Raises:
        ResponseError: The file has changed since the commit where it was read.
    """
    namespace, repo, path = address.split("/", 2)
    view = visible_view(worker, hub, identity, f"{namespace}/{repo}")
    head = commits.find(worker, view, commits.HEAD)
    current_text, text = read_text(worker, hub, identity, view, commit=head, path=path), _text_of(fields)
    if "\r\n" in current_text:
        text = text.replace("\n", "\r\n")
    raw = text.encode("utf-8", "replace")
    if len(raw) > MAX_TEXT:
        raise UsageError(path, f"has more than {MAX_TEXT >> 10} KiB")
    if not (parent := fields.get("parent")):
        raise UsageError("parent", "is missing", "Load the page again")
    if parent != head.id:
        try:
            earlier_files = commits.by_id(worker, view, parent).files
        except NotFoundError:  # by a squash
            earlier_files = {}
        if earlier_files.get(path) != head.files.get(path):
            raise ResponseError(412, "", f"{view.name}: {path} has changed since {parent[:40]}")
    return raw


async def _commit_edit(hub: Hub, identity: Identity, name: str, title: str, edit: _Edit) -> str:
    staged = hub.stage_files(name)
    try:
        file = await hub.workers.read(staged.add, edit.raw)
        changes = Changes(staged, title, parent=edit.parent, files={edit.path: file}, inline={edit.path})
        commit, _ = await commit_in_turn(hub, identity, f"{name}@{MAIN}", changes)
        await hub.workers.read(staged.accept)
    finally:
        await asyncio.shield(hub.workers.read(staged.close))
    request_context.current().record_detail(commit=commit.id)
    return f"/{name}/commit/{commit.id}"


async def _propose_edit(hub: Hub, identity: Identity, name: str, title: str, edit: _Edit) -> str:
    texts = {edit.path: edit.raw}
    number, _ = await proposing.propose_files(hub, identity, name, title, {}, texts=texts, parent=edit.parent)
    return proposal_url(name, number)


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
