"""`adapterhub hub start`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, output, registry_choice
from adapterhub.cli.configured_command import ConfiguredCommand
from adapterhub.cli.options import Settings
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.hub.settings import GarbageCollection, HubSettings, ModelUpstream, Provider, Replication


@click.command(
    "start",
    cls=ConfiguredCommand,
    short_help="Start the hub.",
    example="""
    adapterhub hub start
    adapterhub hub start --host 0.0.0.0 --behind-proxy --require-login --url https://hub.example
    adapterhub hub start --url https://hub.example --oidc-issuer https://login.example --oidc-client hub
    adapterhub hub start --database postgresql://hub@db.example/hub --blobs s3://bucket/hub
    adapterhub hub start --config /etc/adapterhub/hub.toml""",
)
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65535), default=8090, show_default=True, help="Port; 0 for a free one."
)
@click.option(
    "--url", metavar="URL", default="", help="Address: the hub's, as clients reach it. [default: the one in each request]"
)
@click.option("--require-login", is_flag=True, help="Ask for a token to read public adapters too.")
@click.option("--behind-proxy", is_flag=True, help="A proxy in front terminates TLS; trust its X-Forwarded-Proto.")
@click.option("--certificate", metavar="PEM", type=click.Path(path_type=Path), help="Certificate, to serve HTTPS.")
@click.option("--key", metavar="PEM", type=click.Path(path_type=Path), help="Key, in PEM: the private one of the certificate.")
@click.option("--database", metavar="URL", help="PostgreSQL that several processes share.")
@click.option("--blobs", metavar="URL", help="Bucket that they share, like s3://BUCKET/PREFIX.")
@click.option("--proxy-blobs", is_flag=True, help="Send blobs through the hub, for clients that cannot reach the bucket.")
@click.option("--cache", metavar="GB", type=click.FloatRange(0), default=10, show_default=True, help="Copies of blobs to keep.")
@click.option(
    "--rate-limit",
    "limits",
    metavar="CLASS=N/SECONDS",
    multiple=True,
    help="Requests to the api, the resolvers (files) or the pages that a token, or an address, may make; repeatable.",
)
@click.option("--mirror", metavar="URL", help="Fetch adapters that are not here from hf:// or hub+https://HOST, and keep them.")
@click.option(
    "--mirror-age",
    metavar="SECONDS",
    type=click.FloatRange(1),
    default=3600,
    show_default=True,
    help="Look for newer versions of what was fetched after this time.",
)
@click.option(
    "--mirror-max-size",
    metavar="GB",
    type=click.FloatRange(0),
    default=20,
    show_default=True,
    help="Fetch no larger repository.",
)
@click.option(
    "--upstream",
    metavar="URL",
    help="Answer for models that are not here with those of hf:// or hub+https://HOST.",
)
@click.option(
    "--upstream-mode",
    type=click.Choice(["redirect", "cache"]),
    default="redirect",
    show_default=True,
    help="Send clients there, or fetch models and keep them here.",
)
@click.option(
    "--upstream-allow",
    metavar="ORG",
    multiple=True,
    help="Only models of this organization; repeatable.",
)
@click.option(
    "--upstream-age",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=300,
    show_default=True,
    help="Look again where a branch is after this time.",
)
@click.option(
    "--upstream-cache",
    metavar="GB",
    type=click.FloatRange(0),
    default=200,
    show_default=True,
    help="Models to keep; those used last stay.",
)
@click.option(
    "--replicate",
    "replications",
    metavar="PATTERN=URL",
    multiple=True,
    help="Copy names like team/* on to oci://HOST/PREFIX or hub+https://HOST; repeatable.",
)
@click.option("--replicate-private", is_flag=True, help="Copy names that not everybody may read to oci:// too.")
@click.option(
    "--gc-every",
    metavar="HOURS",
    type=click.FloatRange(min=0, min_open=True),
    help="Hours between two runs of `adapterhub gc`, at low priority. [default: never]",
)
@click.option("--oidc-issuer", metavar="URL", help="Let people sign in with this OpenID Connect provider.")
@click.option("--oidc-client", metavar="ID", help="Id of the hub there.")
@click.option(
    "--oidc-secret",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar=environment.OIDC_SECRET_FILE,
    help="File with its secret there. [default: the secret in $ADAPTERHUB_OIDC_SECRET]",
)
@click.option(
    "--oidc-scope", metavar="WORDS", default="openid email profile", show_default=True, help="Scopes that are asked for."
)
@click.pass_obj
def start(
    settings: Settings,
    *,
    host: str,
    port: int,
    url: str,
    require_login: bool,
    behind_proxy: bool,
    certificate: Path | None,
    key: Path | None,
    database: str | None,
    blobs: str | None,
    proxy_blobs: bool,
    cache: float,
    limits: tuple[str, ...],
    mirror: str | None,
    mirror_age: float,
    mirror_max_size: float,
    upstream: str | None,
    upstream_mode: str,
    upstream_allow: tuple[str, ...],
    upstream_age: float,
    upstream_cache: float,
    replications: tuple[str, ...],
    replicate_private: bool,
    gc_every: float | None,
    oidc_issuer: str | None,
    oidc_client: str | None,
    oidc_secret: Path | None,
    oidc_scope: str,
) -> None:
    """Serve the registry until the command is stopped; the registry is created if it is missing.

    Without options, only this machine can reach it. Any other address needs TLS, here or in a proxy, and --require-login.
    Writing always needs a token: see `adapterhub hub token create`.

    With --oidc-issuer people sign in with their account there, once a rule admits them: see `adapterhub hub admission add`.

    With --upstream, clients that set HF_ENDPOINT to the hub still get base models. A token for models that are gated there
    comes from ADAPTERHUB_UPSTREAM_TOKEN: all who may read public adapters here may then read those models.

    With --replicate, what is pushed here goes on to another hub or an OCI registry, with the logins that `adapterhub login` has
    stored for the user who starts the hub.

    With --gc-every, it collects garbage once in that time, and packs versions of over a day if the registry's adapterhub.toml
    has pack = true.

    With --database and --blobs, any number of processes on any machines serve the same hub. The folder of the registry then
    has copies only, which are made again without it.

    Each option may come from a variable, ADAPTERHUB_ and its name (--behind-proxy is ADAPTERHUB_BEHIND_PROXY=1; that of
    --oidc-secret is ADAPTERHUB_OIDC_SECRET_FILE), or from the file of --config, as a key (behind_proxy = true). The option
    comes before the variable, the variable before the file. A repeatable one is a list in the file, and words in its variable.
    """
    from adapterhub.http_server import logs
    from adapterhub.hub import server
    from adapterhub.hub.mirror import upstream as other_hub

    provider = _provider(oidc_issuer, oidc_client, oidc_secret, oidc_scope)
    logs.log_to_stderr("adapterhub.hub", as_json=settings.as_json)
    size = int(mirror_max_size * 1e9)
    upstream_mirror = other_hub(mirror, mirror_age, environment.hub, environment.proxy, max_bytes=size) if mirror else None
    models = None
    if upstream:
        models = _model_upstream(upstream, upstream_mode, upstream_allow, age=upstream_age, max_bytes=int(upstream_cache * 1e9))
    hub_settings = registry_choice.hub_settings(
        settings,
        database=database,
        blobs=blobs,
        proxy_blobs=proxy_blobs,
        cache=int(cache * 1e9),
        host=host,
        port=port,
        url=url.rstrip("/"),
        require_login=require_login,
        behind_proxy=behind_proxy,
        certificate=certificate,
        key=key,
        policy=environment.policy(),
        limits=dict(map(_limit, limits)),
        mirror=upstream_mirror,
        upstream=models,
        provider=provider,
        replications=tuple(_replication(settings, text, with_private=replicate_private) for text in replications),
    )
    if gc_every:
        hub_settings = replace(hub_settings, collection=_collection(hub_settings, gc_every * 3600))

    def ready(address: str) -> None:
        access = "only accounts read and write" if require_login else "everybody reads what is public, accounts write"
        text = f"{address}  serves {hub_settings.blobs or hub_settings.registry}: {access}; stop it with Ctrl-C"
        output.emit(
            {"url": address, "registry": str(hub_settings.registry)}, as_json=settings.as_json, text=lambda: output.write(text)
        )
        output.flush()

    server.serve(hub_settings, ready=ready)


def _collection(hub: HubSettings, every: float) -> GarbageCollection:
    """Return the garbage collection of a hub: its own registry, or what its processes share."""
    from adapterhub.hub.settings import GarbageCollection

    options = () if hub.database else ("--registry", str(hub.registry))
    shared = {environment.DATABASE: hub.database, environment.BLOBS: hub.blobs} if hub.database else {}
    return GarbageCollection(every, (sys.executable, "-m", "adapterhub", "gc", *options), {**os.environ, **shared})


def _provider(issuer: str | None, client: str | None, secret: Path | None, scope: str) -> Provider | None:
    """Return the provider at which people sign in; None without one."""
    from adapterhub.hub.settings import Provider

    # A provider knows the hub by its client id, so neither works alone.
    if bool(issuer) != bool(client):
        raise UsageError(
            "--oidc-issuer", "needs --oidc-client, and the other way around", "Give both, or none", code="conflicting-options"
        )
    if not (issuer and client):
        return None
    return Provider(issuer, client, environment.oidc_secret(secret), scope, environment.proxy)


def _model_upstream(address: str, mode: str, names: tuple[str, ...], *, age: float, max_bytes: int) -> ModelUpstream:
    """Return the hub that has the base models which are not here."""
    from adapterhub.hub.mirror import upstream
    from adapterhub.hub.settings import ModelUpstream

    return ModelUpstream(
        upstream(address, age, environment.hub).endpoint,
        mode,
        frozenset(name.lower() for name in names),
        token=environment.upstream_token(),
        age=age,
        max_bytes=max_bytes,
        proxy=environment.proxy,
    )


def _replication(settings: Settings, text: str, *, with_private: bool) -> Replication:
    """Parse a replication such as team/*=oci://registry.example/team; the logins are those of the user who starts the hub."""
    from adapterhub.hub.settings import Replication
    from adapterhub.remotes.named_remotes import check_url

    pattern, separator, url = text.partition("=")
    if not separator or not pattern or not url.lower().startswith(("oci", "hub+")):
        hint = "Write it like team/*=oci://registry.example/copies, or *=hub+https://hub.example"
        raise UsageError(f"--replicate {text.rpartition('@')[2][:80]}", "not a pattern of names and the URL of a target", hint)
    user = registry_choice.workspace(settings).surroundings()
    uploads = registry_choice.registry_folder(settings) / "replication"
    return Replication(pattern, check_url(url), replace(user, uploads=uploads), with_private)


def _limit(text: str) -> tuple[str, tuple[int, int]]:
    """Parse a limit such as api=1000/300, of so many requests in so many seconds."""
    from adapterhub.hub.settings import CLASSES

    kind, _, remainder = text.partition("=")
    count, _, seconds = remainder.partition("/")
    is_valid = all(number.isascii() and number.isdigit() and 0 < len(number) < 10 for number in (count, seconds))
    if kind not in CLASSES or not is_valid or int(count) < 1 or int(seconds) < 1:
        hint = f"Write it like api=1000/300; the classes are {', '.join(CLASSES)}"
        raise UsageError(f"--rate-limit {text[:80]}", "not a limit", hint)
    return kind, (int(count), int(seconds))
