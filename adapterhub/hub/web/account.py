"""The page of the own account: its profile, its roles and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Token
from adapterhub.hub.administration import own_tokens, profiles
from adapterhub.hub.administration.own_tokens import TokenOptions
from adapterhub.hub.administration.profiles import Profile
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .form_requests import number_in
from .site import Page, PageRequest

PATH = "/-/account"


@dataclass(frozen=True)
class AccountPage(Page):
    """An account: its profile, its roles by namespace, empty for a token with a role of its own, and its tokens."""

    profile: Profile
    roles: Mapping[str, str]
    tokens: Sequence[Token]
    template: ClassVar[str] = "account.html"


@dataclass(frozen=True)
class SecretPage(Page):
    """A secret that is shown only once, what it is, how it is used, and the page after it."""

    what: str
    use: str
    secret: str
    following: str
    template: ClassVar[str] = "secret.html"


def account_page(page_request: PageRequest, worker: Worker) -> AccountPage:
    """GET /-/account."""
    if page_request.who is None:
        raise NoTokenError
    profile = profiles.find_profile(worker.database, page_request.who.account)
    return AccountPage(profile, page_request.who.roles or {}, own_tokens.list_tokens(worker.database, page_request.who))


def set_profile(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/account/profile."""
    texts = (fields.get(key, "").replace("\r\n", "\n").strip() for key in ("full_name", "about", "link"))
    profiles.set_profile(page_request.hub.database, page_request.who, Profile(*texts))
    return PATH


def create_token(page_request: PageRequest, fields: dict[str, str]) -> Page:
    """POST /-/account/token."""
    secret, _ = own_tokens.create_token(page_request.hub.database, page_request.who, token_options(fields))
    return token_page(secret, PATH)


def token_options(fields: dict[str, str]) -> TokenOptions:
    """Return what a form says that a new token is for."""
    namespaces = fields.get("namespaces", "").replace(",", " ").split()
    days = fields.get("days", "").strip()
    if days and not (days.isascii() and days.isdecimal()):
        raise UsageError("days", f"{days[:40]!r} is not a number of days")
    return TokenOptions(fields.get("name", ""), fields.get("role", ""), namespaces, float(days[:9]) if days else None)


def token_page(secret: str, following: str) -> SecretPage:
    """Return the page that shows a new token."""
    use = "HF_TOKEN takes it, and so do oras and docker as a password. Anyone who has it can use it."
    return SecretPage("Your new token", use, secret, following)


def revoke_token(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/account/revoke."""
    own_tokens.revoke_token(page_request.hub.database, page_request.who, number_in(fields, "token"))
    return PATH
