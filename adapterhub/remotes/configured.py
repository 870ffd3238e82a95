"""Remotes by name: a URL that names lie below, and the address of a ref there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from adapterhub_converters.errors import UsageError

from . import places

_HUB = "hf"
_HINT = "Write it like oci://registry.example/team"


@dataclass(frozen=True, slots=True)
class Remote:
    """One of them: its URL and the file that says so."""

    name: str
    url: str
    path: Path


def check_url(text: str) -> str:
    """The URL of a remote, checked as far as its words go; UsageError never repeats a password."""
    url = text.rstrip("/") if not text.endswith("://") else text
    scheme, found, rest = url.partition("://")
    host = rest.partition("/")[0]
    if "@" in host:
        what = "credentials in a URL end up in logs"
        raise UsageError(f"{scheme}://…@{host.rpartition('@')[2]}", what, "Leave them out; use `adapterhub login`")
    if not url.isprintable() or any(part in rest for part in "?# "):
        raise UsageError(f"{scheme}://{host}/…", "a URL of a remote ends with its path", _HINT)
    if not found or not places.is_address(url):
        kinds = ", ".join(f"{kind}://" for kind in places.kinds())
        raise UsageError(url[:200], "is not a kind of place that is known here", f"There are {kinds}")
    scheme = scheme.lower()
    url = f"{scheme}://{rest}"
    places.parse(below(url, "x/y" if scheme == _HUB and not rest else "y"))
    return url


def below(url: str, ref: str) -> str:
    """The address of a ref, `[namespace/…]name[:tag|@digest]`, on a remote.

    `oci://host/prefix` and `team/sql:v2` is `oci://host/prefix/team/sql:v2`, and so with all kinds but one: names on the
    Hugging Face Hub have two parts. `hf://` takes them as they are, `hf://org` a name of its own, with or without the `org/`;
    another namespace is refused, as two adapters would become one repository. A tag is a revision there.
    """
    if "://" in ref:
        raise UsageError(ref[:200], "an address says where it is: it takes no remote", "Leave --remote out, or write a ref")
    name, at, version = ref.partition("@")
    if not at:
        name, at, version = ref.partition(":")
    parts = name.split("/")
    if not all(part.strip(".") and part.isascii() and part.isprintable() for part in parts) or set(name) & set(" ?#\\%*"):
        raise UsageError(ref[:200], f"{name[:80]!r} cannot be a name on a remote", "A ref is like team/sql:v2")
    scheme, _, rest = url.partition("://")
    if scheme == _HUB:
        return f"{url.rstrip('/') if rest else url}{_on_hub(rest, parts, ref)}{'@' if at else ''}{version}"
    rest = rest.rstrip("/")
    return f"{scheme}://{rest}/{name}{at}{version}"


def _on_hub(org: str, parts: list[str], ref: str) -> str:
    if len(parts) > 2 or (not org and len(parts) < 2):
        raise UsageError(ref[:200], "a name on the Hugging Face Hub has two parts", "Write it like team/sql")
    if not org:
        return "/".join(parts)
    if len(parts) == 2 and parts[0] != org:
        raise UsageError(
            ref[:200], f"this remote is of {org}, not of {parts[0]}", f"Write {org}/{parts[1]}, or add a remote hf://"
        )
    return f"/{parts[-1]}"


def host(url: str) -> str:
    """The host of a remote's URL, with the port if it has one."""
    return urlsplit(url).netloc
