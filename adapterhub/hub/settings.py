"""What a hub is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.http.urls import ProxyOf, no_proxy

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy


CLASSES = ("api", "resolvers", "pages")
"""Classes of requests: to an API, for the bytes of files, and all others."""


MAX_MIRRORED = 20_000_000_000
"""Bytes of all files of a repository that is mirrored, by default."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The hub that is mirrored.

    Attributes:
        prefix: What comes before a name in an address there: `hf://`, or `hub+https://HOST/`.
        endpoint: Its URL.
        age: Seconds until `main` of what was fetched is looked at again.
        max_bytes: Of all files of one repository.
        proxy: The proxy for a scheme and a host.
    """

    prefix: str
    endpoint: str
    age: float = 3600.0
    max_bytes: int = MAX_MIRRORED
    proxy: ProxyOf = no_proxy


@dataclass(frozen=True, slots=True)
class Provider:
    """The OpenID Connect provider with which people sign in.

    Attributes:
        issuer: Its URL, as ID tokens name it.
        client: The id that the hub has there.
        secret: The hub's secret there; empty for a public client.
        scope: What is asked for, in words with a space between.
        proxy: The proxy for a scheme and a host.
    """

    issuer: str
    client: str
    secret: str = field(default="", repr=False)
    scope: str = "openid email profile"
    proxy: ProxyOf = no_proxy


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The settings of a hub.

    Attributes:
        registry: The folder of its registry; with a database, for copies that can be made again.
        host: The address to bind.
        port: The port, 0 for a free one.
        url: The hub as its clients reach it, without a slash at the end; empty for the host of each request.
        require_login: Ask for a token even to read what is public.
        behind_proxy: A proxy that ends TLS is in front: trust its X-Forwarded headers.
        certificate, key: PEM files for TLS; None to serve plain HTTP.
        policy: Requirements on adapters, None for none.
        max_file: Bytes of one file.
        database: The address of a PostgreSQL that several processes share; empty to keep everything in the folder.
        blobs: The address of a bucket that they share, like `s3://bucket/prefix`.
        environ: Has the credentials of the bucket.
        proxy_blobs: Send blobs through the hub, for clients that cannot reach the bucket.
        cache: Bytes of blobs that are kept here as well.
        limits: Requests by class (`CLASSES`) and the seconds in which a token, or an address without one, may make them.
        mirror: The hub whose adapters are fetched when somebody asks for them; None to have only what was pushed here.
        provider: Where people sign in; None for tokens only.
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
    provider: Provider | None = None
