"""Access to the tables of the hub for its commands, and their output of secrets and removals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from adapterhub.cli import environment, output, registry_choice
from adapterhub.cli.options import Settings
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.hub.hub_database import HubDatabase

T = TypeVar("T")


def hub_database(settings: Settings) -> HubDatabase:
    """Open the tables of the hub in use: hub.db next to its registry, created if it is missing, or those in PostgreSQL."""
    from adapterhub.hub.storage.from_settings import open_database

    return open_database(registry_choice.hub_settings(settings))


@contextmanager
def changed_database(settings: Settings, action: str, name: str, detail: str = "") -> Iterator[HubDatabase]:
    """Open the tables for a change, and record it in the audit log once it was made."""
    from adapterhub.hub.accounts import audit_log
    from adapterhub.hub.accounts.audit_log import Event

    with closing(hub_database(settings)) as database:
        yield database
        # An exception in the block skips this: only changes that were made are recorded.
        audit_log.record(database, Event(f"cli.{action}", name, detail, environment.author()))


def read_hub(settings: Settings, read: Callable[[HubDatabase], T]) -> T:
    """Return what a function reads from the tables."""
    with closing(hub_database(settings)) as database:
        return read(database)


def emit_once(settings: Settings, document: dict[str, Any], secret: str, use: str) -> None:
    """Print a secret that cannot be shown again; `use` tells people what it is for."""
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(secret))
    if not settings.as_json:
        output.flush()  # if stdout and stderr go to the same place, the secret comes first
        output.say(f"save it now, it is not shown again: {use}")


def emit_removed(settings: Settings, kind: str, name: str | int, **fields: str) -> None:
    """Print what was removed; `fields` are further keys of the JSON document."""
    document = {"removed": name, "kind": kind, **fields}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed {kind} {name}"))


def claims_of(texts: tuple[str, ...]) -> dict[str, str]:
    """Return the claims and values of `--claim NAME=VALUE`."""
    return dict(map(_claim, texts))


def _claim(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UsageError(f"--claim {text[:80]}", "not a claim and its value", "Write it like repository=org/trainer")
    return name, value


def claims_text(claims: Mapping[str, str]) -> str:
    """Return claims as they are written in `--claim`."""
    return " ".join(f"{name}={value}" for name, value in claims.items())
