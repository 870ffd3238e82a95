"""Refs: `namespace/name` with an optional version, `:tag`, `:v3`, `:^1.2` or `@sha256:…`.

The grammar is that of OCI repositories and tags (distribution-spec v1.1, "Pulling manifests"), so that a ref means the
same in any OCI registry. It excludes path traversal: no component of dots alone, and exactly one slash.
"""

from __future__ import annotations

from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import semver
from .digest import is_hex

_DIGITS = frozenset("0123456789")
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz") | _DIGITS
_TAG = _LOWER | {letter.upper() for letter in _LOWER} | frozenset("._-")
# Names of devices: Windows cannot create a folder of such a name.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
_HUB = ("huggingface.co", "www.huggingface.co", "hf.co")
_MAX_COMPONENT, _MAX_TAG = 100, 128
LATEST = "latest"
_WILDCARDS = frozenset("*?[")  # of fnmatch


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
        """Parse `text`; raise RefError if it is invalid."""
        if "://" in text or intended_address(text):
            raise _address_error(text)
        name, at_sign, digest = text.partition("@")
        name, colon, tag = name.partition(":")
        parse_name(name, text)
        if at_sign and colon:
            raise RefError(text, "both a tag and a digest", f"Write {name}:{tag} or {name}@{digest}")
        if at_sign:
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


def intended_address(text: str) -> str:
    """Return the address meant by the URL of a page on the hub, or by a name as docker writes it; empty for other texts."""
    scheme, separator, remainder = text.partition("://")
    scheme, remainder = (scheme.lower(), remainder) if separator else ("", text)
    host, _, path = remainder.partition("/")
    if scheme in ("", "http", "https") and host.lower() in _HUB:
        segments = path.partition("?")[0].strip("/").split("/")
        # main is the hub's default branch, so the address is shorter without it.
        revision = (
            f"@{segments[3]}"
            if len(segments) > 3 and segments[2] in ("tree", "blob", "resolve") and segments[3] != "main"
            else ""
        )
        return f"hf://{segments[0]}/{segments[1]}{revision}" if len(segments) > 1 else ""
    if scheme == "docker":
        return f"oci://{remainder}"
    name, _, port = host.partition(":")
    # A host has a dot or a port, or is localhost; `team/sql` alone is a ref.
    is_host = name == "localhost" or ("." in name and not name.startswith("."))
    return f"oci://{remainder}" if not scheme and path and is_host and (port.isdigit() or (not port and "/" in path)) else ""


def _oci_form(url: str) -> str:
    """Return the address in an OCI registry that the URL of a page may mean."""
    scheme, _, remainder = url.partition("://")
    return f"oci://{remainder}" if scheme.lower() == "https" else f"oci+http://{remainder}"


def _address_error(text: str) -> RefError:
    """Return the error for an address where a ref of the local registry is needed, without a password in it."""
    scheme, separator, remainder = text.partition("://")
    user, at_sign, host = remainder.partition("/")[0].rpartition("@")
    # Refused before the other errors, none of which may repeat the password.
    if separator and at_sign and user:
        return RefError(f"{scheme}://…@{host}", "credentials in an address end up in logs", "Remove them")
    if intended := intended_address(text):
        return RefError(text, "not a ref and not an address", f"Write {intended}")
    if scheme.lower() in ("http", "https") and separator:
        return RefError(
            text, "not a ref and not an address", f"Write hub+{text} for a hub, or {_oci_form(text)} for a registry"
        )
    return RefError(text, "an address, and this works on the local registry", code="local-only", address=text)


def parse_name(name: str, location: str) -> str:
    """Return `name` if it is `namespace/name`, else raise RefError."""
    components = name.split("/")
    if len(components) != 2:
        raise RefError(location, f"{name[:80]!r} is not namespace/name", "Write it like team/sql")
    for component in components:
        if not _is_component(component):
            near = "/".join(map(_near_component, components))
            is_fix = all(map(_is_component, near.split("/")))
            hint = f"Write {near}" if is_fix else "Use a-z and 0-9, with single . _ - between them"
            hub = f", or {address} for one on the Hub" if is_fix and (address := hub_address(location)) else ""
            raise RefError(location, f"{component[:80]!r} cannot be part of a name", f"{hint}{hub}")
    return name


def hub_address(text: str) -> str:
    """Return the address on the Hugging Face Hub that `Org/Model` may mean; empty for other texts."""
    components = text.split("/")
    is_repository = len(components) == 2 and all(is_tag(part) and part[0] != "_" for part in components)
    return f"hf://{text}" if is_repository else ""


def _near_component(text: str) -> str:
    """Return the text in lower case, with a hyphen for each run of other characters inside it."""
    letters = "".join(letter if letter in _LOWER or letter in "._" else "-" for letter in text.lower())
    return text.lower() if _is_component(text.lower()) else "-".join(filter(None, letters.split("-")))


def is_pattern(text: str) -> bool:
    """Return whether a text is a pattern of names, or of paths, rather than one of them."""
    return not _WILDCARDS.isdisjoint(text)


def is_name(text: str) -> bool:
    """Return whether `parse_name` accepts a text."""
    try:
        return bool(parse_name(text, ""))
    except RefError:
        return False


def _is_component(text: str) -> bool:
    """Return whether `part` is lower-case letters and digits, with single `.`, `_` or `-` between them, and not a device."""
    # Windows ignores what follows the first dot of a device's name: con.txt is the console too.
    if len(text) > _MAX_COMPONENT or text.partition(".")[0] in _DEVICES:
        return False
    return all(word and _LOWER.issuperset(word) for word in text.replace("_", ".").replace("-", ".").split("."))


def parse_tag(tag: str, location: str) -> str:
    """Return `tag` if it can be set by hand, else raise RefError: a version number cannot."""
    if tag.startswith(("^", "~")):
        raise RefError(location, f"{tag[:80]!r} is a range of versions, not a tag", "Name one tag, like 1.2.0")
    if not is_tag(tag):
        raise RefError(location, f"{tag[:80]!r} is not a tag", "Use up to 128 of A-Z a-z 0-9 . _ -, not starting with . or -")
    if _is_number(tag):
        raise RefError(
            location, f"{tag} is a version number, which a push assigns", "Choose another tag", code="version-number"
        )
    return tag


def is_tag(text: str) -> bool:
    """Return whether `text` can be a tag in an OCI registry."""
    return 0 < len(text) <= _MAX_TAG and text[0] not in ".-" and _TAG.issuperset(text)


def _is_number(tag: str) -> bool:
    return tag[:1] == "v" and len(tag) > 1 and _DIGITS.issuperset(tag[1:])


def parse_number(tag: str, location: str) -> int | None:
    """Parse a version number like `v3`; None for any other tag."""
    if not _is_number(tag):
        return None
    if tag[1] == "0" or len(tag) > 9:
        raise RefError(location, f"{tag[:80]} is not a version number", "They are v1, v2 and so on")
    return int(tag[1:])


def _check_range(text: str, location: str) -> str:
    if semver.parse_range(text) is None:
        raise RefError(location, f"{text[:80]!r} is not a range of versions", "Write it like ^1.2 or ~1.2.3")
    return text


def parse_prefix(text: str, location: str) -> str:
    """Return a digest or a prefix of one, given with or without `sha256:`, with it."""
    digits = text.removeprefix("sha256:")
    if not 4 <= len(digits) <= 64 or not is_hex(digits, len(digits)):
        raise RefError(location, f"{text[:80]!r} is not a digest", "Write @sha256: and at least its first 4 digits")
    return "sha256:" + digits
