"""Which registry, which remote, which hub: from options, the environment, the project and the user's files, in that order."""

from __future__ import annotations

import functools
import os
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from adapterhub.workspace import Workspace, project_file, user_folder
from adapterhub_converters.errors import AdapterhubError, NotFoundError, ParameterError, RemoteError, UsageError

from . import errors
from .options import JOBS, RATE, Settings

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub
    from adapterhub.hub.settings import HubSettings
    from adapterhub.project.policy import Policy
    from adapterhub.project.settings import SettingsFile, Validation
    from adapterhub.registry.registry import Registry
    from adapterhub.remotes.configured import Remote
    from adapterhub.remotes.known_hosts import KnownHosts

F = TypeVar("F", bound=Callable[..., Any])
# Spelled out so that help and completion need not import the checks (numpy); tests compare.
RUNTIMES = ("peft", "transformers", "vllm", "llama.cpp", "mlx", "sglang")
ENVIRONMENT = "ADAPTERHUB_REGISTRY"
REMOTE = "ADAPTERHUB_REMOTE"
AUTHOR = "ADAPTERHUB_AUTHOR"
DATABASE, BLOBS, OIDC_SECRET = "ADAPTERHUB_DATABASE", "ADAPTERHUB_BLOBS", "ADAPTERHUB_OIDC_SECRET"
ENGINE_KEY = "ADAPTERHUB_ENGINE_KEY"
_MAX_AUTHOR = 100
ALLOW_HOSTS = "ADAPTERHUB_ALLOW_HOSTS"
DEFAULT = ""
"""What --remote is without a name."""
_COMPLETING = "_ADAPTERHUB_COMPLETE"  # set by a shell that completes a word


def registry_folder(settings: Settings) -> Path:
    """The folder of the registry to use; it may not be there yet."""
    return chosen_registry(settings)[0]


def chosen_registry(settings: Settings) -> tuple[Path, str]:
    """The folder of the registry to use, and what chose it."""
    from adapterhub.registry.registry import find

    named, by = _named_registry(settings)
    if named:
        return find(Path.cwd(), explicit=Path(named)), by
    mine = user()
    default = (mine and mine.registry) or data_folder()
    found = find(Path.cwd(), default=default)
    if found != default:
        return found, "found here" if found == Path.cwd() else "found above this folder"
    return found, str(user_file()) if mine and mine.registry else "the default"


def named_registry(settings: Settings) -> str | None:
    """The registry that an option, the environment or the project names."""
    return _named_registry(settings)[0]


def _named_registry(settings: Settings) -> tuple[str | None, str]:
    if settings.registry:
        return settings.registry, "--registry"
    if os.environ.get(ENVIRONMENT):
        return os.environ[ENVIRONMENT], f"${ENVIRONMENT}"
    found = project()
    folder = Workspace(trusts=trusts).admitted_registry(found) if found else None
    return (str(folder), str(found.path)) if found and folder else (None, "")


def workspace(settings: Settings) -> Workspace:
    """All that the library may need of options, variables, the project and its user."""
    from . import output, progress

    context = click.get_current_context(silent=True)
    given = context.meta if context else {}
    return Workspace(
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
        jobs=given.get(JOBS) or 4,
        rate=given.get(RATE),
        author=author(),
        known_signers=config_folder() / "known_signers",
    )


def open_registry(settings: Settings, *, make: bool = False) -> Registry:
    """The registry to use, open. `make`: a push may be the first thing that happens to it."""
    from adapterhub.registry.registry import Registry

    folder = registry_folder(settings)
    try:
        registry = Registry.open(folder)
    except NotFoundError:
        if not make:
            raise
        registry = Registry.init(folder)
    registry.author = author()
    return registry


def author() -> str:
    """Who logs say has moved a ref: ADAPTERHUB_AUTHOR, which may be empty, else git's variable, else the user's name here."""
    if AUTHOR in os.environ:
        return os.environ[AUTHOR][:_MAX_AUTHOR]
    import getpass

    with suppress(KeyError, OSError):  # no user of that number
        return (os.environ.get("GIT_AUTHOR_NAME") or getpass.getuser())[:_MAX_AUTHOR]
    return ""


