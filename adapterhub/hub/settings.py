"""The settings a hub is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.http.urls import ProxyOf, address_without_credentials, no_proxy
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub.remotes.remote_address import UserSettings


CLASSES = ("api", "resolvers", "pages")
"""Classes of requests for rate limits: APIs, downloads of files, and everything else."""


MAX_MIRRORED = 20_000_000_000
"""The default limit of a mirrored repository: bytes of all its files."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The hub that is mirrored.

    Attributes:
        prefix: What precedes a name in an address there: `hf://`, or `hub+https://HOST/`.
        endpoint: Its URL.
        age: Seconds until `main` of a fetched repository is checked again.
        max_bytes: Limit for all files of one repository.
        proxy: The proxy for a scheme and a host.
    """

    prefix: str
    endpoint: str
    age: float = 3600.0
    max_bytes: int = MAX_MIRRORED
    proxy: ProxyOf = no_proxy


UPSTREAM_MODES = ("redirect", "cache")
"""How requests for models of the upstream are answered: clients are sent there, or the models are fetched and kept here."""
UPSTREAM_AGE, UPSTREAM_BYTES = 300.0, 200_000_000_000
"""The default seconds until a branch of the upstream is looked at again, and bytes of its models kept."""


@dataclass(frozen=True, slots=True)
class ModelUpstream:
    """The hub that has the models that are not here, such as the bases of adapters.

    Attributes:
        endpoint: Its URL.
        mode: One of `UPSTREAM_MODES`.
        organizations: Whose models are taken from it, in lower case; a name without a slash is that of a model. Empty for all.
        token: The operator's token there, for the mode `cache`; None without one.
        age: Seconds until a branch or tag is looked at again.
        max_bytes: Limit for everything that is kept of it.
        proxy: The proxy for a scheme and a host.
    """

    endpoint: str
    mode: str = UPSTREAM_MODES[0]
    organizations: frozenset[str] = frozenset()
    token: str | None = field(default=None, repr=False)
    age: float = UPSTREAM_AGE
    max_bytes: int = UPSTREAM_BYTES
    proxy: ProxyOf = no_proxy


@dataclass(frozen=True, slots=True)
class Replication:
    """A place to which names of this hub are copied.

    Attributes:
        pattern: Which names (`fnmatch`).
        url: The URL of a hub that runs adapterhub, `hub+https://HOST`, or of an OCI registry, `oci://HOST/PREFIX`.
        user: The operator's logins.
        with_private: Whether an OCI registry, which has no private names, gets those that not everybody may read here.
    """

    pattern: str
    url: str
    user: UserSettings = field(repr=False)
    with_private: bool = False

    @property
    def key(self) -> str:
        """What identifies it in the tables and the metrics."""
        return f"{self.pattern}={self.url}"

    @property
    def is_hub(self) -> bool:
        """Whether it is a hub."""
        return self.url.startswith("hub+")


@dataclass(frozen=True, slots=True)
class Provider:
    """The OpenID Connect provider people sign in with.

    Attributes:
        issuer: Its URL, as ID tokens name it.
        client: The hub's client id there.
        secret: The hub's client secret; empty for a public client.
        scope: The scopes requested, separated by spaces.
        proxy: The proxy for a scheme and a host.
    """

    issuer: str
    client: str
    secret: str = field(default="", repr=False)
    scope: str = "openid email profile"
    proxy: ProxyOf = no_proxy


@dataclass(frozen=True)
class GarbageCollection:
    """The command that collects the garbage of a hub, in an environment, and the seconds after which it is run again."""

    every: float
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The settings of a hub.

    Attributes:
        registry: The folder of its registry; with `database`, only a cache that can be rebuilt.
        host: The address to bind.
        port: The port; 0 picks a free one.
        url: The hub's public URL, without a trailing slash; empty to use the Host header of each request.
        require_login: Require a token even to read public adapters.
        behind_proxy: A TLS-terminating proxy is in front: trust its X-Forwarded headers.
        certificate, key: PEM files for TLS; None to serve plain HTTP.
        policy: Requirements on adapters; None for no requirements.
        max_file: Limit in bytes of one file.
        database: The address of a PostgreSQL that several processes share; empty to keep everything in the folder.
        blobs: The address of a bucket they share, such as `s3://bucket/prefix`.
        environ: Environment with the bucket's credentials.
        proxy_blobs: Send blobs through the hub, for clients that cannot reach the bucket.
        cache: Bytes of blobs to cache locally.
        limits: For each class of requests (`CLASSES`), how many a token, or an address without one, may make in how many
            seconds.
        mirror: The hub whose adapters are fetched on demand; None to serve only what was pushed here.
        upstream: The hub that has the models that are not here; None to answer that they do not exist.
        provider: Where people sign in; None for tokens only.
        replications: The places to which what is pushed here is copied.
        collection: The garbage collection that it runs; None to leave that to others.
    """

    registry: Path
    host: str = "127.0.0.1"
    port: int = 8090
    url: str = ""
    require_login: bool = False
    behind_proxy: bool = False
    certificate: Path | None = None
    key: Path | None = None
    policy: Policy | None = field(default=None, repr=False)
    max_file: int = 1 << 40
    database: str = field(default="", repr=False)
    blobs: str = ""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxy_blobs: bool = False
    cache: int = 10 << 30
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    mirror: Upstream | None = None
    upstream: ModelUpstream | None = None
    provider: Provider | None = None
    replications: tuple[Replication, ...] = ()
    collection: GarbageCollection | None = None

    @property
    def location(self) -> str:
        """The folder of the registry, or the addresses of the database and the bucket, for people to read."""
        return f"{address_without_credentials(self.database)} {self.blobs}" if self.database else str(self.registry)
