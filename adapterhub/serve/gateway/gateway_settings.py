"""The settings that a gateway is started with."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from adapterhub.operations.workspace import Workspace
from adapterhub.serve.model_names import AllowedNames
from adapterhub.serve.usage.record_place import Place
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.lazy_dataclass import dataclass

from .spans import Tracing


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The settings of a gateway.

    Attributes:
        base: The base, on which versions are resolved.
        base_name: The name under which the base itself is asked for.
        workspace: Where names are looked up.
        remote: The URL of the remote where names are looked up instead; empty for the registry of the workspace.
        remote_name: The name of the remote, which names may begin with: `hub/team/sql`; empty if it has none.
        allowed: The names of adapters that are served.
        routes: The TOML file of routes and keys; None without one.
        usage: Where usage is recorded; None to record none.
        keep_text: Whether comments of feedback are kept.
        tracing: Where spans of OpenTelemetry go; None for none.
        host: The address to bind.
        port: The port, 0 for a free one.
        requests: Requests that run at once; more are told to try again later.
        max_body: Bytes of one request.
        bodies: Bytes of all requests that are being read or answered.
        poll: Seconds between two looks at the tags in use and the files of rules; for a remote, also how long an answer is
            used.
        certificate: The PEM file of a certificate, to serve HTTPS; None for HTTP.
        key: The PEM file of its private key.
        behind_proxy: Whether a proxy in front terminates TLS.
        cors: The origins whose pages may use the API; "*" for any.
    """

    base: BaseSpec
    base_name: str
    workspace: Workspace = field(repr=False)
    remote: str = ""
    remote_name: str = ""
    allowed: AllowedNames = field(default_factory=AllowedNames)
    routes: Path | None = None
    usage: Place | None = None
    keep_text: bool = False
    tracing: Tracing | None = field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    requests: int = 256
    max_body: int = 16 << 20
    bodies: int = 256 << 20
    poll: float = 1.0
    certificate: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False
    cors: frozenset[str] = frozenset()
