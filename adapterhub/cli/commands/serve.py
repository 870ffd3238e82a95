"""`adapterhub serve`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from glob import iglob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import engines, environment, inputs, output, registry_choice, remote_choice
from adapterhub.cli.engines import EngineChoice
from adapterhub.cli.options import Command, Settings, adapter_swapped_with_base, base_option, usage_file_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.operations import source_names
from adapterhub.ref import Ref, is_pattern
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.named_remotes import Remote
    from adapterhub.serve.gateway.gateway_settings import GatewaySettings
    from adapterhub.serve.gateway.spans import Tracing
    from adapterhub.serve.model_names import AllowedNames
    from adapterhub.serve.usage.record_place import Place

_ENGINE_WORDS = f"{__name__}.engine-words"
_NAME_BASE = "Pass --base with its folder, or hf://org/model"


class _ServeCommand(Command):
    """A command whose words after `--` are options of the engine."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as other commands do, up to `--`."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[_ENGINE_WORDS] = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])


def _names_and_base(
    sources: tuple[str, ...], base: str | None, settings: Settings, *, is_remote: bool
) -> tuple[AllowedNames, str]:
    """Return the names to serve, and the base: SRC alone may be a base, or record one."""
    from adapterhub.serve.model_names import AllowedNames

    if base is None:
        if not sources:
            raise UsageError("--base", "is missing, and so is a SRC that records one", _NAME_BASE)
        if is_pattern(sources[0]) and not Path(sources[0]).exists():
            raise UsageError(sources[0], "is a pattern of names, which records no base", _NAME_BASE)
        base, model = inputs.base_and_model(sources[0], settings)
        if not model:
            if len(sources) > 1:
                hint = f"Did you mean `adapterhub serve {shlex.join(sources[1:])} --base {shlex.quote(base)}`?"
                raise UsageError(base, "is a base, or nothing that is known, and names follow it", hint)
            return AllowedNames(), base
    allowed = AllowedNames.from_patterns(sources)
    for pattern in allowed.patterns:
        _check_pattern(pattern, settings, is_remote=is_remote)
    return allowed, base


def _check_pattern(pattern: str, settings: Settings, *, is_remote: bool) -> None:
    """Refuse a path, an address, a version, as each request chooses that, and a name that the registry does not have.

    Names at a remote are looked up by the gateway, which may start while the remote is down.
    """
    from adapterhub.serve.model_names import AllowedNames

    if "://" in pattern:
        raise UsageError(
            pattern,
            "is not a name in the registry",
            f"`adapterhub copy {shlex.quote(pattern)} NAMESPACE/NAME` copies it here, or name its remote with --remote",
        )
    if pattern.startswith((".", "/", "~")) or ("/" not in pattern and Path(pattern).exists()):
        raise source_names.not_stored_error(pattern)
    name = pattern.partition("@")[0].partition(":")[0]
    if name != pattern:
        raise UsageError(pattern, "names a version, and each request chooses its own as `model`", f"Write {name}")
    if not is_pattern(pattern):
        ref = Ref.parse(pattern)
        if not is_remote:
            with workspace(settings).open_registry() as registry:
                registry.resolve(ref)
    elif (
        not is_remote
        and (path := next(iglob(pattern), None)) is not None
        and not _has_match(AllowedNames((pattern,)), settings)
    ):
        raise source_names.not_stored_error(path, f"is a path, and no adapter in the registry matches {pattern}")


def _has_match(allowed: AllowedNames, settings: Settings) -> bool:
    """Return whether the registry has one of these names."""
    try:
        with workspace(settings).open_registry() as registry:
            return any(row.name in allowed for row in registry.list())
    except NotFoundError:
        return False  # there is no registry yet


