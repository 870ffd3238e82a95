"""Whom the user has dealt with before: the owners of addresses (`Place.owner`).

A project's files travel with its repository, so their author chooses the hosts in them. Such a host is asked only if it
is known: from the user's own remotes and logins, from an answer given once, which is kept in a file, or from a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from adapterhub import user_files
from adapterhub.http.boundary import is_loopback
from adapterhub_converters.errors import AdapterhubError

from . import location
from .configured import nobody

_HUGGING_FACE = "https://huggingface.co"
_HEAD = "# Whom adapterhub may ask although only a project names them, one a line.\n"


@dataclass(frozen=True)
class KnownHosts:
    """Those that a user has dealt with.

    Attributes:
        path: The file of those that were allowed once.
        allowed: Further ones, each as it is as an owner, or `HOST[:PORT]` for one with TLS or on this machine.
        remotes: URLs of the user's own remotes.
        docker: docker's config.json; who has a login there is known.
    """

    path: Path
    allowed: Sequence[str] = ()
    remotes: Sequence[str] = ()
    docker: Path | None = None

    def knows(self, found: str) -> bool:
        """Tell whether an owner is one of them; nothing but files is read."""
        from .oci import credentials

        if found in ("", _HUGGING_FACE, *user_files.read(self.path).splitlines()):
            return True
        for url in self.remotes:
            with suppress(AdapterhubError):  # a remote that cannot be used is reported where it is used
                if location.parse(nobody(url)).owner == found:
                    return True
        parts = urlsplit(found)
        if parts.scheme not in ("https", "http"):
            return found in self.allowed
        plain = parts.scheme == "http" and not is_loopback(parts.hostname or "")
        names = {found} if plain else {found, parts.netloc}
        listed = any(text.rstrip("/").lower() in names for text in self.allowed)
        return listed or (self.docker is not None and credentials.is_named(parts.netloc, self.docker, plain=plain))

    def keep(self, found: str) -> None:
        """Remember one."""
        if not self.knows(found):
            user_files.change(self.path, lambda text: (text or _HEAD) + f"{found}\n")
