"""Named remotes: a URL, and the address of a ref below it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterhub.ref import LATEST
from adapterhub_converters.errors import UsageError

from . import location

NOBODY = "adapterhub-remote-test"
"""A name that nobody uses."""
_HUBS = {"hf": False, "hub+https": True, "hub+http": True}
"""Schemes whose names have two parts, and whether a host comes first."""
_LAYOUT = "layout"
_HINT = "Write it like oci://registry.example/team"
_LIKE = {
    **dict.fromkeys(("oci", "oci+http", "oci+https"), "oci://registry.example/team"),
    "hf": "hf://team",
    **dict.fromkeys(("hub+http", "hub+https"), "hub+https://hub.example/team"),
    "file": "file:///adapters",
    "layout": "layout:///adapters",
}
"""Kind of remote to the URL of one; that of any other has a bucket."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A named remote: its URL, and the file that defines it."""

    name: str
    url: str
    path: Path


def check_url(text: str) -> str:
    """Check the syntax of a URL of a remote and return it; the UsageError never repeats a password."""
    url = text.rstrip("/") if not text.endswith("://") else text
    scheme, found, rest = url.partition("://")
    host = rest.partition("/")[0]
    if "@" in host:
        shown, what = f"{scheme}://…@{host.rpartition('@')[2]}", "credentials in a URL end up in logs"
        raise UsageError(shown, what, "Remove them", code="credentials-in-address")
    if not url.isprintable() or any(part in rest for part in "?# "):
        raise UsageError(f"{scheme}://{host}/…", "the URL of a remote has no query, fragment or space", _HINT)
    if not found or not location.is_address(url):
        kinds = ", ".join(f"{kind}://" for kind in location.kinds())
        raise UsageError(url[:200], "unknown kind of remote", f"Supported: {kinds}")
    url = f"{scheme.lower()}://{rest}"
    try:
        location.parse(nobody(url))
    except UsageError as error:
        what = error.what.replace(f"/{NOBODY}/x", "").replace(f"/{NOBODY}", "")  # which nobody has written
        hint = f"Write it like {_LIKE.get(scheme.lower(), f'{scheme.lower()}://bucket/adapters')}"
        raise UsageError(url[:200], what, hint, code=error.own_code) from error
    return url


def nobody(url: str) -> str:
    """An address on a remote where nothing is expected."""
    scheme, _, rest = url.partition("://")
    has_org = scheme in _HUBS and _org(scheme, rest)[1]
    return below(url, NOBODY if has_org else f"{NOBODY}/x")


def below(url: str, ref: str) -> str:
    """The address of a ref, `[namespace/…]name[:tag|@digest]`, on a remote.

    `oci://host/prefix` and `team/sql:v2` give `oci://host/prefix/team/sql:v2`, and so do all kinds but two. Names on a Hugging
    Face hub have two parts: `hf://` takes them as they are; `hf://org` takes a name with or without `org/`, and refuses another
    namespace, because two adapters would become one repository. A tag is a revision there. In an image layout, `layout://PATH`,
    a ref is a name in its index.
    """
    if "://" in ref:
        what = "an address names its place already, so it takes no remote"
        raise UsageError(ref[:200], what, "Write a ref", code="address-with-remote")
    name, at, version = ref.partition("@")
    if not at:
        name, at, version = ref.partition(":")
    parts = name.split("/")
    if not all(part.strip(".") and part.isascii() and part.isprintable() for part in parts) or set(name) & set(" ?#\\%*"):
        raise UsageError(ref[:200], f"{name[:80]!r} is not a valid name on a remote", "Write a ref like team/sql:v2")
    scheme, _, rest = url.partition("://")
    rest = rest.rstrip("/")
    if scheme in _HUBS:
        return f"{scheme}://{_on_hub(scheme, rest, parts, ref)}{'@' if at else ''}{version}"
    if scheme == _LAYOUT:
        return f"{url}@{version}" if at == "@" else f"{url}:{name}:{version or LATEST}"
    return f"{scheme}://{rest}/{name}{at}{version}"


def _org(scheme: str, rest: str) -> tuple[str, str]:
    """The host of a hub, with a slash, and the organization in its URL; both may be empty."""
    host, _, org = rest.partition("/") if _HUBS[scheme] else ("", "", rest)
    return host and f"{host}/", org


def _on_hub(scheme: str, rest: str, parts: list[str], ref: str) -> str:
    host, org = _org(scheme, rest)
    if len(parts) > 2 or (not org and len(parts) < 2):
        raise UsageError(ref[:200], "a name on the Hugging Face Hub has two parts", "Write it like team/sql")
    if org and len(parts) == 2 and parts[0] != org:
        hint = f"Write {org}/{parts[1]}, or add a remote without an organization"
        raise UsageError(ref[:200], f"this remote belongs to {org}, not to {parts[0]}", hint)
    return f"{host}{org or parts[0]}/{parts[-1]}"
