"""Who asks a registry: what `adapterhub login` keeps, else what `docker login` or `oras login` left in docker's config.json.

`auths`, `credHelpers` and `credsStore` as docker's own client reads them (docker/cli, `cli/config`). Nothing here is ever
shown: not in an error, not in a repr.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError

from . import login_store
from .login_store import Credentials

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HELPER_SECONDS = 60
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_IDENTITY = "<token>"  # the user's name that says that the secret is an identity token (docker/docker-credential-helpers)


def find(host: str, config: Path | None, logins: Path | None = None, *, plain: bool = False) -> Credentials | None:
    """What our own login keeps, else docker's config.json has for a registry; None for nothing. `plain`: asked without TLS.

    Raises:
        LocalIOError: One of the files, or a helper, is broken.
    """
    return (login_store.read(logins, canonical(host, plain=plain)) if logins else None) or _docker(host, config)


def canonical(host: str, *, plain: bool = False) -> str:
    """The one name under which our own logins for a host are kept: what was said over TLS is not said without it."""
    return ("http://" if plain else "") + (_DOCKER_HUB[0] if host in _DOCKER_HUB else host)


def _docker(host: str, config: Path | None) -> Credentials | None:
    document = _read(config) if config else {}
    keys = [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    if host in _DOCKER_HUB:
        keys = ["https://index.docker.io/v1/", "docker.io", "index.docker.io", *keys]
    helpers = _table(document, "credHelpers")
    helper = next((helpers[key] for key in keys if isinstance(helpers.get(key), str)), document.get("credsStore"))
    if isinstance(helper, str) and helper:
        for key in keys[:1] if host not in _DOCKER_HUB else keys[:2]:
            if (found := _ask(helper, key)) is not None:
                return found
    auths = _table(document, "auths")
    entry = next((auths[key] for key in keys if isinstance(auths.get(key), dict)), None)
    return _entry(entry, f"{config}: auths: {host}") if entry else None


def _read(config: Path) -> dict[str, Any]:
    try:
        return json_file.parse_object(json_file.read_text(config), str(config))
    except NotFoundError:
        return {}
    except AdapterhubError as error:  # its text may hold secrets, and json says where it stopped understanding
        raise LocalIOError(str(config), "cannot be read as docker's config.json", "Mend it, or log in again") from error


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def _entry(entry: dict[str, Any], where: str) -> Credentials | None:
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    user, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            user, _, password = base64.b64decode(texts["auth"], validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, ValueError) as error:
            raise LocalIOError(where, '"auth" is not base64 of NAME:PASSWORD', "Log in again") from error
    found = Credentials(user, password, texts.get("identitytoken", ""), texts.get("registrytoken", ""))
    return found if user or found.identity or found.bearer else None


def _ask(helper: str, host: str) -> Credentials | None:
    """What a credential helper says (`docker-credential-NAME get`, the host on its stdin)."""
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise LocalIOError("config.json", f"{helper[:80]!r} is not the name of a credential helper")
    try:
        done = subprocess.run([program, "get"], input=host.encode(), capture_output=True, timeout=_HELPER_SECONDS, check=False)
    except FileNotFoundError as error:
        raise LocalIOError(program, "docker's config.json names it, and it isn't installed", "Install it") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalIOError(program, "did not answer") from error
    if done.returncode != 0:  # nothing is kept for this host; others are asked without credentials
        return None
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise LocalIOError(program, "answered what makes no sense") from error
    return Credentials(identity=secret) if user == _IDENTITY else Credentials(user, secret)
