"""Webhooks: events of a namespace, posted to a URL and signed with a secret that both ends know.

The thread that makes a move adds a row for each event and webhook; the rows are sent in the background: at least once, in any
order, with longer and longer pauses until one is accepted. Most events come from the log: how far the log of a name is
announced changes in one transaction with the rows, so that a move by a killed process, or by a program that is not a hub, is
announced by the next hub that looks. Receivers that do not answer delay none of other namespaces: those of one namespace have
a thread together. A URL may not lead to an address that only this machine or its network can reach, unless the operator has
allowed that for this webhook; redirects are not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from typing import Any

from adapterhub.http.boundary import Boundary
from adapterhub.http.client import Client
from adapterhub.http.http_errors import RetryableError
from adapterhub.http.urls import origin
from adapterhub.index.queries import LogState
from adapterhub.manifest import release_statement, rollout_state
from adapterhub.registry.moves import now
from adapterhub.store.ref_log import Entry, RefLog
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .accounts import accounts
from .hub_database import HubDatabase

_log = logging.getLogger("adapterhub.hub")
PAUSES = (10, 60, 300, 1800, 7200)
"""Seconds before each retry."""
_TIMEOUT = 10.0  # seconds
_MAX_WEBHOOKS, _MAX_URL = 50, 2000  # webhooks of a namespace, and characters of a URL
_MAX_BATCH = 20  # events per webhook and round, unless they take longer than one of them may
_MAX_EVENTS = 1000  # of a webhook that are kept, sent or waiting: the newest
_MAX_MESSAGE = 1000  # characters of a message in an event
_THREADS = 8  # each serves the webhooks of one namespace at a time
_CLAIM = 120.0  # seconds in which no other process sends the same event
_RETENTION = 30 * 86400.0  # seconds for which sent events stay in the list
_POLL_INTERVAL = 5.0  # seconds between checks for due events
WAITING, DELIVERED, FAILED = "waiting", "delivered", "failed"


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook: its namespace and URL, and whether the URL may lead to a private address."""

    id: int
    namespace: str
    url: str
    private: bool


@dataclass(frozen=True, slots=True)
class Delivery:
    """The delivery of an event: its state, the attempts so far, and why the last one failed."""

    id: int
    webhook: int
    event: str
    state: str
    tries: int
    error: str


# ---- the list of webhooks


def add(database: HubDatabase, namespace: str, url: str, *, private: bool = False) -> tuple[int, str]:
    """Add a webhook; return its id, and its secret, which is shown only once.

    Raises:
        UsageError: `url` is not a URL, or too long.
        RefusedError: The namespace has too many webhooks.
    """
    accounts.check_namespace(namespace)
    if len(url) > _MAX_URL:
        raise UsageError("url", f"has more than {_MAX_URL} characters")
    origin(url, url.partition("?")[0], is_user_input=True)
    secret = secrets.token_hex(32)
    sql = "INSERT INTO webhooks (namespace, url, secret, private, since) VALUES (?, ?, ?, ?, ?) RETURNING id"
    with database.transaction():
        if database.select("SELECT count(*) FROM webhooks WHERE namespace = ?", namespace)[0][0] >= _MAX_WEBHOOKS:
            raise RefusedError(namespace, f"has {_MAX_WEBHOOKS} webhooks", "Remove one first")
        return int(database.select(sql, namespace, url, secret, int(private), now())[0][0]), secret


def list_webhooks(database: HubDatabase) -> list[Webhook]:
    """Return the webhooks, by namespace."""
    rows = database.select("SELECT id, namespace, url, private FROM webhooks ORDER BY namespace, id")
    return [Webhook(ident, namespace, url, bool(private)) for ident, namespace, url, private in rows]


def remove(database: HubDatabase, ident: int) -> None:
    """Remove a webhook and its pending events.

    Raises:
        NotFoundError: There is no such webhook.
    """
    with database.transaction():
        database.execute("DELETE FROM deliveries WHERE webhook = ?", ident)
        if not database.execute("DELETE FROM webhooks WHERE id = ?", ident):
            raise NotFoundError(str(ident), "no such webhook", "List the webhooks", code="no-such-number", kind="webhook")


def deliveries(database: HubDatabase, limit: int = 100, *, namespace: str = "") -> list[Delivery]:
    """Return the newest events, sent or waiting; for the webhooks of one namespace if it is given."""
    sql = (
        "SELECT d.id, d.webhook, d.event, d.state, d.tries, d.error FROM deliveries d JOIN webhooks w ON w.id = d.webhook"
        " WHERE ? = '' OR w.namespace = ? ORDER BY d.id DESC LIMIT ?"
    )
    return [Delivery(*row) for row in database.select(sql, namespace, namespace, limit)]


