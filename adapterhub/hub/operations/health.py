"""Whether a hub is fit to serve: its database, its store, its disk; and what else an operator should know."""

from __future__ import annotations

import datetime
import logging
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import replication
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.replication import ReplicationState
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage.folder_storage import Storage
from adapterhub.hub.storage.from_settings import open_storage
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub.version import __version__
from adapterhub_converters.containers import open_file
from adapterhub_converters.errors import AdapterhubError, FormatError
from adapterhub_converters.lazy_dataclass import dataclass

_log = logging.getLogger("adapterhub.hub")
_MIN_FREE = 1 << 30  # bytes
_READY_SECONDS = 5.0  # for which the results of /ready are reused
_SOON = 21 * 86400  # seconds before the end of a certificate that are worth a warning
_SKEW = 300.0  # seconds a clock may be behind times the hub itself has written
OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check: what was checked, its state (OK, WARNING or ERROR), and the reason."""

    name: str
    state: str = OK
    what: str = ""


async def health(_request: Request) -> Response:
    """GET /health: whether the process answers."""
    return JSONResponse({"status": "ok", "version": __version__})


async def ready(request: Request) -> Response:
    """GET /ready: whether the hub can do its work; 503 if not, for a load balancer.

    The response names the failed checks; the reasons are only in the log: paths and hosts are not for everybody.
    """
    hub: Hub = request.app.state.hub
    readiness: Readiness = request.app.state.readiness
    results = await hub.workers.read(readiness.get, lambda: checks(hub.storage))
    failed = [check for check in results if check.state == ERROR]
    for check in failed:
        _log.error("not ready: %s: %s", check.name, check.what)
    answer = {"status": "not ready" if failed else "ready", "checks": {check.name: check.state for check in results}}
    return JSONResponse(answer, 503 if failed else 200)


class Readiness:
    """The last results of the checks, reused for some seconds: anybody may ask, and a check writes to the store."""

    def __init__(self) -> None:
        self._lock, self._until, self._results = threading.Lock(), 0.0, list[Check]()

    def get(self, check: Callable[[], list[Check]]) -> list[Check]:
        """Return the results; one request at a time checks anew, while the others get those of before."""
        if self._lock.acquire(blocking=not self._results):
            try:
                if self._until < time.monotonic():
                    self._results, self._until = check(), time.monotonic() + _READY_SECONDS
            finally:
                self._lock.release()
        return self._results


def checks(storage: Storage) -> list[Check]:
    """Check that the database responds, the store or the bucket can be written, and the disk has space."""
    return [
        _run_check("database", lambda: _database(storage.database)),
        _run_check("store", lambda: _store(storage)),
        _run_check("disk", lambda: _disk(storage.root)),
    ]


def _run_check(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (AdapterhubError, OSError) as error:
        return Check(name, ERROR, str(error))


def _database(database: HubDatabase) -> Check:
    with database.transaction():  # takes the lock that every write needs
        database.select("SELECT COUNT(*) FROM accounts")
    return Check("database")


def _store(storage: Storage) -> Check:
    storage.check()
    return Check("store")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if free < _MIN_FREE:
        return Check("disk", ERROR, f"{free:,} bytes are free, less than {_MIN_FREE:,}")
    return Check("disk")


# ---- for an operator


def diagnosis(settings: HubSettings, certificate: Path | None = None) -> list[Check]:
    """Return everything that can be checked about a hub from outside, running or not.

    Args:
        settings: Where its registry is.
        certificate: Its certificate, PEM; None without one.
    """
    try:
        storage = open_storage(settings)
    except AdapterhubError as error:
        return [Check("database", ERROR, str(error))]
    with closing(storage):
        database = storage.database
        results = checks(storage)
        if not settings.database:
            results.append(_run_check("permissions", lambda: _permissions(database.path)))
        results.append(_run_check("clock", lambda: _clock(database)))
        results += [_run_check("accounts", lambda: _accounts(database)), _run_check("audit", lambda: _chain(database))]
        results += [_replication(state) for state in replication.states(database)]
    return [*results, _run_check("certificate", lambda: _certificate(certificate))] if certificate else results


def _permissions(path: Path) -> Check:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Check("permissions", ERROR, f"{path} can be read by others (mode {mode:o}); set it to 600")
    return Check("permissions")


def _clock(database: HubDatabase) -> Check:
    # The hub's own rows are the only other clock at hand.
    newest = max(row[0] or 0 for row in database.select("SELECT MAX(created) FROM tokens UNION SELECT MAX(time) FROM audit"))
    if newest > time.time() + _SKEW:
        return Check("clock", ERROR, "it is behind times that this hub has written; tokens last too long")
    return Check("clock")


@of_one_snapshot
def _accounts(database: HubDatabase) -> Check:
    sql = "SELECT COUNT(*) FROM tokens WHERE revoked IS NULL AND expires IS NULL AND kind = 'service' AND role = 'admin'"
    lasting = database.select(sql)[0][0]
    if not database.select("SELECT 1 FROM tokens WHERE revoked IS NULL LIMIT 1"):
        return Check("accounts", WARNING, "there is no token: nobody can push")
    if lasting:
        tokens = "1 token of a service" if lasting == 1 else f"{lasting} tokens of services"
        return Check("accounts", WARNING, f"{tokens} may do everything and never expire{'s' if lasting == 1 else ''}")
    return Check("accounts")


def _replication(state: ReplicationState) -> Check:
    if state.failing:
        return Check("replication", WARNING, f"{state.target}: {state.failing} of {state.waiting} names fail; {state.error}")
    since = datetime.datetime.fromtimestamp(state.complete, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return Check("replication", OK, f"{state.target}: complete as of {since}, {state.waiting} names wait")


def _chain(database: HubDatabase) -> Check:
    from adapterhub.hub.accounts import audit_log

    _, broken = audit_log.verify_chain(database)
    return Check("audit") if broken is None else Check("audit", ERROR, f"{broken.where} {broken.what}")


def _certificate(path: Path) -> Check:
    ends = certificate_end(path)
    remaining = ends - time.time()
    day = datetime.datetime.fromtimestamp(ends, datetime.UTC).date()
    if remaining < 0:
        return Check("certificate", ERROR, f"it ended on {day}")
    return Check("certificate", WARNING if remaining < _SOON else OK, f"it ends on {day}")


def certificate_end(path: Path) -> float:
    """Return when the first certificate in a PEM file ends, in seconds since the epoch.

    Raises:
        FormatError: The file is not a certificate.
    """
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(open_file.read_bytes(path)).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise FormatError(str(path), "not a certificate in PEM") from error
