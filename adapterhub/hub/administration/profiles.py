"""What people say of themselves: a full name, a text and a link, shown on the page of the namespace that is theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from adapterhub.http.urls import origin
from adapterhub.hub import request_context
from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hub_database import HubDatabase
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

MAX_NAME, MAX_ABOUT, MAX_LINK = 100, 1000, 300
"""Characters of each."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What an account says of itself; empty for nothing. `link` is an address of the web."""

    full_name: str = ""
    about: str = ""
    link: str = ""


def find_profile(database: HubDatabase, account: str) -> Profile:
    """Return the profile of an account, an empty one for an account that does not exist or is removed or disabled."""
    return find_profiles(database, [account]).get(account, Profile())


def find_profiles(database: HubDatabase, accounts: Collection[str]) -> Mapping[str, Profile]:
    """Return the profiles of a page of accounts, without those that do not exist or are removed or disabled."""
    if not accounts:
        return {}
    marks = ", ".join("?" * len(accounts))
    sql = (
        f"SELECT name, full_name, about, link FROM accounts WHERE name IN ({marks})"  # noqa: S608 - marks
        " AND removed IS NULL AND disabled IS NULL"
    )
    return {name: Profile(*texts) for name, *texts in database.select(sql, *accounts)}


def set_profile(database: HubDatabase, identity: Identity | None, profile: Profile) -> None:
    """Set the profile of the client's own account.

    Raises:
        ForbiddenError: The token may not write to the namespace of the account, or is that of a service.
        UsageError: A field is too long, the name has more than one line, or the link is no web address without credentials.
    """
    if identity is None:
        raise NoTokenError
    if identity.roles is None or not identity.has_role("write", identity.account):
        raise ForbiddenError(f"only a token with the role write of the account {identity.account} itself sets its profile")
    limits = {"full_name": MAX_NAME, "about": MAX_ABOUT, "link": MAX_LINK}
    for field, limit in limits.items():
        if len(getattr(profile, field)) > limit:
            raise UsageError(field, f"has more than {limit:,} characters")
    if profile.full_name and not profile.full_name.isprintable():
        raise UsageError("full_name", "is not one line of text")
    if profile.link:
        origin(profile.link, "link", is_user_input=True)
    request_context.current().record_change(identity.account)
    sql = "UPDATE accounts SET full_name = ?, about = ?, link = ? WHERE name = ?"
    database.execute(sql, profile.full_name, profile.about, profile.link, identity.account)
