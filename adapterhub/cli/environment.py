"""The registry, remote, hub and settings to use: from options, the environment, the project and the user's files.

Sources are tried in this order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from adapterhub.digest import sha256_bytes
from adapterhub.operations.workspace import Workspace, home_folder, project_file, user_folder
from adapterhub_converters.errors import AdapterhubError, NotFoundError, ParameterError, RemoteError, UsageError

from . import errors
from .options import JOBS, RATE, Settings

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub
    from adapterhub.hub.settings import HubSettings
    from adapterhub.project.policy import Policy
    from adapterhub.project.settings_file import SettingsFile, Validation
    from adapterhub.registry.registry import Registry
    from adapterhub.remotes.known_hosts import KnownHosts
    from adapterhub.remotes.named_remotes import Remote

F = TypeVar("F", bound=Callable[..., Any])
ENVIRONMENT = "ADAPTERHUB_REGISTRY"
REMOTE = "ADAPTERHUB_REMOTE"
AUTHOR = "ADAPTERHUB_AUTHOR"
DATABASE, BLOBS = "ADAPTERHUB_DATABASE", "ADAPTERHUB_BLOBS"
OIDC_SECRET, UPSTREAM_TOKEN = "ADAPTERHUB_OIDC_SECRET", "ADAPTERHUB_UPSTREAM_TOKEN"
ENGINE_KEY = "ADAPTERHUB_ENGINE_KEY"
_MAX_AUTHOR = 100
ALLOW_HOSTS = "ADAPTERHUB_ALLOW_HOSTS"
DEFAULT = ""
"""The value of --remote without a name."""
_COMPLETION_VARIABLE = "_ADAPTERHUB_COMPLETE"  # set by a shell that completes a word


def registry_folder(settings: Settings) -> Path:
    """Return the folder of the registry to use; it may not exist yet."""
    return chosen_registry(settings)[0]


def chosen_registry(settings: Settings) -> tuple[Path, str]:
    """Return the folder of the registry to use, and what chose it."""
    from adapterhub.registry.registry import find

    explicit, chooser = _named_registry(settings)
    if explicit:
        return find(Path.cwd(), explicit=Path(explicit)), chooser
    user_settings = user()
    default = (user_settings and user_settings.registry) or data_folder()
    folder = find(Path.cwd(), default=default)
    if folder != default:
        return folder, "found here" if folder == Path.cwd() else "found above this folder"
    return folder, str(user_file()) if user_settings and user_settings.registry else "the default"


def named_registry(settings: Settings) -> str | None:
    """Return the registry that an option, the environment or the project names."""
    return _named_registry(settings)[0]


def _named_registry(settings: Settings) -> tuple[str | None, str]:
    if settings.registry:
        return settings.registry, "--registry"
    if os.environ.get(ENVIRONMENT):
        return os.environ[ENVIRONMENT], f"${ENVIRONMENT}"
    settings_file = project()
    folder = Workspace(trusts=trusts).admitted_registry(settings_file) if settings_file else None
    return (str(folder), str(settings_file.path)) if settings_file and folder else (None, "")


def workspace(settings: Settings) -> Workspace:
    """Return the workspace of a command: options, variables, the project and its user."""
    from . import output, progress

    context = click.get_current_context(silent=True)
    meta = context.meta if context else {}
    return Workspace(
        # A function, because a command that needs no registry must not fail for one that is missing.
        registry=lambda: registry_folder(settings),
        policy=policy,
        docker=docker_config(),
        hub=hub,
        environ=os.environ,
        proxy=proxy,
        trusts=trusts,
        uploads=data_folder() / "uploads",
        cache=cache_folder(),
        models=hub_cache(),
        tell=lambda note: output.say(output.one_line(note)),
        bar=progress.bytes_bar,
        steps=progress.count_bar,
        jobs=meta.get(JOBS) or 4,
        rate=meta.get(RATE),
        author=author(),
        known_signers=config_folder() / "known_signers",
        opener=_shared_opener(settings),
    )


def open_registry(settings: Settings, *, create: bool = False) -> Registry:
    """Open the registry to use; with `create`, a missing one is created, because a push may come first."""
    return workspace(settings).open_registry(create=create)


def _shared_opener(settings: Settings) -> Callable[[], Registry] | None:
    try:
        hub_settings = shared_hub(settings)
    except UsageError as error:
        problem = error

        # Only once a registry is needed: most commands are about files too.
        def refuse() -> Registry:
            raise problem

        return refuse
    if hub_settings is None:
        return None

    def opener() -> Registry:
        import logging

        from adapterhub.hub.storage.from_settings import open_registry

        # A database that does not answer is reported by its error.
        logging.getLogger("psycopg.pool").addHandler(logging.NullHandler())
        return open_registry(hub_settings)

    return opener


def shared_hub(settings: Settings, *, needs_bucket: bool = True) -> HubSettings | None:
    """Return the settings of the hub in a database and a bucket whose registry is meant; None if that of a folder is.

    The variables of such a hub choose it, unless --registry names a folder with a registry of its own.

    Raises:
        UsageError: Only one of the two is known.
    """
    values = {name: os.environ.get(name, "") for name in (DATABASE, BLOBS)}
    if not any(values.values()):
        return None
    from adapterhub.store.store import FOLDER

    if settings.registry is not None and (registry_folder(settings) / FOLDER).exists():
        return None
    missing = [name for name, value in values.items() if not value and (needs_bucket or name != BLOBS)]
    if missing:
        raise UsageError(missing[0], "not set, and this is for a hub in a database and a bucket", f"Set {missing[0]}")
    shared = hub_settings(settings)
    if named_registry(settings) is None:
        # The copies of one hub only: the folder's name is made of both addresses.
        addresses = " ".join(values.values()).encode()
        return replace(shared, registry=cache_folder() / "hubs" / sha256_bytes(addresses).removeprefix("sha256:")[:16])
    return shared


def author() -> str:
    """Return the author that logs record for a move: ADAPTERHUB_AUTHOR, which may be empty, else git's, else the user."""
    if AUTHOR in os.environ:
        return os.environ[AUTHOR][:_MAX_AUTHOR]
    import getpass

    with suppress(KeyError, OSError):  # the user id has no name, as in some containers
        return (os.environ.get("GIT_AUTHOR_NAME") or getpass.getuser())[:_MAX_AUTHOR]
    return ""


