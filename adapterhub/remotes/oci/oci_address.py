"""The address of an adapter in an OCI registry: `oci://host[:port]/name[:tag|:^1.2]` or `…@sha256:…`.

Names and tags have the grammar of the distribution-spec (v1.1, "Pulling manifests"). The protocol is HTTPS, except for this
machine itself and for `oci+http://`; `oci+https://` is for a registry on this machine that has a certificate.
"""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.http.boundary import is_loopback
from adapterhub.ref import LATEST, is_tag, parse_prefix
from adapterhub.registry import version_selection
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

_SCHEMES = {"oci": None, "oci+http": False, "oci+https": True}
_NAME = safe_regex.Pattern(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_HOST = safe_regex.Pattern(r"(?i)[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f:.]+")
_HINT = "Write it like oci://registry.example/team/sql:v2"
_API_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}


@dataclass(frozen=True, slots=True)
class OciAddress:
    """One repository in a registry, optionally at a version: a tag or a range, or a digest or its first digits.

    `host` is as it was written, with the port if there was one; credentials are stored under it.
    """

    host: str
    name: str
    tag: str | None = None
    digest: Digest | None = None
    tls: bool = True
    scheme: str = "oci"

    mark = ":"  # before a tag

    @classmethod
    def parse(cls, text: str) -> OciAddress:
        """Parse an address.

        Raises:
            UsageError: It is invalid. The message never repeats a password.
        """
        scheme, _, remainder = text.partition("://")
        netloc, _, path = remainder.partition("/")
        # Remove a password before any error can quote the address.
        _, at, host = netloc.rpartition("@")
        redacted = f"{scheme}://…@{host}/{path}" if at else text
        if at:
            problem = "credentials in an address end up in logs"
            raise UsageError(redacted, problem, "Remove them", code="credentials-in-address", host=host)
        host, port = _host_and_port(redacted, netloc)
        path, at, digest = path.partition("@")
        name, colon, tag = path.partition(":")
        if at and colon:
            raise UsageError(redacted, "both a tag and a digest", f"Write {scheme}://{netloc}/{name}:{tag} or …@{digest}")
        if scheme.lower() not in _SCHEMES or not _NAME.fullmatch(name) or len(name) > 255:
            raise UsageError(redacted, f"{name[:80]!r} is not a valid name in a registry", _HINT)
        if colon and not (is_tag(tag) or (version_selection.is_range(tag) and semver.parse_range(tag))):
            raise UsageError(
                redacted, f"{tag[:80]!r} is not a valid tag", "Use up to 128 of A-Z a-z 0-9 . _ -, not . or - first"
            )
        tls = _SCHEMES[scheme.lower()]
        host_and_port = host if port is None else f"{host}:{port}"
        return cls(
            host_and_port,
            name,
            tag if colon else None,
            parse_prefix(digest, redacted) if at else None,
            not is_loopback(host) if tls is None else tls,
            scheme.lower(),
        )

    @property
    def reference(self) -> str:
        """The digest, else the tag or range, else `latest`."""
        return self.digest or self.tag or LATEST

    @property
    def title(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def version(self) -> str:
        """The address with a version."""
        return f"{self.repository}{'@' if self.digest else ':'}{self.reference}"

    @property
    def owner(self) -> str:
        """The host, with `https://` or `http://`."""
        return f"http{'s' if self.tls else ''}://{self.host}".lower()

    @property
    def registry_url(self) -> str:
        """The URL of the registry."""
        return f"http{'s' if self.tls else ''}://{_API_HOSTS.get(self.host, self.host)}"

    @property
    def repository_url(self) -> str:
        """The URL of the repository."""
        return f"{self.registry_url}/v2/{self.name}"

    def manifest_url(self, reference: str) -> str:
        """Return the URL of the manifest of a tag or a digest."""
        return f"{self.repository_url}/manifests/{quote(reference, safe=':')}"

    def blob_url(self, digest: Digest) -> str:
        """Return the URL of a blob in the repository."""
        return f"{self.repository_url}/blobs/{digest}"

    def scope(self, *, write: bool = False) -> str:
        """Return the scope of a token to read the repository, or to write to it too."""
        return f"repository:{self.name}:pull{',push' if write else ''}"

    @property
    def is_plaintext(self) -> bool:
        """Whether others can listen on the way: no TLS, and another machine."""
        return not self.tls and not is_loopback(urlsplit(f"//{self.host}").hostname or "")

    @property
    def login(self) -> str:
        """The host to log in to; with its scheme for plain HTTP, for which credentials are stored separately."""
        return f"{self.scheme}://{self.host}" if self.is_plaintext else self.host

    @property
    def repository(self) -> str:
        """The address without a version."""
        return f"{self.scheme}://{self.host}/{self.name}"

    def __str__(self) -> str:
        return self.repository + (f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else "")


def _host_and_port(text: str, netloc: str) -> tuple[str, int | None]:
    try:
        # `urlsplit` raises for a port out of range, and strips the brackets of an IPv6 address.
        url_parts = urlsplit(f"//{netloc}")
        host, port = url_parts.hostname or "", url_parts.port
    except ValueError as error:
        raise UsageError(text, f"not a valid address of a registry ({error})", _HINT) from error
    if not _HOST.fullmatch(host):
        raise UsageError(text, f"{host[:80]!r} is not a valid host", _HINT)
    return (f"[{host}]" if ":" in host else host), port
