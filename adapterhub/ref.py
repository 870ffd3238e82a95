"""Refs: `namespace/name` with an optional version, `:tag`, `:v3`, `:^1.2` or `@sha256:…`.

The grammar is that of OCI repositories and tags (distribution-spec v1.1, "Pulling manifests"), so that a ref means the
same in any OCI registry. It excludes path traversal: no component of dots alone, and exactly one slash.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_converters.errors import UsageError

from . import semver
from .digest import is_hex

_DIGITS = frozenset("0123456789")
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz") | _DIGITS
_TAG = _LOWER | {letter.upper() for letter in _LOWER} | frozenset("._-")
# Windows cannot create a folder of such a name.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
_HUB = ("huggingface.co", "www.huggingface.co", "hf.co")
_MAX_COMPONENT, _MAX_TAG = 100, 128
LATEST = "latest"


class RefError(UsageError):
    """The text is not a ref."""

    default_code = "invalid-ref"


@dataclass(frozen=True, slots=True, repr=False)
class Ref:
    """A name and at most one of: a tag, a version number, a digest (`sha256:` and 4 or more of its digits), a range."""

    name: str
    tag: str | None = None
    number: int | None = None
    digest: str | None = None
    range: str | None = None

    def __repr__(self) -> str:
        return f"Ref({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Parse `text`; raises RefError if it is invalid."""
        if "://" in text or address_meant(text):
            raise _elsewhere(text)
        name, at, digest = text.partition("@")
        name, colon, tag = name.partition(":")
        parse_name(name, text)
        if at and colon:
            raise RefError(text, "both a tag and a digest", f"Write {name}:{tag} or {name}@{digest}")
        if at:
            return cls(name, digest=parse_prefix(digest, text))
        if not colon:
            return cls(name)
        if tag.startswith(("^", "~")):
            return cls(name, range=_check_range(tag, text))
        number = parse_number(tag, text)
        return cls(name, number=number) if number else cls(name, tag=parse_tag(tag, text))

    def __str__(self) -> str:
        if self.digest:
            return f"{self.name}@{self.digest}"
        tag = f"v{self.number}" if self.number else self.tag or self.range
        return f"{self.name}:{tag}" if tag else self.name


def address_meant(text: str) -> str:
    """The address that is meant by the URL of a page on the hub, or by a name as docker writes it; empty for any other text."""
    scheme, found, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if found else ("", text)
    host, _, path = rest.partition("/")
    if scheme in ("", "http", "https") and host.lower() in _HUB:
        parts = path.partition("?")[0].strip("/").split("/")
        revision = f"@{parts[3]}" if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve") and parts[3] != "main" else ""
        return f"hf://{parts[0]}/{parts[1]}{revision}" if len(parts) > 1 else ""
    if scheme == "docker":
        return f"oci://{rest}"
    name, _, port = host.partition(":")
    is_host = name == "localhost" or ("." in name and not name.startswith("."))
    return f"oci://{rest}" if not scheme and path and is_host and (port.isdigit() or (not port and "/" in path)) else ""


def _elsewhere(text: str) -> RefError:
    """The error for an address where a ref of the local registry is needed, without a password in it."""
    scheme, found, rest = text.partition("://")
    user, at, host = rest.partition("/")[0].rpartition("@")
    if found and at and user:
        return RefError(f"{scheme}://…@{host}", "credentials in an address end up in logs", "Remove them")
    if meant := address_meant(text):
        return RefError(text, "not a ref and not an address", f"Write {meant}")
    return RefError(text, "an address, and this works on the local registry", code="local-only", address=text)


def parse_name(name: str, where: str) -> str:
    """Return `name` if it is `namespace/name`, else raise RefError."""
    parts = name.split("/")
    if len(parts) != 2:
        raise RefError(where, f"{name[:80]!r} is not namespace/name", "Write it like team/sql")
    for part in parts:
        if not _is_component(part):
            hint = f"Write {name.lower()}" if name != name.lower() else "Use a-z and 0-9, with single . _ - between them"
            raise RefError(where, f"{part[:80]!r} cannot be part of a name", hint)
    return name


def is_name(text: str) -> bool:
    """Return True for a text that `parse_name` returns."""
    try:
        return bool(parse_name(text, ""))
    except RefError:
        return False


def _is_component(part: str) -> bool:
    """Whether `part` is lower-case letters and digits, with single `.`, `_` or `-` between them, and no device."""
    if len(part) > _MAX_COMPONENT or part.partition(".")[0] in _DEVICES:
        return False
    return all(word and _LOWER.issuperset(word) for word in part.replace("_", ".").replace("-", ".").split("."))


def parse_tag(tag: str, where: str) -> str:
    """Return `tag` if it can be set by hand, else raise RefError: a version number cannot."""
    if tag.startswith(("^", "~")):
        raise RefError(where, f"{tag[:80]!r} is a range of versions, not a tag", "Name one tag, like 1.2.0")
    if not is_tag(tag):
        raise RefError(where, f"{tag[:80]!r} is not a tag", "Use up to 128 of A-Z a-z 0-9 . _ -, not starting with . or -")
    if _is_number(tag):
        raise RefError(where, f"{tag} is a version number, which a push assigns", "Choose another tag", code="version-number")
    return tag


def is_tag(text: str) -> bool:
    """Whether `text` can be a tag in an OCI registry."""
    return 0 < len(text) <= _MAX_TAG and text[0] not in ".-" and _TAG.issuperset(text)


def _is_number(tag: str) -> bool:
    return tag[:1] == "v" and len(tag) > 1 and _DIGITS.issuperset(tag[1:])


def parse_number(tag: str, where: str) -> int | None:
    """Parse a version number like `v3`; None for any other tag."""
    if not _is_number(tag):
        return None
    if tag[1] == "0" or len(tag) > 9:
        raise RefError(where, f"{tag[:80]} is not a version number", "They are v1, v2 and so on")
    return int(tag[1:])


def _check_range(text: str, where: str) -> str:
    if semver.parse_range(text) is None:
        raise RefError(where, f"{text[:80]!r} is not a range of versions", "Write it like ^1.2 or ~1.2.3")
    return text


def parse_prefix(text: str, where: str) -> str:
    """Parse a digest or a prefix of one, with or without `sha256:`, which the result has."""
    digits = text.removeprefix("sha256:")
    if not 4 <= len(digits) <= 64 or not is_hex(digits, len(digits)):
        raise RefError(where, f"{text[:80]!r} is not a digest", "Write @sha256: and at least its first 4 digits")
    return "sha256:" + digits
