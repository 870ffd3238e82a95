"""Addresses of image layouts: `layout://PATH[:NAME|@DIGEST]`, or in skopeo's form, `oci:DIR[:NAME]` and `oci-archive:TAR…`.

NAME is a name in index.json: `v2`, as skopeo and oras write it, or `team/sql:v2`, as adapterhub does; `^1.2` and
`team/sql:^1.2` are ranges of names. The path ends at its first colon, as in skopeo.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.ref import LATEST, parse_prefix
from adapterhub.remotes.remote_address import owner_of
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .layout_archive import LayoutArchive
from .layout_folder import LayoutFolder

if TYPE_CHECKING:
    from adapterhub.remotes.remote_address import UserSettings

_PREFIXES = ("layout://", "oci-archive:", "oci:")
_NAME = safe_regex.Pattern(r"[A-Za-z0-9_][A-Za-z0-9._/:+-]{0,254}")
_RANGE = safe_regex.Pattern(r"(?:[A-Za-z0-9_][A-Za-z0-9._/+-]{0,126}:)?[\^~][A-Za-z0-9.-]{1,126}")
_DRIVE = safe_regex.Pattern(r"[A-Za-z]:[\\/]")
_HINT = "Write it like layout://bundle.tar:team/sql:v2"


@dataclass(frozen=True, slots=True)
class LayoutAddress:
    """A layout on the local disk, optionally with a name in it or a digest."""

    prefix: str
    path: str
    tag: str | None = None
    digest: Digest | None = None

    mark = ":"  # before a tag

    @property
    def host(self) -> str:
        """The name of the file or folder."""
        return Path(self.path).name

    @property
    def owner(self) -> str:
        """The path."""
        return owner_of(Path(self.path))

    @property
    def title(self) -> str:
        """The name without namespace and tag, else that of the file."""
        name = (self.tag or "").rpartition("/")[2].partition(":")[0] if "/" in (self.tag or "") else ""
        return name or Path(self.path).stem.lstrip(".") or "adapter"

    @property
    def repository(self) -> str:
        """The address without a name."""
        return self.prefix + self.path

    @property
    def reference(self) -> str:
        """The digest, else the name, else `latest`."""
        return self.digest or self.tag or LATEST

    @property
    def version(self) -> str:
        """The address with a name or a digest."""
        return f"{self.repository}{'@' if self.digest else ':'}{self.reference}"

    @property
    def is_archive(self) -> bool:
        """Whether it is a tar: by the prefix, by the file that exists, else by its suffix."""
        if self.prefix != "layout://":
            return self.prefix == "oci-archive:"
        path = Path(self.path)
        return path.is_file() or (not path.is_dir() and path.suffix.lower() == ".tar")

    def __str__(self) -> str:
        return self.repository + (f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else "")


def parse(text: str) -> LayoutAddress:
    """Parse an address."""
    prefix = next((prefix for prefix in _PREFIXES if text.lower().startswith(prefix)), "")
    remainder = text[len(prefix) :]
    # The colon of a Windows drive is not the one before a name.
    drive = remainder[:2] if _DRIVE.match(remainder) else ""
    # A path may contain `@`, but hardly `@sha256:`.
    path, at, digest = remainder.rpartition("@sha256:")
    if at:
        digest = parse_prefix(digest, text)
        if ":" in path[len(drive) :]:
            raise UsageError(text, "both a name and a digest", f"Write {prefix}{path.partition(':')[0]}@{digest}")
        name = None
    else:
        path, colon, name_text = remainder[len(drive) :].partition(":")
        path, digest, name = drive + path, "", name_text if colon else None
    if not prefix or not path or "\0" in path:
        raise UsageError(text, "not a valid address of an image layout, a folder or a .tar", _HINT)
    if name is not None and not (_NAME.fullmatch(name) or _RANGE.fullmatch(name)):
        raise UsageError(text, f"{name[:80]!r} is not a valid name in an image layout", _HINT)
    return LayoutAddress(prefix, path, name, digest or None)


def connect(address: LayoutAddress, surroundings: UserSettings | None = None) -> LayoutFolder | LayoutArchive:
    """Open the layout; nothing is read yet."""
    del surroundings
    layout_class = LayoutArchive if address.is_archive else LayoutFolder
    return layout_class(Path(address.path), address.repository, any_name=address.tag is None)