@click.command(
    "serve",
    cls=_ServeCommand,
    example="""
    adapterhub serve 'team/*' --base smollm2.gguf
    adapterhub serve team/sql
    adapterhub serve 'team/*' --base ./Qwen3-0.6B --engine vllm --route routes.toml -- --dtype float32
    adapterhub serve 'team/*' --base smollm2.gguf --remote hub
    adapterhub serve --base ./Qwen3-0.6B --engine vllm --engine-url http://127.0.0.1:8001""",
)
@click.argument("sources", metavar="[SRC]... [-- ENGINE OPTIONS]", nargs=-1)
@base_option("its folder, a GGUF file, or hf://org/model. [default: SRC, or the one it records]")
@engines.engine_options
@remote_choice.served_remote_option
@click.option(
    "--poll",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 86400),
    help="Time between checks of tags, routes and policies. [default: 1; of an hf:// remote 5]",
)
@click.option("--route", "routes", metavar="FILE", type=click.Path(path_type=Path), help="TOML file of routes and keys.")
@usage_file_option("where requests and tokens are recorded.")
@click.option("--keep-text", is_flag=True, help="Keep the comments of feedback, in the record of usage.")
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
@adapter_swapped_with_base
@click.pass_context
def serve(
    context: click.Context,
    /,
    *,
    sources: tuple[str, ...],
    base: str | None,
    remote: str | None,
    routes: Path | None,
    max_adapters: int,
    one_process: bool,
    plugin: bool,
    workers: int,
    timeout: float,
    **options: Any,
) -> None:
    """Serve a base model with adapters of the registry, over OpenAI's API.

    SRC is a name in the registry, or a pattern of names like 'team/*'; without one, every name is served. A base alone may take
    its place.

    `model` is a REF (NAME, NAME:TAG or NAME@sha256:…), a name of the route file, or the base's own. A tag is looked up for each
    request, on a remote every --poll seconds; while that is down, the last answer is used. The version that answered is in the
    header x-adapterhub-version. Without options, only this machine can reach it. Any other address needs TLS, here or in a
    proxy, and a route file with keys. The route file and the policy are read again when they change, and on SIGHUP.
    """
    from adapterhub.http_server import logs
    from adapterhub.serve.gateway import route_file, server, spans

    settings = context.ensure_object(Settings)
    logs.log_to_stderr("adapterhub.serve", as_json=settings.as_json)
    allowed, base = _names_and_base(sources, base, settings, is_remote=remote is not None)
    engine_fields: dict[str, Any] = {name: options.pop(name) for name in engines.OPTION_NAMES} | {
        "max_adapters": max_adapters,
        "one_process": one_process,
        "has_plugin": plugin,
        "extra_words": context.meta[_ENGINE_WORDS],
        "timeout": timeout,
        "listed": route_file.read(routes).engines if routes else (),
    }
    chosen_remote = None if remote is None else remote_choice.remote_at(remote)
    tracing = spans.open_tracing() if environment.is_traced() else None
    with engines.open_engine(base, settings, **engine_fields) as chosen:
        gateway = _gateway_settings(chosen, allowed, settings, remote=chosen_remote, routes=routes, tracing=tracing, **options)
        try:
            server.serve(gateway, chosen.engine, ready=lambda address: _print_start(chosen, address, settings), workers=workers)
        finally:
            if tracing is not None:
                tracing.close()


def _gateway_settings(
    chosen: EngineChoice,
    allowed: AllowedNames,
    settings: Settings,
    *,
    remote: Remote | None,
    routes: Path | None,
    tracing: Tracing | None,
    poll: float | None,
    usage_place: Place | None,
    max_requests: int,
    cors: tuple[str, ...],
    **fields: Any,
) -> GatewaySettings:
    """Return the settings of a gateway in front of an engine.

    Args:
        allowed: The names to serve.
        fields: More of `GatewaySettings`, of which options have the names.
    """
    from adapterhub.operations.workspace import Workspace
    from adapterhub.serve.gateway import cross_origin
    from adapterhub.serve.gateway.gateway_settings import GatewaySettings
    from adapterhub.serve.usage import record_place

    return GatewaySettings(
        base=chosen.spec,
        base_name=chosen.name,
        workspace=replace(workspace(settings), policy=Workspace().policy),  # reads the policy file each time
        remote=remote.url if remote else "",
        remote_name=remote.name if remote else "",
        allowed=allowed,
        routes=routes,
        tracing=tracing,
        usage=usage_place or registry_choice.registry_folder(settings) / record_place.FILE,
        # The public Hub limits the requests of an account, so it is asked less often.
        poll=poll or (5.0 if remote and remote.url.startswith("hf:") else 1.0),
        requests=max_requests,
        cors=cross_origin.parse_origins(cors),
        **fields,
    )


def _print_start(chosen: EngineChoice, address: str, settings: Settings) -> None:
    """Print where a gateway answers, and with what."""
    engine = chosen.engine
    document = {
        "url": address,
        "base": chosen.name,
        "engine": engine.name,
        "context": engine.context or None,
        "precision": engine.precision or None,
    }
    facts = f" ({chosen.facts})" if chosen.facts else ""
    text = f"{address}/v1  serves {chosen.name} by {engine.name}{facts}; stop it with Ctrl-C"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
    output.flush()
