"""Forms for a name: its tags, deprecation, visibility, gate, access, retention, new name, removal and restore."""

from __future__ import annotations

from adapterhub.hub import request_context
from adapterhub.hub.api import name_changes
from adapterhub.hub.api.api_requests import check_known
from adapterhub.hub.gates import ACCEPTED, MAX_TERMS, Gate
from adapterhub.hub.hf import gating, likes, repositories
from adapterhub.hub.web.form_requests import count_in
from adapterhub.hub.web.site import PageRequest
from adapterhub.hub.workers import Worker
from adapterhub.manifest.keep_rule import keep_rule
from adapterhub_converters.errors import UsageError

from .form_endpoint import new_name, settings_url

Fields = dict[str, str]
MAX_GATE_FORM = 8192 + 12 * MAX_TERMS
"""Bytes of the form with the terms, in which a letter may take twelve."""


def set_tag(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/tag: point a tag, new or not, at a version; `at` is the digest where the page showed it, empty for nowhere."""
    tag, reference = fields.get("tag", "").strip(), fields.get("reference", "")
    request_context.current().record_detail(tag=tag, reference=reference)
    name_changes.set_tag(
        worker, page_request.hub, page_request.who, name, reference=reference, tag=tag, expect=fields.get("at") or None
    )
    return f"{settings_url(name)}#tags"


def remove_tag(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/remove-tag."""
    tag = fields.get("tag", "")
    request_context.current().record_detail(tag=tag)
    name_changes.remove_tag(worker, page_request.hub, page_request.who, name, tag, expect=fields.get("at") or None)
    return f"{settings_url(name)}#tags"


def deprecate(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/deprecate: warn of a version, or of all without `reference`; with `undo`, no longer."""
    reference, undo = fields.get("reference", ""), bool(fields.get("undo"))
    request_context.current().record_detail(version=reference or "all", undo=undo or None)
    message = fields.get("message", "")
    if len(message) > 1000:
        raise UsageError("message", "has more than 1,000 characters")
    name_changes.deprecate(worker, page_request.hub, page_request.who, name, reference=reference, message=message, undo=undo)
    return f"{settings_url(name)}#deprecation"


def set_visibility(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/visibility."""
    visibility = fields.get("visibility", "")
    if visibility not in ("public", "private"):
        raise UsageError("visibility", f"{visibility[:80]!r} is not one of public, private")
    request_context.current().record_detail(visibility=visibility)
    repositories.set_private(worker, page_request.hub, page_request.who, name, private=visibility == "private")
    return f"{settings_url(name)}#visibility"


def set_gate(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/gate: gate a name by a mode and terms; an empty mode for no gate."""
    mode, terms = fields.get("mode", ""), fields.get("terms", "").replace("\r\n", "\n").strip()
    request_context.current().record_detail(gated=mode or False)
    gating.set_gate(worker, page_request.hub, page_request.who, name, Gate(mode, terms) if mode else None)
    return f"{settings_url(name)}#access"


def ask_access(page_request: PageRequest, worker: Worker, name: str, _fields: Fields) -> str:
    """POST …/ask-access: accept the terms of a gated name, and ask for access."""
    gating.ask(worker, page_request.hub, page_request.who, name)
    return f"/{name}"


def set_star(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/star: give a name the star of the account, or take it away with `away`."""
    likes.set_star(worker, page_request.hub, page_request.who, name, given=not fields.get("away"))
    return f"/{name}"


def decide_access(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/decide-access: accept or reject the request of an account."""
    account, status = fields.get("account", ""), fields.get("status", "")
    gating.decide(worker, page_request.hub, page_request.who, name, account=account, status=status)
    return f"{settings_url(name)}#access"


def grant_access(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/grant-access: give an account access that has not asked for it."""
    account = fields.get("account", "").strip()
    gating.decide(worker, page_request.hub, page_request.who, name, account=account, status=ACCEPTED, unasked=True)
    return f"{settings_url(name)}#access"


def keep(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/retention: how many versions a gc leaves, and for how many days each; empty for all."""
    days = count_in(fields, "days")
    rule = keep_rule(count_in(fields, "keep"), None if days is None else days * 86400)
    name_changes.set_retention(worker, page_request.hub, page_request.who, name, rule)
    return f"{settings_url(name)}#retention"


def check_movable(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> None:
    """Refuse a client that may not write to the name that it sees, or to the new one."""
    repositories.check_may_move(worker, page_request.hub, page_request.who, name, new_name(name, fields))


def rename(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/rename."""
    to = new_name(name, fields)
    request_context.current().record_detail(to=to)
    repositories.move_repository(worker, page_request.hub, page_request.who, name, to)
    return settings_url(to)


def remove(page_request: PageRequest, worker: Worker, name: str, fields: Fields) -> str:
    """POST …/remove: take a name down with its versions; the name has to be written out."""
    if fields.get("confirm", "").strip() != name:
        raise UsageError("confirm", f"is not {name}", "Write the name to remove it")
    force = fields.get("force") == "true"
    name_changes.remove_name(worker, page_request.hub, page_request.who, name, force=force)
    return settings_url(name)


def check_restorable(page_request: PageRequest, worker: Worker, name: str, _fields: Fields) -> None:
    """Refuse a client that may not restore a name."""
    check_known(worker, page_request.hub, page_request.who, name)
    page_request.hub.access.check_write(page_request.who, name)


def restore(page_request: PageRequest, worker: Worker, name: str, _fields: Fields) -> str:
    """POST …/restore: undo the removal of a name."""
    name_changes.restore_name(worker, page_request.hub, page_request.who, name)
    return settings_url(name)
