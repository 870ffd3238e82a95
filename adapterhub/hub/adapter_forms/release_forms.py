"""Forms on the page of channels: approve, promote, roll back and withdraw, each with a reason."""

from __future__ import annotations

from adapterhub.hub import request_context
from adapterhub.hub.api import release_changes
from adapterhub.hub.web.channels import channel_url
from adapterhub.hub.web.site import PageRequest
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import UsageError

Fields = dict[str, str]


def _reason(fields: Fields) -> str:
    """Return the reason in a form; UsageError without one."""
    if not (reason := fields.get("message", "").strip()):
        raise UsageError("message", "is empty", "Say why")
    return reason


def promote(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/promote: point a tag at a version that meets its requirements; `at` is the digest where the page showed it."""
    tag, reference = fields.get("tag", "").strip(), fields.get("reference", "")
    request_context.current().record_detail(tag=tag, reference=reference)
    expect = fields.get("at") or None
    about = {"reference": reference, "tag": tag, "message": _reason(fields)}
    release_changes.promote(worker, page_request.hub, page_request.who, name, **about, expect=expect)
    return channel_url(name, tag)


def approve(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/approve: approve a version for a tag, as the account of the session."""
    tag, reference = fields.get("tag", ""), fields.get("reference", "")
    request_context.current().record_detail(tag=tag, reference=reference)
    about = {"reference": reference, "tag": tag, "text": _reason(fields)}
    release_changes.approve(worker, page_request.hub, page_request.who, name, **about)
    return channel_url(name, tag)


def rollback(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/rollback: point a tag at the version it had before; `at` is as in `promote`."""
    tag, expect = fields.get("tag", ""), fields.get("at") or None
    request_context.current().record_detail(tag=tag)
    release_changes.rollback(worker, page_request.hub, page_request.who, name, tag=tag, message=_reason(fields), expect=expect)
    return channel_url(name, tag)


def withdraw(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/withdraw: withdraw a version under this name."""
    reference = fields.get("reference", "")
    request_context.current().record_detail(reference=reference)
    release_changes.withdraw(worker, page_request.hub, page_request.who, name, reference=reference, text=_reason(fields))
    return channel_url(name, fields.get("tag", ""))