def hub_settings(settings: Settings, **options: Any) -> HubSettings:
    """Return the settings of the hub: in the folder of the registry, or where ADAPTERHUB_DATABASE and ADAPTERHUB_BLOBS say.

    The address of a database contains its password, so it is no option: others on the machine can read the words of a command.
    """
    from adapterhub.hub.settings import HubSettings

    defaults = {"database": os.environ.get(DATABASE, ""), "blobs": os.environ.get(BLOBS, ""), "environ": os.environ}
    given_options = {key: value for key, value in options.items() if value is not None}
    return HubSettings(registry=registry_folder(settings), **{**defaults, **given_options})


def oidc_secret(file: Path | None) -> str:
    """Return the secret of a hub at its provider: from a file, or ADAPTERHUB_OIDC_SECRET; never from the words of a command."""
    from adapterhub_converters.containers.open_file import read_bytes

    if file is None:
        return os.environ.get(OIDC_SECRET, "")
    secret = read_bytes(file, pipe=True).decode("utf-8", "replace").strip()
    if not secret:
        raise UsageError(str(file), "has no secret in it", "Write the secret of the hub at its provider into it")
    return secret


def upstream_token() -> str | None:
    """Return the operator's token at the upstream of a hub: from the environment only, never from the words of a command."""
    token = os.environ.get(UPSTREAM_TOKEN, "").strip()
    if not token.isascii() or not token.isprintable():
        raise UsageError(UPSTREAM_TOKEN, "the token has characters that no token has", "Copy it again")
    return token or None


