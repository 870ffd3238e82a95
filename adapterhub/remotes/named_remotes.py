"""Named remotes of the user's configuration: a URL, and the address of a ref below it."""

from __future__ import annotations

from pathlib import Path

from adapterhub.ref import LATEST
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import address_schemes, remote_address

UNUSED_NAME = "adapterhub-remote-test"
"""A name that nobody uses, to ask a remote for rights without an adapter."""
_HUBS = {"hf": False, "hub+https": True, "hub+http": True}
"""The schemes whose names have two parts, and whether a host comes first."""
_LAYOUT = "layout"
_HINT = "Write it like oci://registry.example/team"
_URL_EXAMPLES = {
    **dict.fromkeys(("oci", "oci+http", "oci+https"), "oci://registry.example/team"),
    "hf": "hf://team",
    **dict.fromkeys(("hub+http", "hub+https"), "hub+https://hub.example/team"),
    "file": "file:///adapters",
    "layout": "layout:///adapters",
}
"""An example URL for each kind of remote without a bucket."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A named remote: its URL, and the file that defines it."""

    name: str
    url: str
    path: Path


def check_url(text: str) -> str:
    """Check the syntax of a remote's URL and return it.

    Raises:
        UsageError: It is invalid. The message never repeats a password.
    """
    url = text.rstrip("/") if not text.endswith("://") else text
    scheme, separator, remainder = url.partition("://")
    host = remainder.partition("/")[0]
    if "@" in host:
        redacted, problem = f"{scheme}://…@{host.rpartition('@')[2]}", "credentials in a URL end up in logs"
        raise UsageError(redacted, problem, "Remove them", code="credentials-in-address", host=host.rpartition("@")[2])
    # Names are appended to the URL, which a query or a fragment would not survive.
    if not url.isprintable() or any(part in remainder for part in "?# "):
        raise UsageError(f"{scheme}://{host}/…", "the URL of a remote has no query, fragment or space", _HINT)
    if not separator or not address_schemes.is_address(url):
        kinds = ", ".join(f"{kind}://" for kind in address_schemes.schemes())
        raise UsageError(url[:200], "unknown kind of remote", f"Supported: {kinds}")
    url = f"{scheme.lower()}://{remainder}"
    try:
        # A remote is valid if the address of some ref below it is.
        remote_address.parse(unused_address(url))
    except UsageError as error:
        problem = error.what.replace(f"/{UNUSED_NAME}/x", "").replace(f"/{UNUSED_NAME}", "")  # not part of what the user wrote
        hint = f"Write it like {_URL_EXAMPLES.get(scheme.lower(), f'{scheme.lower()}://bucket/adapters')}"
        raise UsageError(url[:200], problem, hint, code=error.own_code) from error
    return url


def unused_address(url: str) -> str:
    """Return an address on a remote where nothing is expected to be."""
    scheme, _, remainder = url.partition("://")
    has_org = scheme in _HUBS and _split_org(scheme, remainder)[1]
    return address_below(url, UNUSED_NAME if has_org else f"{UNUSED_NAME}/x")


def address_below(url: str, ref: str) -> str:
    """Return the address of a ref, `[namespace/…]name[:tag|@digest]`, on a remote.

    `oci://host/prefix` and `team/sql:v2` give `oci://host/prefix/team/sql:v2`, and likewise for all kinds but two. Names on a
    Hugging Face hub have two parts: `hf://` takes them as they are; `hf://org` takes a name with or without `org/`, and refuses
    another namespace, because two adapters would become one repository. A tag is a revision there. In an image layout,
    `layout://PATH`, a ref is a name in its index.
    """
    if "://" in ref:
        problem = "an address names its place already, so it takes no remote"
        raise UsageError(ref[:200], problem, "Write a ref", code="address-with-remote")
    # A digest contains a colon, so look for `@` first.
    name, at, version = ref.partition("@")
    if not at:
        name, at, version = ref.partition(":")
    parts = name.split("/")
    # The name becomes part of a URL: `..`, an empty part or an escape could lead out of the remote.
    if not all(part.strip(".") and part.isascii() and part.isprintable() for part in parts) or set(name) & set(" ?#\\%*"):
        raise UsageError(ref[:200], f"{name[:80]!r} is not a valid name on a remote", "Write a ref like team/sql:v2")
    scheme, _, remainder = url.partition("://")
    remainder = remainder.rstrip("/")
    if scheme in _HUBS:
        return f"{scheme}://{_path_on_hub(scheme, remainder, parts, ref)}{'@' if at else ''}{version}"
    if scheme == _LAYOUT:
        return f"{url}@{version}" if at == "@" else f"{url}:{name}:{version or LATEST}"
    return f"{scheme}://{remainder}/{name}{at}{version}"


def prefix_below(url: str, prefix: str | None) -> str | None:
    """Return the namespace or name on a hub for a prefix of refs below its URL; None for all."""
    scheme, _, remainder = url.partition("://")
    _, org = _split_org(scheme, remainder.rstrip("/"))
    if not org or prefix in (None, org):
        return org or prefix
    return address_below(url, str(prefix)).partition("://")[2].removeprefix(remainder.removesuffix(org))


def _split_org(scheme: str, remainder: str) -> tuple[str, str]:
    """Return the host of a hub, with a slash, and the organization in its URL; both may be empty."""
    host, _, org = remainder.partition("/") if _HUBS[scheme] else ("", "", remainder)
    return host and f"{host}/", org


def _path_on_hub(scheme: str, remainder: str, parts: list[str], ref: str) -> str:
    host, org = _split_org(scheme, remainder)
    if len(parts) > 2 or (not org and len(parts) < 2):
        raise UsageError(ref[:200], "a name on the Hugging Face Hub has two parts", "Write it like team/sql")
    if org and len(parts) == 2 and parts[0] != org:
        hint = f"Write {org}/{parts[1]}, or add a remote without an organization"
        raise UsageError(ref[:200], f"this remote belongs to {org}, not to {parts[0]}", hint)
    return f"{host}{org or parts[0]}/{parts[-1]}"
