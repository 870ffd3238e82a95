"""Credentials for registries, where docker and oras store them: in docker's config.json, or in its credential helper.

Stored by the helper that config.json configures for the registry (`credHelpers`, `credsStore`; docker-credential-helpers),
else in the system's keyring if the package keyring has a usable one, else in `auths`. An empty entry in `auths` is docker's own
mark for a secret that is stored elsewhere (docker/cli, `cli/config/credentials`). No secret is in any error or repr.

Credentials for plain HTTP have a key of their own, `http://HOST`: what was entered for a registry with TLS is not sent without.
docker has no such key, and its helpers may take one for that of HOST, so they are asked for it only if it is in `auths`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub import user_files
from adapterhub_converters import linear
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError

KEYRING = "the system's keyring"
_PATIENCE = 60  # seconds for an answer of a helper
_HELPER_HINT = "Repair it, or remove it from docker's config.json"
_HELPER = linear.Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEYS = ("https://index.docker.io/v1/", "docker.io", "index.docker.io")
_IDENTITY = "<token>"  # the username for which the secret is an identity token (docker/docker-credential-helpers)


@dataclass(frozen=True)
class Credentials:
    """A username and a password, or a token; `source` is where they are stored."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    bearer: str = field(default="", repr=False)
    source: str = ""

    def basic(self) -> str:
        """The value of `Authorization` for Basic authentication."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def secrets(self) -> tuple[str, ...]:
        """The texts that must not be shown."""
        return tuple(secret for secret in (self.password, self.identity, self.bearer, self.basic()[6:]) if len(secret) > 3)


def find(host: str, config: Path | None, *, plain: bool = False) -> Credentials | None:
    """The credentials for a registry, None without any; `plain` for plain HTTP.

    Raises:
        LocalIOError: config.json, a helper or the keyring cannot be read.
    """
    keys, document = _keys(host, plain=plain), _parsed(user_files.read(config), config) if config else {}
    auths = _table(document, "auths")
    if plain and keys[0] not in auths:
        return None
    if found := next(_from_helper(_helper(document, host, keys), keys), None):
        return found[1]
    key = next((key for key in keys if isinstance(auths.get(key), dict)), "")
    return _entry(auths[key], f"{config}: auths: {host}") if auths.get(key) else _from_keyring(key) if key else None


def store(host: str, config: Path, who: Credentials, *, plain: bool = False) -> str:
    """Store credentials in place of those there are for a registry; return where the secret is now."""
    keys = _keys(host, plain=plain)
    helper = _helper(_parsed(user_files.read(config), config), host, keys)
    if helper and not who.bearer:  # helpers have no place for a bearer token
        secret = {"ServerURL": keys[0], "Username": who.user, "Secret": who.password}
        if _run(helper, "store", json.dumps(secret)).returncode != 0:
            what = f"could not store the login at {host}"
            raise LocalIOError(f"docker-credential-{helper}", what, f"Unlock it, or remove it from {config}")
        _change(config, keys[0], {})
        return f"docker-credential-{helper}"
    for key, _ in _from_helper(helper, keys):  # it is asked first
        _run(helper, "erase", key)
    _change(config, keys[0], {})  # before the keyring gets a secret that this file would not name if it cannot be changed
    secret = {"registrytoken": who.bearer} if who.bearer else {"auth": who.basic()[6:]}
    with contextlib.suppress(LookupError, LocalIOError):
        _keyring("set_password", keys[0], json.dumps(secret))
        return KEYRING
    _change(config, keys[0], secret)
    return str(config)


def forget(host: str, config: Path, *, plain: bool = False) -> bool:
    """Remove the credentials for a registry, like `docker logout`; return whether there were any."""
    keys, document = _keys(host, plain=plain), _parsed(user_files.read(config), config)
    helper, entries = _helper(document, host, keys), _table(document, "auths")
    helped = [key for key, _ in _from_helper(helper, keys)]
    for key in helped:
        _run(helper, "erase", key)
    there = [key for key in keys if key in entries]
    for key in there:
        with contextlib.suppress(LookupError):
            if not entries[key] and _keyring("get_password", key) is not None:
                _keyring("delete_password", key)
        _change(config, key, None)
    return bool(helped or there)


def hosts(config: Path) -> list[str]:
    """The keys of the registries that config.json has entries for."""
    return sorted(_table(_parsed(user_files.read(config), config), "auths"))


def is_named(host: str, config: Path, *, plain: bool = False) -> bool:
    """Tell whether config.json names a registry, so that its owner has used it; no helper is asked."""
    document = _parsed(user_files.read(config), config)
    named = {**_table(document, "auths"), **_table(document, "credHelpers")}
    return not named.keys().isdisjoint(_keys(host, plain=plain))


def _keys(host: str, *, plain: bool) -> list[str]:
    """The keys under which a registry may be stored; the first is the one to write."""
    if plain:
        return [f"http://{host}"]
    own = [host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    return [*_HUB_KEYS, *(key for key in own if key not in _HUB_KEYS)] if host in _DOCKER_HUB else own


def _entry(entry: dict[str, Any], where: str) -> Credentials | None:
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    user, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            user, _, password = base64.b64decode(texts["auth"], validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, ValueError) as error:
            raise LocalIOError(where, '"auth" is not base64 of NAME:PASSWORD', "Log in again") from error
    found = Credentials(user, password, texts.get("identitytoken", ""), texts.get("registrytoken", ""), "docker's config.json")
    return found if user or found.identity or found.bearer else None


# ---- config.json


def _parsed(text: str, config: Path) -> dict[str, Any]:
    try:
        return json_file.parse_object(text, str(config)) if text else {}
    except AdapterhubError as error:  # its text may repeat a secret
        raise LocalIOError(str(config), "is not a valid config.json of docker", "Repair it, or log in again") from error


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def _change(config: Path, key: str, entry: dict[str, str] | None) -> None:
    """Set or remove an entry of `auths`; everything else in the file stays, byte for byte."""
    if entry and config.exists():  # with a secret, the file is for its owner alone
        with contextlib.suppress(OSError):
            config.chmod(0o600)

    def changed(text: str) -> str:
        text, auths = text or "{}\n", _parsed(text, config).get("auths")
        start, end = _members(text)["auths"][1:] if isinstance(auths, dict) else (0, 0)
        inner = _spliced(text[start:end] or "{}", key, None if entry is None else json.dumps(entry))
        return _spliced(text, "auths", inner)

    user_files.change(config, changed, private=bool(entry) or not config.exists())


def _members(text: str) -> dict[str, tuple[int, int, int]]:
    """Where each member of a JSON object starts, and where its value starts and ends."""
    found: dict[str, tuple[int, int, int]] = {}
    decode = json.JSONDecoder().raw_decode
    at = _token(text, text.index("{") + 1)
    while text[at] != "}":
        key, end = decode(text, at)
        value = _token(text, end)
        found[key] = at, value, (end := decode(text, value)[1])
        at = _token(text, end)
    return found


def _token(text: str, at: int) -> int:
    """The next place in JSON, from `at` on, that is neither space, comma nor colon."""
    while text[at] in " \t\r\n,:":
        at += 1
    return at


def _spliced(text: str, key: str, value: str | None) -> str:
    """The JSON object `text` with a member set, or removed for None; all other characters stay."""
    members, begin = _members(text), text.index("{") + 1
    spans = list(members.values())
    if key not in members:
        margin = text[begin : spans[0][0]] if spans else ""
        new = f"{margin}{json.dumps(key)}: {value}{',' if spans else ''}"
        return text if value is None else text[:begin] + new + text[begin:]
    start, at, end = members[key]
    if value is not None:
        return text[:at] + value + text[end:]
    n = spans.index((start, at, end))
    if n + 1 < len(spans):
        return text[:start] + text[spans[n + 1][0] :]
    return text[: spans[n - 1][2]] + text[end:] if n else text[:begin] + text[text.rindex("}") :]


# ---- helpers


def _helper(document: dict[str, Any], host: str, keys: Sequence[str]) -> str:
    """The name of the credential helper for a registry; empty without one."""
    helpers = _table(document, "credHelpers")
    found = next((helpers[key] for key in (*keys, host) if isinstance(helpers.get(key), str)), document.get("credsStore"))
    return found if isinstance(found, str) else ""


def _from_helper(helper: str, keys: Sequence[str]) -> Iterator[tuple[str, Credentials]]:
    """The keys for which a helper has credentials."""
    for key in keys[: 2 if keys[0] in _HUB_KEYS else 1] if helper else ():
        done = _run(helper, "get", key)
        if done.returncode != 0:  # it has none for this key
            continue
        source = f"docker-credential-{helper}"
        try:
            answer = json_file.parse_object(done.stdout, source)
            user, secret = str(answer["Username"]), str(answer["Secret"])
        except (FormatError, KeyError) as error:
            raise LocalIOError(source, "its answer is not a login", _HELPER_HINT) from error
        identity = user == _IDENTITY
        yield key, Credentials(identity=secret, source=source) if identity else Credentials(user, secret, source=source)


def _run(helper: str, verb: str, text: str) -> subprocess.CompletedProcess[bytes]:
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise LocalIOError("config.json", f"{helper[:80]!r} is not the name of a credential helper")
    try:
        return subprocess.run([program, verb], input=text.encode(), capture_output=True, timeout=_PATIENCE, check=False)
    except FileNotFoundError as error:
        raise LocalIOError(program, "docker's config.json names it, but it isn't installed", "Install it") from error
    except subprocess.TimeoutExpired as error:
        raise LocalIOError(program, f"did not answer within {_PATIENCE} seconds", _HELPER_HINT) from error
    except OSError as error:
        raise LocalIOError(program, f"could not be run: {error.strerror or error}", _HELPER_HINT) from error


# ---- the keyring


def _keyring(function: str, key: str, *words: str) -> Any:
    """Call a function of the optional package keyring; LookupError without it, or without a backend that stores anything."""
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


def _from_keyring(key: str) -> Credentials | None:
    with contextlib.suppress(LookupError):
        if text := _keyring("get_password", key):
            found = _entry(_parsed(text, Path(KEYRING)), KEYRING)
            return replace(found, source=KEYRING) if found else None
    return None
