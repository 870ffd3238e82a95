"""The hosts that the user has dealt with before: the owners of addresses (`RemoteAddress.owner`).

A project's files travel with its repository, so their author chooses the hosts in them. Such a host is contacted only if it is
known: from the user's own remotes and logins, from an answer given once, which is kept in a file, or from a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from adapterhub import user_files
from adapterhub.http.boundary import is_loopback
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from . import remote_address
from .named_remotes import unused_address

_HUGGING_FACE = "https://huggingface.co"
_HEAD = "# Whom adapterhub may ask although only a project names them, one a line.\n"


@dataclass(frozen=True)
class KnownHosts:
    """The owners of addresses that a user has dealt with.

    Attributes:
        path: The file of those that were allowed once.
        allowed: Further owners, or `HOST[:PORT]` for one with TLS or on this machine.
        remotes: URLs of the user's own remotes.
        docker: docker's config.json; hosts with a login in it are known.
    """

    path: Path
    allowed: Sequence[str] = ()
    remotes: Sequence[str] = ()
    docker: Path | None = None

    def is_known(self, owner: str) -> bool:
        """Return whether an owner is known; only files are read."""
        from .oci import docker_credentials

        if owner in ("", _HUGGING_FACE, *user_files.read(self.path).splitlines()):
            return True
        for url in self.remotes:
            with suppress(AdapterhubError):  # an unusable remote is reported when it is used
                if remote_address.parse(unused_address(url)).owner == owner:
                    return True
        # Only HTTP has the short form HOST[:PORT], and logins.
        url_parts = urlsplit(owner)
        if url_parts.scheme not in ("https", "http"):
            return owner in self.allowed
        is_plaintext = url_parts.scheme == "http" and not is_loopback(url_parts.hostname or "")
        # A bare HOST in the list means one with TLS or on this machine; plain HTTP elsewhere needs the full owner.
        names = {owner} if is_plaintext else {owner, url_parts.netloc}
        is_listed = any(text.rstrip("/").lower() in names for text in self.allowed)
        return is_listed or (
            self.docker is not None and docker_credentials.is_configured(url_parts.netloc, self.docker, plain=is_plaintext)
        )

    def remember(self, owner: str) -> None:
        """Remember an owner."""
        if not self.is_known(owner):
            user_files.change(self.path, lambda text: (text or _HEAD) + f"{owner}\n")