def hub_settings(settings: Settings, **more: Any) -> HubSettings:
    """The settings of the hub: in the folder of the registry, or where ADAPTERHUB_DATABASE and ADAPTERHUB_BLOBS say.

    The address of a database has its password, which others on the machine could read among a command's words.
    """
    from adapterhub.hub.settings import HubSettings

    places = {"database": os.environ.get(DATABASE, ""), "blobs": os.environ.get(BLOBS, ""), "environ": os.environ}
    chosen = {key: value for key, value in more.items() if value is not None}
    return HubSettings(registry=registry_folder(settings), **{**places, **chosen})


def oidc_secret(file: Path | None) -> str:
    """The secret of a hub at its provider: in a file, or in ADAPTERHUB_OIDC_SECRET; never among a command's words."""
    from adapterhub_converters.containers.open_file import read_bytes

    if file is None:
        return os.environ.get(OIDC_SECRET, "")
    secret = read_bytes(file, pipe=True).decode("utf-8", "replace").strip()
    if not secret:
        raise UsageError(str(file), "has no secret in it", "Write the secret of the hub at its provider into it")
    return secret


def complete_ref(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """The refs that begin as what was typed, for a shell."""
    try:
        with open_registry(context.find_object(Settings) or Settings()) as registry:
            rows = registry.list()
    except AdapterhubError:
        return []
    return completions({str(row.ref) for row in rows} | {row.name for row in rows}, typed)


_PLAIN = frozenset(f"{string.ascii_letters}{string.digits}._:/@-")  # one word to every shell, and nothing more than a word


def completions(names: Iterable[str], typed: str) -> list[CompletionItem]:
    """Those of the names that begin as what was typed.

    They come from the files of a clone, and the shell shows them and puts them into its line as they are: whatever could
    control the terminal or run a command there is left out.
    """
    return [CompletionItem(name) for name in sorted(names) if name.startswith(typed) and _PLAIN.issuperset(name)]


def hub() -> Hub:
    """The Hugging Face Hub and the user's token for it, by the variables and files of huggingface_hub (`utils/_auth.py`).

    The library is imported only for a token that it has to get or renew: its import takes 0.1 s.
    """
    from adapterhub.bases.hub_address import ENDPOINT, OFFLINE, Hub

    if is_offline():
        raise RemoteError("HF_HUB_OFFLINE", "is set, so nothing is fetched", "Unset it, or use a local copy", code=OFFLINE)
    endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if os.environ.get("HF_OIDC_RESOURCE"):
        token = _renewed_token()
    elif not token.strip() and not _on("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        with suppress(OSError, UnicodeDecodeError, RuntimeError):
            file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
            token = file.read_text()
            if "refresh_token" in (file.parent / "stored_tokens").read_text(encoding="utf-8"):
                token = _renewed_token()
    token = token.replace("\r", "").replace("\n", "").strip()
    if not token.isascii() or not token.isprintable():
        raise UsageError(
            "HF_TOKEN", "the token has characters that no token has", "Copy it again, or log in with `hf auth login`"
        )
    return Hub(endpoint, token or None, proxy)


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")


def hub_cache() -> Path:
    """The cache of huggingface_hub, by its variables (`constants.py`)."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    with suppress(RuntimeError):  # no home
        return Path(named or _hub_home() / "hub").expanduser()
    return Path(named or _hub_home() / "hub")


def known_hosts() -> KnownHosts:
    """Those that the user has dealt with, by their files and by ADAPTERHUB_ALLOW_HOSTS."""
    from adapterhub.remotes.known_hosts import KnownHosts

    allowed = [text.strip() for text in os.environ.get(ALLOW_HOSTS, "").split(",")]
    mine = user()
    return KnownHosts(
        config_folder() / "known_hosts",
        [text for text in (*allowed, os.environ.get("HF_ENDPOINT", "")) if text],
        list(mine.remotes.values()) if mine else [],
        docker_config(),
    )


def trusts(owner: str, file: Path) -> bool:
    """Whether a project may send us to somebody: the user knows them, or is asked now, once, on a terminal."""
    known = known_hosts()
    if known.knows(owner):
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or _COMPLETING in os.environ:
        return False
    from . import output

    if not output.agreed(f"{file.name} names {owner.removeprefix('https://')}, which you have not used before. Connect?"):
        return False
    known.keep(owner)
    return True


def used(address: str) -> None:
    """Remember the hosts that the user has named, because a file of the project names them from now on."""
    from adapterhub.remotes.location import parse

    known_hosts().keep(parse(address).owner)


def is_offline() -> bool:
    """True if the variables of huggingface_hub or transformers forbid access to the Hub."""
    return _on("HF_HUB_OFFLINE") or _on("TRANSFORMERS_OFFLINE")


def proxy(scheme: str, host: str) -> str:
    """The proxy for a host by `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, else by macOS' or Windows' settings."""
    import urllib.request

    found = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    return found.get(scheme) or found.get("all") or ""


def _renewed_token() -> str:
    """The token of a login in the browser (`hf auth login`), renewed if it is about to expire, or of an OIDC exchange."""
    from huggingface_hub import get_token

    try:
        return get_token() or ""
    except Exception as error:
        what = str(error).partition("\n")[0].partition(". ")[0][:200]
        hint = "Unset it, and set HF_TOKEN instead"
        raise RemoteError("HF_OIDC_RESOURCE", f"no token could be obtained: {what}", hint) from error


def _on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def prepare_torch(*, same_bits_in_batches: bool = False) -> None:
    """Set what torch and its libraries read when they are loaded, unless the user has set it; no number depends on the first.

    OpenMP's threads wait for each other in a busy loop, and where another program has one of the cores a step is that loop: 3
    to 6 times as long with a spin count of 10,000 as with 1,000, which costs 15 % where no other program runs; 0, which sleeps
    at once, costs more there. cuBLAS gives the same bytes each time only with a work space of this kind
    (docs.nvidia.com/cuda/cublas, "Reproducibility"), and memory in segments that grow leaves fewer holes between rows of
    different lengths.

    Args:
        same_bits_in_batches: Have MKL compute products whose bits depend neither on the size of a batch nor on threads nor on
            where its arrays begin. On processors with AVX-512 they depend on all three otherwise (Intel, "Conditional
            Numerical Reproducibility").
    """
    from adapterhub.training.cost.budget import cores_are_busy

    os.environ.setdefault("GOMP_SPINCOUNT", "0" if cores_are_busy() else "1000")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if same_bits_in_batches:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def data_folder() -> Path:
    """The user's own registry, used when no other is named."""
    return user_folder("data", os.environ)


def cache_folder() -> Path:
    """Where what can be made again is kept: quantized bases, digests of large files."""
    return user_folder("cache", os.environ)


def config_folder() -> Path:
    """The folder of the user's own settings and remotes."""
    return user_folder("config", os.environ)


def user_file() -> Path:
    """The user's own settings."""
    return config_folder() / "config.toml"


def docker_config() -> Path:
    """The config.json of docker, in which docker, oras and `adapterhub login` store credentials."""
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def lock_file() -> Path:
    """The lock file of the project, next to its adapterhub.toml; without one, here."""
    from adapterhub.project.lockfile import FILE

    found = project_file(Path.cwd())
    return (found.parent if found else Path.cwd()) / FILE


@functools.cache
def project() -> SettingsFile | None:
    """The settings of the project; another user's file is ignored with a warning."""
    path = project_file(Path.cwd())
    if path is None:
        return None
    from adapterhub import user_files
    from adapterhub.project import settings as project

    if not user_files.is_mine(path):
        from . import output

        output.say(output.one_line(f"warning: {path} belongs to another user and is passed over"))
        return None
    return project.read(path, follow=False)


def validation(settings: SettingsFile) -> Validation:
    """The options of `adapterhub validate` in a project's settings; UsageError for an unknown runtime or code."""
    from adapterhub.checks import check_codes

    rules, where = settings.validate, str(settings.path)
    if unknown := [name for name in rules.runtimes if name not in RUNTIMES]:
        raise UsageError(
            f"{where}: validate.runtimes",
            f"unknown runtime {unknown[0]!r}",
            f"One of {', '.join(RUNTIMES)}",
            code="invalid-config",
        )
    try:
        check_codes(rules.ignore)
    except ParameterError as error:
        raise UsageError(f"{where}: validate.ignore", error.what, error.hint, code="invalid-config") from error
    return rules


@functools.cache
def user() -> SettingsFile | None:
    """What the user has settled for all projects."""
    path = user_file()
    if not path.is_file():
        return None
    from adapterhub.project import settings as project

    return project.read(path)


def policy() -> Policy | None:
    """What the project asks of adapters that come and go; None: nothing."""
    found = project()
    return found.policy if found else None


def remotes() -> dict[str, Remote]:
    """The remotes there are, by name; a project's comes before a user's of the same name."""
    from adapterhub.remotes.configured import Remote

    found: dict[str, Remote] = {}
    for settled in (user(), project()):
        if settled:
            found |= {name: Remote(name, url, settled.path) for name, url in settled.remotes.items()}
    return dict(sorted(found.items()))


def default_remote() -> str | None:
    """The name of the remote that is meant where none is named."""
    settled = [found.remote for found in (project(), user()) if found and found.remote]
    return os.environ.get(REMOTE) or next(iter(settled), None)


def remote(name: str) -> Remote:
    """A remote by its name, or the default one."""
    there = remotes()
    found = name or default_remote()
    names = f"Name one of {', '.join(there)}" if there else "Add one with `adapterhub remote add NAME URL --default`"
    if not found:
        raise UsageError("--remote", "there is no default remote", names)
    if found not in there:
        raise NotFoundError(found[:80], "no remote of this name", names)
    from adapterhub.remotes.configured import check_url

    check_url(there[found].url)
    return there[found]


def remote_to_ask(name: str) -> Remote:
    """A remote by its name, or the default one, to send requests to; RefusedError for a host that only the project names."""
    found = remote(name)
    if (here := project()) and found.path == here.path:
        from adapterhub.remotes.configured import nobody

        Workspace(trusts=trusts).admitted(nobody(found.url), found.path)
    return found


def remote_at(text: str) -> Remote:
    """A remote by its name or its URL, to send requests to; the default one for an empty text. One by its URL has no name."""
    from adapterhub.remotes.configured import Remote, check_url

    return Remote("", check_url(text), Path()) if "://" in text else remote_to_ask(text)


def at_remote(ref: str, name: str | None) -> str:
    """The address of a ref on the remote that --remote names; the ref itself when there is no such option."""
    if name is None:
        return ref
    from adapterhub.remotes.configured import below

    return below(remote_to_ask(name).url, ref)


def on_remote(text: str, name: str | None) -> str:
    """As `at_remote`, for a SRC: an address, or a path that is written as one, like ./sql, stays what it is."""
    from adapterhub.remotes.location import is_address

    return text if name is None or is_address(text) or text.startswith((".", "/")) else at_remote(text, name)


def complete_remote(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """The remotes that begin as what was typed, for a shell."""
    try:
        return completions(remotes(), typed)
    except AdapterhubError:
        return []


def _its_name(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    # Asked before the arguments are counted: one that was read as the name would be reported as missing.
    if value and ("/" in value or ":" in value):
        hint = "Give an address without --remote" if "://" in value else "Write --remote last, or --remote NAME"
        raise UsageError(value[:80], "cannot be the name of a remote", hint)
    return value


def _its_name_or_url(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    return value if value and "://" in value else _its_name(context, option, value)


def _remote_option(what: str, check: Callable[[click.Context, click.Parameter, str | None], str | None]) -> Callable[[F], F]:
    return click.option(
        "--remote",
        metavar="[NAME]",
        is_flag=False,
        flag_value=DEFAULT,
        is_eager=True,
        callback=check,
        shell_complete=complete_remote,
        help=what,
    )


remote_option = _remote_option("REF is on this remote; without NAME, on the default one.", _its_name)
served_remote_option = _remote_option(
    "REF is looked up on this remote, a name or a URL; without NAME, on the default one.", _its_name_or_url
)


@contextmanager
def hinting(where: str) -> Iterator[None]:
    """Have the error for a ref that is not in the registry here show how to ask the default remote; not for an address."""
    from adapterhub.remotes.location import is_address

    try:
        yield
    except NotFoundError as error:
        with suppress(AdapterhubError):
            if not is_address(where) and (name := default_remote()) and name in remotes():
                errors.add_hint(error, f"`--remote` asks {name}", separator="; ")
        raise
