"""The variables of the environment, and the files of settings: the project's and the user's.

Those of object stores are in `remotes.objects.store_settings`.

`registry_choice` and `remote_choice` choose by them and by the options of a command.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.operations.workspace import home_folder, project_file, user_folder
from adapterhub_converters.errors import ParameterError, RemoteError, UsageError

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub
    from adapterhub.project.policy import Policy
    from adapterhub.project.settings_file import SettingsFile, Validation
    from adapterhub.remotes.known_hosts import KnownHosts
    from adapterhub.remotes.named_remotes import Remote

PREFIX = "ADAPTERHUB_"
"""What the variable of an option of `hub start` begins with."""
CONFIG = "ADAPTERHUB_CONFIG"
REGISTRY = "ADAPTERHUB_REGISTRY"
REMOTE = "ADAPTERHUB_REMOTE"
AUTHOR = "ADAPTERHUB_AUTHOR"
DATABASE, BLOBS = "ADAPTERHUB_DATABASE", "ADAPTERHUB_BLOBS"
OIDC_SECRET, UPSTREAM_TOKEN = "ADAPTERHUB_OIDC_SECRET", "ADAPTERHUB_UPSTREAM_TOKEN"
OIDC_SECRET_FILE = f"{OIDC_SECRET}_FILE"
ENGINE_KEY = "ADAPTERHUB_ENGINE_KEY"
_MAX_AUTHOR = 100
ALLOW_HOSTS = "ADAPTERHUB_ALLOW_HOSTS"
_COMPLETION_VARIABLE = "_ADAPTERHUB_COMPLETE"  # set by a shell that completes a word


def author() -> str:
    """Return the author that logs record for a move: ADAPTERHUB_AUTHOR, which may be empty, else git's, else the user."""
    if AUTHOR in os.environ:
        return os.environ[AUTHOR][:_MAX_AUTHOR]
    import getpass

    with suppress(KeyError, OSError):  # the user id has no name, as in some containers
        return (os.environ.get("GIT_AUTHOR_NAME") or getpass.getuser())[:_MAX_AUTHOR]
    return ""


def hub_setting(key: str) -> str:
    """Return the `registry`, `database` or `blobs` of a hub: from its variable, else from the file of ADAPTERHUB_CONFIG."""
    value: object = os.environ.get(f"{PREFIX}{key.upper()}", "")
    if not value and (file := os.environ.get(CONFIG)):
        from adapterhub_converters.containers import json_file, toml_file

        value = toml_file.parse(json_file.read_text(Path(file)), file).get(key, "")
        if not isinstance(value, str):
            raise UsageError(file, f"{key!r} is not a string", code="invalid-config")
        if key == "registry" and value:
            value = str(Path(file).absolute().parent / os.path.expanduser(value))
    return str(value)


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