# ---- events


def events(entry: Entry) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the events of a log entry: name and payload."""
    about: dict[str, object] = {"name": entry.name, "time": entry.time, "author": entry.author}
    message = release_statement.log_summary(entry.op, entry.message)[:_MAX_MESSAGE]
    version = {"number": entry.number, "digest": entry.digest, "message": message}
    if entry.op == "push":
        yield "version.created", {**about, **version}
    if entry.op in ("push", "tag", "rollback"):
        for tag in entry.tags:
            yield "tag.moved", {**about, **version, "tag": tag}
    if entry.op == "approve":
        for tag in entry.tags:
            yield "version.approved", {**about, **version, "tag": tag}
    if entry.op == "withdraw":
        yield "version.withdrawn", {**about, **version}
    if entry.op == "rollout" and (state := rollout_state.parse(entry.message)):
        fields = {"route": state.route, "state": state.state, "share": state.share, "reason": state.reason}
        yield "version.rollout", {**about, **version, **fields}
    if entry.op == "delete":
        yield "name.removed", about


_DELETE_OLDEST = """
    DELETE FROM deliveries WHERE webhook = ?
    AND id <= (SELECT id FROM deliveries WHERE webhook = ? ORDER BY id DESC LIMIT 1 OFFSET ?)
"""


class Webhooks:
    """The webhooks of a hub: `announce` queues events, and `run` sends them.

    Args:
        database: Has the webhooks, the events to send, and how far the log of each name is announced.
        log: The log of moves.
        clock: A clock in seconds.
    """

    def __init__(self, database: HubDatabase, log: RefLog, clock: Callable[[], float] = time.time) -> None:
        self._database, self._log, self._clock = database, log, clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._new = asyncio.Event()
        self._pool = ThreadPoolExecutor(_THREADS, "hub-webhook")

    def announce(self, entry: Entry) -> None:
        """Queue the events of a move. The move is already made, so an error here is only logged."""
        self._announce(entry.name, entry.seq)

    def queue_event(self, name: str, payload: Mapping[str, object]) -> None:
        """Queue an event about a name, within a transaction."""
        sql = "INSERT INTO deliveries (webhook, event, body, due, state, tries, error) VALUES (?, ?, ?, ?, 'waiting', 0, '')"
        for ident, since in self._database.select("SELECT id, since FROM webhooks WHERE namespace = ?", name.partition("/")[0]):
            if str(payload["time"]) >= since:
                self._database.execute(sql, ident, str(payload["event"]), json.dumps(payload), self._clock())
                self._database.execute(_DELETE_OLDEST, ident, ident, _MAX_EVENTS)

    def wake(self) -> None:
        """Send due events at once, rather than with the next look for some."""
        if self._loop:
            # The loop is closed if the hub is shutting down: the next one sends the event.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._new.set)

    def catch_up(self, names_in: Callable[[str], Iterable[LogState]]) -> None:
        """Announce moves made by killed processes, or by programs that announce nothing.

        `names_in` returns the names in a namespace: it is asked about those that have webhooks.
        """
        # Added by an older hub that did not record it.
        self._database.execute("UPDATE webhooks SET since = ? WHERE since = ''", now())
        with self._database.snapshot():
            spaces = {namespace for (namespace,) in self._database.select("SELECT namespace FROM webhooks")}
            announced = dict(self._database.select("SELECT name, seq FROM announced")) if spaces else {}
        for name in (name for space in sorted(spaces) for name in names_in(space)):
            if name.seq > announced.get(name.name, 0):
                self._announce(name.name, name.seq)

    def _announce(self, name: str, seq: int) -> None:
        try:
            if self._add_rows(name, seq):
                self.wake()
        except AdapterhubError:
            _log.exception("entry %d of %s is not yet announced to webhooks", seq, name)

    def _add_rows(self, name: str, seq: int) -> bool:
        """Add a row for each event and webhook, up to entry `seq` of a log; return whether there were any."""
        database, namespace = self._database, name.partition("/")[0]
        webhooks_sql = "SELECT id, since FROM webhooks WHERE namespace = ?"
        if not database.select(webhooks_sql, namespace):
            return False
        with database.transaction():
            webhooks = database.select(webhooks_sql, namespace)
            previous = database.select("SELECT seq FROM announced WHERE name = ?", name)
            entries = self._unannounced_entries(
                name, seq, previous[0][0] if previous else 0, min(since for _, since in webhooks)
            )
            sql = (
                "INSERT INTO deliveries (webhook, event, body, due, state, tries, error) VALUES (?, ?, ?, ?, 'waiting', 0, '')"
            )
            for entry in entries:
                for event, payload in events(entry):
                    for ident in (ident for ident, since in webhooks if entry.time >= since):
                        database.execute(sql, ident, event, json.dumps({"event": event, **payload}), self._clock())
            for ident, _ in webhooks if entries else ():
                database.execute(_DELETE_OLDEST, ident, ident, _MAX_EVENTS)
            if entries:
                sql = "INSERT INTO announced (name, seq) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET seq = excluded.seq"
                database.execute(sql, name, seq)
        return bool(entries)

    def _unannounced_entries(self, name: str, last: int, announced: int, since: str) -> list[Entry]:
        """Return the log entries after `announced`, up to `last`, that were written since a time, oldest first."""
        entries: list[Entry] = []
        while last > announced and (step := self._log.entry(name, last)) and step[0].time >= since:
            entries.append(step[0])
            last -= 1
        return entries[::-1]

    async def run(self) -> None:
        """Send due events until `stop`; one request may still finish after that."""
        self._loop = asyncio.get_running_loop()
        while not self._stopped:
            self._new.clear()
            with contextlib.suppress(AdapterhubError):  # the database is locked: try again later
                await asyncio.to_thread(self.deliver)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._new.wait(), _POLL_INTERVAL)

    def stop(self) -> None:
        """Make `run` return."""
        self._stopped = True
        self._new.set()

    def deliver(self) -> None:
        """Send due events, to several receivers at a time."""
        now = self._clock()
        sql = (
            "SELECT namespace, d.id, event, body, tries, url, secret, private FROM (SELECT *, row_number()"
            " OVER (PARTITION BY webhook ORDER BY due, id) AS place FROM deliveries WHERE state = 'waiting' AND due <= ?) d"
            " JOIN webhooks w ON w.id = webhook WHERE place <= ? ORDER BY namespace, place, webhook"
        )
        rows = self._database.select(sql, now, _MAX_BATCH)
        list(self._pool.map(self._send, [[row[1:] for row in group] for _, group in groupby(rows, lambda row: row[0])]))
        self._database.execute("DELETE FROM deliveries WHERE state <> 'waiting' AND due < ?", now - _RETENTION)

    def _send(self, events: Sequence[tuple[Any, ...]]) -> None:
        """Send events of one namespace, until that has taken longer than one of them may."""
        now, end = self._clock(), time.monotonic() + _TIMEOUT
        for ident, event, body, tries, url, secret, private in events:
            if self._stopped or time.monotonic() > end:
                return
            claim = "UPDATE deliveries SET due = ? WHERE id = ? AND state = 'waiting' AND due <= ?"
            # Claim from now on: the events before this one may have taken long.
            if not self._database.execute(claim, self._clock() + _CLAIM, ident, now):
                continue  # another process has it
            error = _post_event(url, secret, str(ident), event, body, private=bool(private))
            state = DELIVERED if not error else FAILED if tries >= len(PAUSES) else WAITING
            due = self._clock() + (PAUSES[tries] if state == WAITING else 0)
            update = "UPDATE deliveries SET state = ?, due = ?, tries = ?, error = ? WHERE id = ?"
            self._database.execute(update, state, due, tries + 1, error[:300], ident)


def signature(secret: str, body: bytes) -> str:
    """Return the value of X-Hub-Signature-256: an HMAC over the body."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def _post_event(url: str, secret: str, ident: str, event: str, text: str, *, private: bool) -> str:
    """Send one event; return why that failed, or an empty string.

    The reason never includes the URL, whose path may be a secret of its own.
    """
    body = text.encode()
    headers = {
        "Content-Type": "application/json",
        "X-Hub-Event": event,
        "X-Hub-Delivery": ident,
        "X-Hub-Signature-256": signature(secret, body),
    }
    scheme, host, _ = origin(url, "webhook")
    boundary = None if private else Boundary("", public_only=True)
    try:
        with closing(Client(url if private else "", pauses=(), timeout=_TIMEOUT, boundary=boundary)) as client:
            location, good = f"{scheme}://{host}", range(200, 300)
            client.request("POST", url, location, good=good, headers=headers, body=body, retry=False, redirects=False)
    except RetryableError as error:
        return error.reason
    except AdapterhubError as error:
        return str(error)
    return ""