def complete_ref(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the refs that begin with the typed text, for a shell."""
    try:
        with open_registry(context.find_object(Settings) or Settings()) as registry:
            rows = registry.list()
    except AdapterhubError:
        return []
    return completions({str(row.ref) for row in rows} | {row.name for row in rows}, typed)


# Characters of a word that no shell interprets.
_PLAIN = frozenset(f"{string.ascii_letters}{string.digits}._:/@-")


def completions(names: Iterable[str], typed: str) -> list[CompletionItem]:
    """Return the names that begin with the typed text.

    They come from the files of a clone, and the shell shows them and puts them into its line as they are. Names that could
    control the terminal or run a command there are left out.
    """
    return [CompletionItem(name) for name in sorted(names) if name.startswith(typed) and _PLAIN.issuperset(name)]


def hub() -> Hub:
    """Return the Hugging Face Hub and the user's token, by the variables and files of huggingface_hub (`utils/_auth.py`).

    The library is imported only if it has to get or renew a token: its import takes 0.1 s.
    """
    from adapterhub.bases.hub_address import ENDPOINT, OFFLINE, Hub

    if is_offline():
        raise RemoteError("HF_HUB_OFFLINE", "is set, so nothing is fetched", "Unset it, or use a local copy", code=OFFLINE)
    endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if os.environ.get("HF_OIDC_RESOURCE"):
        token = _renewed_token()
    elif not token.strip() and not _is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        # There may be no token file, or no home directory.
        with suppress(OSError, UnicodeDecodeError, RuntimeError):
            file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
            token = file.read_text()
            # A login in the browser expires, and only the library can renew it.
            if "refresh_token" in (file.parent / "stored_tokens").read_text(encoding="utf-8"):
                token = _renewed_token()
    token = token.replace("\r", "").replace("\n", "").strip()
    # Such characters cannot be sent in a header.
    if not token.isascii() or not token.isprintable():
        raise UsageError(
            "HF_TOKEN", "the token has characters that no token has", "Copy it again, or log in with `hf auth login`"
        )
    return Hub(endpoint, token or None, proxy)


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")


def hub_cache() -> Path:
    """Return the cache of huggingface_hub, by its variables (`constants.py`)."""
    variable = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    with suppress(RuntimeError):  # there is no home directory
        return Path(variable or _hub_home() / "hub").expanduser()
    return Path(variable or _hub_home() / "hub")


def known_hosts() -> KnownHosts:
    """Return the hosts that the user has dealt with, by their files and by ADAPTERHUB_ALLOW_HOSTS."""
    from adapterhub.remotes.known_hosts import KnownHosts

    allowed = [text.strip() for text in os.environ.get(ALLOW_HOSTS, "").split(",")]
    user_settings = user()
    return KnownHosts(
        config_folder() / "known_hosts",
        [text for text in (*allowed, os.environ.get("HF_ENDPOINT", "")) if text],
        list(user_settings.remotes.values()) if user_settings else [],
        docker_config(),
    )


def trusts(owner: str, file: Path) -> bool:
    """Return whether a project may lead to an owner's address: the user knows the owner, or allows it now on a terminal."""
    hosts = known_hosts()
    if hosts.is_known(owner):
        return True
    # A shell that completes a word must not be asked a question.
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or _COMPLETION_VARIABLE in os.environ:
        return False
    from . import output

    if not output.confirm(f"{file.name} names {owner.removeprefix('https://')}, which you have not used before. Connect?"):
        return False
    hosts.remember(owner)
    return True


def remember_host(address: str) -> None:
    """Remember the hosts of an address that the user named, because a file of the project names them from now on."""
    from adapterhub.remotes.remote_address import parse

    known_hosts().remember(parse(address).owner)


def is_offline() -> bool:
    """Return whether the variables of huggingface_hub or transformers forbid access to the Hub."""
    return _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE")


def proxy(scheme: str, host: str) -> str:
    """Return the proxy for a host: by `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, else the system's."""
    import urllib.request

    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    return proxies.get(scheme) or proxies.get("all") or ""


def is_traced() -> bool:
    """Return whether the variables of OpenTelemetry ask for spans, and they can be sent; if they cannot, say why."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, endpoints)) else "none")
    if exporter == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    protocols = (os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}PROTOCOL") for kind in ("TRACES_", ""))
    protocol = next(filter(None, protocols), "http/protobuf")
    if (exporter, protocol) != ("otlp", "http/protobuf"):
        problem = f"they are sent by OTLP as http/protobuf only, not by {exporter} as {protocol}"
    elif not all(map(importlib.util.find_spec, ("opentelemetry", "opentelemetry.sdk"))):
        problem = "OpenTelemetry is not installed; run `pip install 'adapterhub[otel]'`"
    else:
        return True
    from . import output

    output.say(output.one_line(f"the variables OTEL_… ask for spans, but {problem}"))
    return False


def _renewed_token() -> str:
    """Return the token of a login in the browser (`hf auth login`), renewed if it expires soon, or of an OIDC exchange."""
    from huggingface_hub import get_token

    try:
        return get_token() or ""
    except Exception as error:
        problem = str(error).partition("\n")[0].partition(". ")[0][:200]
        hint = "Unset it, and set HF_TOKEN instead"
        raise RemoteError("HF_OIDC_RESOURCE", f"no token could be obtained: {problem}", hint) from error


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def prepare_torch(*, same_bits_in_batches: bool = False) -> None:
    """Set the variables that torch and its libraries read when they are loaded, unless the user has set them.

    OpenMP's threads wait for each other in a busy loop. While another program uses one of the cores, that loop makes a step 3
    to 6 times as long with a spin count of 10,000 as with 1,000, which costs 15 % if no other program runs; 0, which sleeps at
    once, costs more there. No number depends on this setting. cuBLAS gives the same bytes each time only with a work space of
    this kind (docs.nvidia.com/cuda/cublas, "Reproducibility"). Memory in segments that grow leaves fewer holes between rows of
    different lengths.

    Args:
        same_bits_in_batches: Make MKL compute products whose bits do not depend on the size of a batch, on threads, or on where
            its arrays begin. Otherwise they depend on all three on processors with AVX-512 (Intel, "Conditional Numerical
            Reproducibility").
    """
    from adapterhub.training.machine import cores_are_busy

    os.environ.setdefault("GOMP_SPINCOUNT", "0" if cores_are_busy() else "1000")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if same_bits_in_batches:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def data_folder() -> Path:
    """Return the folder of the user's own registry, used when no other is named."""
    return user_folder("data", os.environ)


def cache_folder() -> Path:
    """Return the folder of what can be made again: quantized bases, digests of large files."""
    return user_folder("cache", os.environ)


def config_folder() -> Path:
    """Return the folder of the user's own settings and remotes."""
    return user_folder("config", os.environ)


def user_file() -> Path:
    """Return the path of the user's own settings."""
    return config_folder() / "config.toml"


def docker_config() -> Path:
    """Return the path of docker's config.json, in which docker, oras and `adapterhub login` store credentials."""
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else home_folder() / ".docker") / "config.json"


def lock_file() -> Path:
    """Return the path of the project's lock file, next to its adapterhub.toml; without one, in the working folder."""
    from adapterhub.project.lockfile import FILE

    settings_path = project_file(Path.cwd())
    return (settings_path.parent if settings_path else Path.cwd()) / FILE


@functools.cache
def project() -> SettingsFile | None:
    """Return the settings of the project; another user's file is ignored with a warning."""
    path = project_file(Path.cwd())
    if path is None:
        return None
    from adapterhub import user_files
    from adapterhub.project import settings_file as project

    if not user_files.is_mine(path):
        from . import output

        output.say(output.one_line(f"warning: {path} belongs to another user and is passed over"))
        return None
    return project.read(path, follow=False)


def validation(settings: SettingsFile) -> Validation:
    """Return the options of `adapterhub validate` in a project's settings; raise UsageError for an unknown runtime or code."""
    from adapterhub.checks import check_codes
    from adapterhub_converters.runtime_rules import RUNTIMES

    rules, label = settings.validate, str(settings.path)
    if unknown := [name for name in rules.runtimes if name not in RUNTIMES]:
        raise UsageError(
            f"{label}: validate.runtimes",
            f"unknown runtime {unknown[0]!r}",
            f"One of {', '.join(RUNTIMES)}",
            code="invalid-config",
        )
    try:
        check_codes(rules.ignore)
    except ParameterError as error:
        raise UsageError(f"{label}: validate.ignore", error.what, error.hint, code="invalid-config") from error
    return rules


@functools.cache
def user() -> SettingsFile | None:
    """Return the user's settings for all projects."""
    path = user_file()
    if not path.is_file():
        return None
    from adapterhub.project import settings_file as project

    return project.read(path)


def policy() -> Policy | None:
    """Return the requirements of the project on adapters that are stored or pulled; None without any."""
    settings = project()
    return settings.policy if settings else None


def remotes() -> dict[str, Remote]:
    """Return the remotes by name; one of the project takes precedence over one of the user with the same name."""
    from adapterhub.remotes.named_remotes import Remote

    named_remotes: dict[str, Remote] = {}
    for settings in (user(), project()):
        if settings:
            named_remotes |= {name: Remote(name, url, settings.path) for name, url in settings.remotes.items()}
    return dict(sorted(named_remotes.items()))


def default_remote() -> str | None:
    """Return the name of the remote to use if none is named."""
    named = [settings.remote for settings in (project(), user()) if settings and settings.remote]
    return os.environ.get(REMOTE) or next(iter(named), None)


def remote(name: str) -> Remote:
    """Return a remote by its name, or the default one."""
    named_remotes = remotes()
    remote_name = name or default_remote()
    hint = (
        f"Name one of {', '.join(named_remotes)}"
        if named_remotes
        else "Add one with `adapterhub remote add NAME URL --default`"
    )
    if not remote_name:
        raise UsageError("--remote", "there is no default remote", hint)
    if remote_name not in named_remotes:
        raise NotFoundError(remote_name[:80], "no remote of this name", hint)
    from adapterhub.remotes.named_remotes import check_url

    # People edit these files, so a URL is checked when it is used.
    check_url(named_remotes[remote_name].url)
    return named_remotes[remote_name]


def trusted_remote(name: str) -> Remote:
    """Return a remote by its name, or the default one, to send requests to.

    Raises:
        RefusedError: Only the project names the host of the remote.
    """
    named_remote = remote(name)
    if (project_settings := project()) and named_remote.path == project_settings.path:
        from adapterhub.remotes.named_remotes import unused_address

        Workspace(trusts=trusts).admitted_address(unused_address(named_remote.url), named_remote.path)
    return named_remote


def remote_at(text: str) -> Remote:
    """Return a remote by its name or its URL, to send requests to; the default one for an empty text.

    A remote by its URL has no name.
    """
    from adapterhub.remotes.named_remotes import Remote, check_url

    return Remote("", check_url(text), Path()) if "://" in text else trusted_remote(text)


def ref_at_remote(ref: str, name: str | None) -> str:
    """Return the address of a ref on the remote that --remote names; the ref itself without the option."""
    if name is None:
        return ref
    from adapterhub.remotes.named_remotes import address_below

    return address_below(trusted_remote(name).url, ref)


def source_at_remote(text: str, name: str | None) -> str:
    """Return what `ref_at_remote` does; but an address, or a path that is written as one, like ./sql, unchanged."""
    from adapterhub.remotes.remote_address import is_address

    return text if name is None or is_address(text) or text.startswith((".", "/")) else ref_at_remote(text, name)


def complete_remote(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the remotes that begin with the typed text, for a shell."""
    try:
        return completions(remotes(), typed)
    except AdapterhubError:
        return []


def _check_remote_name(_context: click.Context, _option: click.Parameter, name: str | None) -> str | None:
    # An eager callback, because it must run before arguments are counted: a REF that was parsed as the name would be reported
    # as missing.
    if name and ("/" in name or ":" in name):
        hint = "Give an address without --remote" if "://" in name else "Write --remote last, or --remote NAME"
        raise UsageError(name[:80], "cannot be the name of a remote", hint)
    return name


def _check_remote_name_or_url(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    return value if value and "://" in value else _check_remote_name(context, option, value)


def _remote_option(
    help_text: str, check: Callable[[click.Context, click.Parameter, str | None], str | None]
) -> Callable[[F], F]:
    return click.option(
        "--remote",
        metavar="[NAME]",
        is_flag=False,
        flag_value=DEFAULT,
        is_eager=True,
        callback=check,
        shell_complete=complete_remote,
        help=help_text,
    )


remote_option = _remote_option("REF is on this remote; without NAME, on the default one.", _check_remote_name)
served_remote_option = _remote_option(
    "REF is looked up on this remote, a name or a URL; without NAME, on the default one.", _check_remote_name_or_url
)


@contextmanager
def hint_default_remote(source: str) -> Iterator[None]:
    """Add to the error for a ref that the registry doesn't have how to ask the default remote; not for an address."""
    from adapterhub.remotes.remote_address import is_address

    try:
        yield
    except NotFoundError as error:
        with suppress(AdapterhubError):
            if not is_address(source) and (name := default_remote()) and name in remotes():
                errors.add_hint(error, f"`--remote` asks {name}", separator="; ")
        raise
