"""The address of an adapter on a Hugging Face Hub: `hf://org/name[@revision]`, or `…@sha256:…`.

The names have the grammar of `bases/hub`. `hub+https://HOST/org/name` is a repository of another hub that speaks the same
endpoints; plain `https://` stays what it is for a base, an address of files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

from adapterhub.bases.hub_address import MAIN, SCHEME, Place
from adapterhub.digest import Digest, parse_digest
from adapterhub_converters.errors import UsageError

_SCHEMES = {"hf": "", "hub+https": "https", "hub+http": "http"}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?")
_HINT = "Write it like hf://org/name or hf://org/name@revision"


@dataclass(frozen=True, slots=True)
class HubAddress:
    """One repository of a hub, and which version in it: a branch, a tag or a commit (`tag`), a digest, or neither.

    `endpoint` is empty for the hub that HF_ENDPOINT means.
    """

    scheme: str
    endpoint: str
    name: str
    tag: str | None = None
    digest: Digest | None = None

    mark = "@"  # before a version

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """What `hf://…` says; UsageError says what is wrong with it, and never repeats a password."""
        scheme, _, rest = text.partition("://")
        scheme, host = scheme.lower(), ""
        if _SCHEMES.get(scheme):
            host, _, rest = rest.partition("/")
            if "@" in host:
                shown = f"{scheme}://…@{host.rpartition('@')[2]}/{rest}"
                raise UsageError(shown, "credentials in an address end up in logs", "Leave them out; use HF_TOKEN")
            if not _HOST.fullmatch(host):
                raise UsageError(
                    text, f"{host[:80]!r} is not the name of a host", f"Write it like {scheme}://hub.example/org/name"
                )
        repo, at, digest = rest.partition("@sha256:")
        place = Place.parse(SCHEME + repo)
        if place.path or "/" not in place.repo:
            raise UsageError(text, "an adapter on a hub is a repository, org/name", _HINT)
        if at and "@" in repo:
            raise UsageError(text, "a revision and a digest at once", "Leave one of them out")
        return cls(
            scheme,
            f"{_SCHEMES[scheme]}://{host}" if host else "",
            place.repo,
            place.revision if "@" in repo else None,
            parse_digest(f"sha256:{digest}", text) if at else None,
        )

    @property
    def host(self) -> str:
        """The host, or `hf`."""
        return self.endpoint.partition("://")[2] or "hf"

    @property
    def reference(self) -> str:
        """The digest, else the revision, else `main`."""
        return self.digest or self.tag or MAIN

    @property
    def title(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def repository(self) -> str:
        """The address without a version."""
        host = f"{self.host}/" if self.endpoint else ""
        return f"{self.scheme}://{host}{self.name}"

    @property
    def version(self) -> str:
        """The address with a version."""
        return self.at(self.reference)

    def at(self, reference: str) -> str:
        """The address with a version of one's own."""
        return f"{self.repository}@{quote(reference, safe=':')}"

    def __str__(self) -> str:
        return self.version if self.tag or self.digest else self.repository
