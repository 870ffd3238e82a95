"""What `adapterhub login` keeps: one JSON file of the user's, and the secrets in the system's keyring where there is one.

The file says which hosts there are, so that the keyring, slow to import and perhaps locked, is asked only for one that is in
it. Without a usable keyring the secrets stand in the file itself, which then only its owner may read, as ever.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub import user_files
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError

FILE = "logins.json"
_SERVICE = "adapterhub"
_SECRETS = ("password", "token")


@dataclass(frozen=True)
class Credentials:
    """A name and a password, or one of the tokens that stand for both; `source`: who had them."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    bearer: str = field(default="", repr=False)
    source: str = ""

    def basic(self) -> str:
        """What HTTP calls Basic."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def secrets(self) -> tuple[str, ...]:
        """What must not be seen anywhere."""
        return tuple(secret for secret in (self.password, self.identity, self.bearer, self.basic()[6:]) if len(secret) > 3)


def hosts(path: Path) -> list[str]:
    """Whom there is a login for."""
    return sorted(_entries(user_files.read(path, private=True), path))


def read(path: Path, host: str) -> Credentials | None:
    """What is kept for a host; None for nothing. LocalIOError when it cannot be read, never with what it says."""
    entry = _entries(user_files.read(path, private=True), path).get(host)
    if entry is None:
        return None
    if entry.get("keyring"):
        entry = {**entry, **_from_keyring(host)}
    texts = {key: entry[key] for key in ("user", *_SECRETS) if isinstance(entry.get(key), str)}
    if not any(texts.get(key) for key in _SECRETS):
        raise LocalIOError(f"{path}: {host}", "there is no password", f"Log in again: `adapterhub login {host}`")
    return Credentials(texts.get("user", ""), texts.get("password", ""), "", texts.get("token", ""), "adapterhub login")


def write(path: Path, host: str, who: Credentials) -> str:
    """Keep a login; where the secret is now: `keyring`, or the file."""
    secrets = {"password": who.password} if who.password else {"token": who.bearer}
    # The file is looked at first: where it cannot be written, nothing should be in the keyring.
    user_files.change(path, lambda text: _dump(_entries(text, path)), private=True)
    in_keyring = _to_keyring(host, secrets)
    entry = {"user": who.user, **({"keyring": True} if in_keyring else secrets)}
    user_files.change(path, lambda text: _dump({**_entries(text, path), host: entry}), private=True)
    return "the system's keyring" if in_keyring else str(path)


def forget(path: Path, host: str) -> bool:
    """Forget a login; whether there was one."""
    entry = _entries(user_files.read(path, private=True), path).get(host)
    if entry is None:
        return False
    if entry.get("keyring"):
        _forget_in_keyring(host)
    user_files.change(path, lambda text: _dump({k: v for k, v in _entries(text, path).items() if k != host}), private=True)
    return True


def _entries(text: str, path: Path) -> dict[str, dict[str, Any]]:
    try:
        document = json_file.parse_object(text, str(path)) if text else {"version": 1, "logins": {}}
    except AdapterhubError as error:  # json would say where it stopped understanding
        raise LocalIOError(str(path), "cannot be read as the file of logins", "Remove it, and log in again") from error
    logins = document.get("logins")
    if document.get("version") != 1 or not isinstance(logins, dict) or not all(isinstance(v, dict) for v in logins.values()):
        raise LocalIOError(str(path), "is not a file of logins that is known here", "Remove it, and log in again")
    return logins


def _dump(entries: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"version": 1, "logins": entries}, indent=2, sort_keys=True) + "\n"


# ---- the keyring


def _keyring() -> Any:
    """The optional package `keyring`, None without it or without a backend that keeps something."""
    try:
        import keyring
        from keyring.backends import chainer, fail, null
    except ImportError:
        return None
    backend = keyring.get_keyring()
    useless = isinstance(backend, (fail.Keyring, null.Keyring))
    return None if useless or (isinstance(backend, chainer.ChainerBackend) and not backend.backends) else keyring


def _to_keyring(host: str, secrets: dict[str, str]) -> bool:
    """Whether the keyring has the secrets now; it may be locked, or not there in this session."""
    if (keyring := _keyring()) is None:
        return False
    try:
        keyring.set_password(_SERVICE, host, json.dumps(secrets))
    except Exception:  # noqa: BLE001 - backends of others, each with errors of its own; then the file it is
        return False
    return True


def _from_keyring(host: str) -> dict[str, Any]:
    with _errors(host):
        if (keyring := _keyring()) is None:
            raise LookupError
        found = json.loads(keyring.get_password(_SERVICE, host) or "{}")
        return found if isinstance(found, dict) else {}


def _forget_in_keyring(host: str) -> None:
    with _errors(host):
        if (keyring := _keyring()) is None:
            raise LookupError
        if keyring.get_password(_SERVICE, host) is not None:
            keyring.delete_password(_SERVICE, host)


@contextlib.contextmanager
def _errors(host: str) -> Iterator[None]:
    try:
        yield
    except Exception:  # noqa: BLE001 - as above; what they say may be a secret
        what = "the login is in the system's keyring, which cannot be asked here"
        raise LocalIOError(host, what, f"Unlock it, or log in again: `adapterhub login {host}`") from None
