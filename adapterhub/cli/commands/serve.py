"""`adapterhub serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapterhub.cli import engines, environment, output, registry_choice, remote_choice
from adapterhub.cli.options import Settings, SwappedOption, command, usage_file_option
from adapterhub.cli.registry_choice import workspace


def _name_of(source: str) -> str:
    """Return the name in a ref, without its tag or digest: what a pattern of `--adapters` is compared with."""
    return source.partition("@")[0].partition(":")[0]


@command(
    "serve",
    example="""
    adapterhub serve smollm2.gguf --adapters 'team/*'
    adapterhub serve ./Qwen3-0.6B --engine vllm --adapters 'team/*' --route routes.toml -- --dtype float32
    adapterhub serve smollm2.gguf --adapters 'team/*' --remote hub
    adapterhub serve ./Qwen3-0.6B --engine vllm --engine-url http://127.0.0.1:8001""",
)
@click.argument("base")
@click.argument("more", metavar="[-- ENGINE OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@engines.engine_options
@click.option("--adapters", metavar="PATTERN", multiple=True, help="Names to serve, like team/*; repeatable. [default: all]")
@remote_choice.served_remote_option
@click.option(
    "--poll",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 86400),
    help="Time between checks of tags, routes and policies. [default: 1, with --remote 5]",
)
@click.option("--route", "routes", metavar="FILE", type=click.Path(path_type=Path), help="TOML file of routes and keys.")
@usage_file_option("where requests and tokens are recorded.")
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 for a free one."
)
@click.option(
    "--max-adapters",
    metavar="N",
    type=click.IntRange(1, 10_000),
    default=8,
    show_default=True,
    help="Maximum number of versions loaded at once.",
)
@click.option("--one-process", is_flag=True, help="One llama-server for all versions, for a GPU; allows blends.")
@click.option("--plugin", is_flag=True, help="The vLLM at --engine-url has adapterhub's plugin, and finds versions itself.")
@click.option(
    "--max-requests",
    metavar="N",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Maximum number of requests at once.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that answer clients, in front of one engine.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 86400),
    default=600.0,
    show_default=True,
    help="Time until an answer must begin, and between two pieces of it.",
)
@click.option("--behind-proxy", is_flag=True, help="A proxy in front terminates TLS; trust its X-Forwarded-Proto.")
@click.option(
    "--cors",
    metavar="ORIGIN",
    multiple=True,
    help="Site whose pages may use the API, like https://app.example; repeatable. * for any needs keys.",
)
@click.option("--certificate", metavar="PEM", type=click.Path(path_type=Path), help="Certificate, to serve HTTPS.")
@click.option("--key", metavar="PEM", type=click.Path(path_type=Path), help="Key, in PEM: the private one of the certificate.")
@click.option("--base", "swapped", cls=SwappedOption, in_order=lambda source, base: (base, "--adapters", _name_of(source)))
@click.pass_obj
def serve(
    settings: Settings,
    /,
    *,
    base: str,
    more: tuple[str, ...],
    adapters: tuple[str, ...],
    remote: str | None,
    poll: float | None,
    routes: Path | None,
    usage_file: Path | None,
    host: str,
    port: int,
    max_adapters: int,
    one_process: bool,
    plugin: bool,
    max_requests: int,
    workers: int,
    timeout: float,
    behind_proxy: bool,
    cors: tuple[str, ...],
    certificate: Path | None,
    key: Path | None,
    **engine_settings: Any,
) -> None:
    """Serve a base model with every adapter of the registry, over OpenAI's API.

    `model` is a REF (NAME, NAME:TAG or NAME@sha256:…), a name of the route file, or the base's own. A tag is looked up for each
    request, at a remote every few seconds; while the remote is down, the last answer is used. The version that answered is in
    the header x-adapterhub-version. Without options, only this machine can reach it. Any other address needs TLS, here or in a
    proxy, and a route file with keys. The route file and the policy are read again when they change, and on SIGHUP.
    """
    from adapterhub.http_server import logs
    from adapterhub.operations.workspace import Workspace
    from adapterhub.serve.gateway import cross_origin, route_file, server, spans
    from adapterhub.serve.gateway.gateway_settings import GatewaySettings
    from adapterhub.serve.model_names import AllowedNames
    from adapterhub.serve.usage import usage_database

    logs.log_to_stderr("adapterhub.serve", as_json=settings.as_json)
    fields: dict[str, Any] = {
        "max_adapters": max_adapters,
        "one_process": one_process,
        "has_plugin": plugin,
        "extra_words": more,
        "timeout": timeout,
        "listed": route_file.read(routes).engines if routes else (),
    }
    remote_ = None if remote is None else remote_choice.remote_at(remote)
    tracing = spans.open_tracing() if environment.is_traced() else None
    with engines.open_engine(base, settings, **engine_settings, **fields) as chosen:
        gateway = GatewaySettings(
            base=chosen.spec,
            base_name=chosen.name,
            workspace=replace(workspace(settings), policy=Workspace().policy),  # reads the policy file each time
            remote=remote_.url if remote_ else "",
            remote_name=remote_.name if remote_ else "",
            allowed=AllowedNames.from_patterns(adapters),
            routes=routes,
            tracing=tracing,
            usage=usage_file or registry_choice.registry_folder(settings) / usage_database.FILE,
            host=host,
            port=port,
            # A remote is asked over the network, so less often.
            poll=poll or (5.0 if remote_ else 1.0),
            requests=max_requests,
            certificate=certificate,
            key=key,
            behind_proxy=behind_proxy,
            cors=cross_origin.parse_origins(cors),
        )

        def ready(address: str) -> None:
            started = chosen.engine
            document = {
                "url": address,
                "base": chosen.name,
                "engine": started.name,
                "context": started.context or None,
                "precision": started.precision or None,
            }
            facts = f" ({chosen.facts})" if chosen.facts else ""
            text = f"{address}/v1  serves {chosen.name} by {started.name}{facts}; stop it with Ctrl-C"
            output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
            output.flush()

        try:
            server.serve(gateway, chosen.engine, ready=ready, workers=workers)
        finally:
            if tracing is not None:
                tracing.close()
