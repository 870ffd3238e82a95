"""Credentials for OCI registries, where docker and oras store them: in docker's config.json, or in its credential helper.

Secrets are stored by the helper that config.json configures for the registry (`credHelpers`, `credsStore`;
docker-credential-helpers), else in the system's keyring if the package keyring has a usable one, else in `auths`. An empty
entry in `auths` is docker's own mark for a secret that is stored elsewhere (docker/cli, `cli/config/credentials`). No secret is
in any error or repr.

Credentials for plain HTTP have a key of their own, `http://HOST`: those entered for a registry with TLS are not sent without
it. docker has no such key, and its helpers may take one for that of HOST, so they are asked for it only if it is in `auths`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from adapterhub import user_files
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

KEYRING = "the system's keyring"
_HELPER_TIMEOUT = 60  # seconds for an answer of a helper
_HELPER_HINT = "Repair it, or remove it from docker's config.json"
_HELPER = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DOCKER_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEYS = ("https://index.docker.io/v1/", "docker.io", "index.docker.io")
_IDENTITY_USER = "<token>"  # the username for which the secret is an identity token (docker/docker-credential-helpers)


@dataclass(frozen=True)
class Credentials:
    """A username and password, or a token; `source` is where they are stored."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    bearer: str = field(default="", repr=False)
    source: str = ""

    def basic(self) -> str:
        """Return the value of `Authorization` for Basic authentication."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def secrets(self) -> tuple[str, ...]:
        """Return the texts that must not be shown."""
        return tuple(secret for secret in (self.password, self.identity, self.bearer, self.basic()[6:]) if len(secret) > 3)


def find_credentials(host: str, config: Path | None, *, plain: bool = False) -> Credentials | None:
    """Return the credentials for a registry, None without any; `plain` is for plain HTTP.

    Raises:
        LocalIOError: config.json, a helper or the keyring cannot be read.
    """
    keys, document = _keys(host, plain=plain), _parse_config(user_files.read(config), config) if config else {}
    auths = _table(document, "auths")
    if plain and keys[0] not in auths:
        return None
    if helper_login := next(_helper_logins(_helper(document, host, keys), keys), None):
        return helper_login[1]
    key = next((key for key in keys if isinstance(auths.get(key), dict)), "")
    return _parse_entry(auths[key], f"{config}: auths: {host}") if auths.get(key) else _keyring_login(key) if key else None


def store_credentials(host: str, config: Path, credentials: Credentials, *, plain: bool = False) -> str:
    """Store credentials for a registry in place of any others; return where the secret is now."""
    keys = _keys(host, plain=plain)
    helper = _helper(_parse_config(user_files.read(config), config), host, keys)
    # Helpers have no field for a bearer token.
    if helper and not credentials.bearer:
        secret = {"ServerURL": keys[0], "Username": credentials.user, "Secret": credentials.password}
        if _run_helper(helper, "store", json.dumps(secret)).returncode != 0:
            problem = f"could not store the login at {host}"
            raise LocalIOError(f"docker-credential-{helper}", problem, f"Unlock it, or remove it from {config}")
        _change(config, keys[0], {})
        return f"docker-credential-{helper}"
    for key, _ in _helper_logins(helper, keys):  # it is asked first
        _run_helper(helper, "erase", key)
    _change(config, keys[0], {})  # before the keyring gets a secret that this file would not name if it cannot be changed
    secret = {"registrytoken": credentials.bearer} if credentials.bearer else {"auth": credentials.basic()[6:]}
    with contextlib.suppress(LookupError, LocalIOError):
        _call_keyring("set_password", keys[0], json.dumps(secret))
        return KEYRING
    _change(config, keys[0], secret)
    return str(config)


def forget_credentials(host: str, config: Path, *, plain: bool = False) -> bool:
    """Remove the credentials for a registry, like `docker logout`; return whether there were any."""
    keys, document = _keys(host, plain=plain), _parse_config(user_files.read(config), config)
    helper, entries = _helper(document, host, keys), _table(document, "auths")
    helper_keys = [key for key, _ in _helper_logins(helper, keys)]
    # A helper and config.json may both have entries: remove all of them.
    for key in helper_keys:
        _run_helper(helper, "erase", key)
    stored_keys = [key for key in keys if key in entries]
    for key in stored_keys:
        with contextlib.suppress(LookupError):
            if not entries[key] and _call_keyring("get_password", key) is not None:
                _call_keyring("delete_password", key)
        _change(config, key, None)
    return bool(helper_keys or stored_keys)


def configured_hosts(config: Path) -> list[str]:
    """Return the keys of the registries that config.json has entries for."""
    return sorted(_table(_parse_config(user_files.read(config), config), "auths"))


def is_configured(host: str, config: Path, *, plain: bool = False) -> bool:
    """Return whether config.json names a registry, which means that its owner has used it; no helper is asked."""
    document = _parse_config(user_files.read(config), config)
    configured_keys = {**_table(document, "auths"), **_table(document, "credHelpers")}
    return not configured_keys.keys().isdisjoint(_keys(host, plain=plain))


def _keys(host: str, *, plain: bool) -> list[str]:
    """Return the keys under which a registry's credentials may be stored; the first one is written."""
    if plain:
        return [f"http://{host}"]
    host_keys = [host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    return [*_HUB_KEYS, *(key for key in host_keys if key not in _HUB_KEYS)] if host in _DOCKER_HUB_HOSTS else host_keys


def _parse_entry(entry: dict[str, Any], location: str) -> Credentials | None:
    """Return the credentials in an entry of `auths`; None if it has no secret."""
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    user, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            user, _, password = base64.b64decode(texts["auth"], validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, ValueError) as error:
            raise LocalIOError(location, '"auth" is not base64 of NAME:PASSWORD', "Log in again") from error
    credentials = Credentials(
        user, password, texts.get("identitytoken", ""), texts.get("registrytoken", ""), "docker's config.json"
    )
    return credentials if user or credentials.identity or credentials.bearer else None


# ---- config.json


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    """Parse config.json, or the same object from the keyring."""
    try:
        # The error must not quote the file, which may contain a secret: replace it.
        return json_file.parse_object(text, str(path)) if text else {}
    except AdapterhubError as error:
        raise LocalIOError(str(path), "is not a valid config.json of docker", "Repair it, or log in again") from error


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a member that is an object; empty if it is absent or another type."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _change(config: Path, key: str, entry: dict[str, str] | None) -> None:
    """Set or remove an entry of `auths`; everything else in the file stays, byte for byte."""
    if entry and config.exists():  # with a secret, the file is for its owner alone
        with contextlib.suppress(OSError):
            config.chmod(0o600)

    def with_entry(text: str) -> str:
        text, auths = text or "{}\n", _parse_config(text, config).get("auths")
        start, end = _members(text)["auths"][1:] if isinstance(auths, dict) else (0, 0)
        inner = _with_member(text[start:end] or "{}", key, None if entry is None else json.dumps(entry))
        return _with_member(text, "auths", inner)

    user_files.change(config, with_entry, private=bool(entry) or not config.exists())


def _members(text: str) -> dict[str, tuple[int, int, int]]:
    """Return where each member of a JSON object starts, and where its value starts and ends."""
    spans: dict[str, tuple[int, int, int]] = {}
    decode = json.JSONDecoder().raw_decode
    position = _next_token(text, text.index("{") + 1)
    while text[position] != "}":
        key, end = decode(text, position)
        value = _next_token(text, end)
        spans[key] = position, value, (end := decode(text, value)[1])
        position = _next_token(text, end)
    return spans


def _next_token(text: str, position: int) -> int:
    """Return the next position from `position` on that is not a space, comma or colon between tokens of JSON."""
    while text[position] in " \t\r\n,:":
        position += 1
    return position


def _with_member(text: str, key: str, value: str | None) -> str:
    """Return the JSON object `text` with a member set, or removed for None; all other characters stay."""
    members, content_start = _members(text), text.index("{") + 1
    spans = list(members.values())
    if key not in members:
        # Repeat the whitespace before the first member, to keep the style of the file.
        indent = text[content_start : spans[0][0]] if spans else ""
        member = f"{indent}{json.dumps(key)}: {value}{',' if spans else ''}"
        return text if value is None else text[:content_start] + member + text[content_start:]
    start, value_start, end = members[key]
    if value is not None:
        return text[:value_start] + value + text[end:]
    index = spans.index((start, value_start, end))
    if index + 1 < len(spans):
        return text[:start] + text[spans[index + 1][0] :]
    return text[: spans[index - 1][2]] + text[end:] if index else text[:content_start] + text[text.rindex("}") :]


# ---- helpers


def _helper(document: dict[str, Any], host: str, keys: Sequence[str]) -> str:
    """Return the name of the credential helper for a registry; empty without one."""
    helpers = _table(document, "credHelpers")
    helper = next((helpers[key] for key in (*keys, host) if isinstance(helpers.get(key), str)), document.get("credsStore"))
    return helper if isinstance(helper, str) else ""


def _helper_logins(helper: str, keys: Sequence[str]) -> Iterator[tuple[str, Credentials]]:
    """Yield the keys for which a helper has credentials."""
    # Docker Hub's credentials are under a URL with docker, and under its host with other tools.
    for key in keys[: 2 if keys[0] in _HUB_KEYS else 1] if helper else ():
        result = _run_helper(helper, "get", key)
        if result.returncode != 0:  # it has none for this key
            continue
        source = f"docker-credential-{helper}"
        try:
            answer = json_file.parse_object(result.stdout, source)
            user, secret = str(answer["Username"]), str(answer["Secret"])
        except (FormatError, KeyError) as error:
            raise LocalIOError(source, "its answer is not a login", _HELPER_HINT) from error
        is_identity = user == _IDENTITY_USER
        yield key, Credentials(identity=secret, source=source) if is_identity else Credentials(user, secret, source=source)


def _run_helper(helper: str, verb: str, text: str) -> subprocess.CompletedProcess[bytes]:
    """Run a credential helper with a verb and its input."""
    program = f"docker-credential-{helper}"
    # The name comes from a file: it must not become a path to another program.
    if not _HELPER.fullmatch(helper):
        raise LocalIOError("config.json", f"{helper[:80]!r} is not the name of a credential helper")
    try:
        return subprocess.run([program, verb], input=text.encode(), capture_output=True, timeout=_HELPER_TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise LocalIOError(program, "docker's config.json names it, but it isn't installed", "Install it") from error
    except subprocess.TimeoutExpired as error:
        raise LocalIOError(program, f"did not answer within {_HELPER_TIMEOUT} seconds", _HELPER_HINT) from error
    except OSError as error:
        raise LocalIOError(program, f"could not be run: {error.strerror or error}", _HELPER_HINT) from error


# ---- the keyring


def _call_keyring(function: str, key: str, *words: str) -> Any:
    """Call a function of the optional package keyring.

    Raises:
        LookupError: The package is missing, or has no backend that stores anything.
        LocalIOError: The backend failed.
    """
    try:
        import keyring
        from keyring.backends import chainer, fail, null
    except ImportError as error:
        raise LookupError from error
    backend = keyring.get_keyring()
    chained = isinstance(backend, chainer.ChainerBackend) and not backend.backends
    if chained or isinstance(backend, (fail.Keyring, null.Keyring)):
        raise LookupError
    try:
        return getattr(keyring, function)("adapterhub", key, *words)
    except Exception:  # noqa: BLE001 - each backend has errors of its own, and their text may be a secret
        raise LocalIOError(key, f"its login is in {KEYRING}, which cannot be used", "Unlock it, or log in again") from None


def _keyring_login(key: str) -> Credentials | None:
    """Return the login that the system's keyring has for a key."""
    with contextlib.suppress(LookupError):
        if text := _call_keyring("get_password", key):
            credentials = _parse_entry(_parse_config(text, Path(KEYRING)), KEYRING)
            return replace(credentials, source=KEYRING) if credentials else None
    return None
