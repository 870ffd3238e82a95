"""Push replication: what is pushed here is copied to other hubs and OCI registries that the operator names.

A target has a pattern of names. The log of a name says what is to be done there (`replica`), and the table `replicated` up to
which entry it is done, so that nothing is lost or made twice wherever a process is killed. Of several processes, one at a time
works for a target. A move that a target refuses holds up no other: it is passed over, and made again with those after it ever
more rarely. A target that does not answer is asked about three names at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice

from adapterhub.index import queries, repository_rows
from adapterhub.index.queries import LogState
from adapterhub.registry.repository_documents import Repository
from adapterhub.store.store import Entry
from adapterhub_converters.errors import AdapterhubError, LocalIOError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from . import commits
from .accounts.accounts import READERS
from .hidden_names import as_repositories
from .hub_database import HubDatabase
from .jobs import Jobs
from .replica import Replica
from .settings import Replication
from .workers import Worker, Workers

_log = logging.getLogger("adapterhub.hub")
_INTERVAL = 5.0  # seconds between two looks at the logs
_PAUSE = 20  # times what a look took: at most a twentieth of a processor
_MAX_PAGE, _MAX_NAMES = 5_000, 1_000  # names read from the tables at a time, and worked on between two looks
_MAX_ENTRIES = 500  # entries of a log that are replayed at a time
_FIRST_RETRY, _MAX_RETRY = 30.0, 3600.0  # seconds until a name that failed is tried again
_MAX_FAILURES = 3  # names that fail in a row before a target that does not answer is left alone until the next look
_MAX_ERROR = 300  # characters


@dataclass(frozen=True, slots=True)
class ReplicationState:
    """How far a target is behind.

    Attributes:
        complete: Everything that was moved here before this time, in seconds since the epoch, is there.
        waiting: Names with moves that are not there yet.
        failing: Those of them that failed when they were last tried.
        error: Why the last of these did.
    """

    target: str
    complete: float
    waiting: int
    failing: int
    error: str = ""


def states(database: HubDatabase) -> list[ReplicationState]:
    """Return the state of every target that a hub of this database was started with."""
    sql = "SELECT target, complete, waiting, failing, error FROM replications ORDER BY target"
    return [ReplicationState(*row) for row in database.select(sql)]


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far a name is at a target.

    Attributes:
        seq: The last entry that was made there, or refused.
        private: Whether the name is private there.
        tries: The failed tries in a row, with refused entries too.
        due: When it is tried again, in seconds since the epoch.
        refused: The first entry that was refused; 0 for none.
    """

    seq: int = 0
    private: bool = False
    tries: int = 0
    due: float = 0.0
    refused: int = 0

    def postponed(self) -> _Progress:
        """Return this after one more failed try, with a longer pause before the next one."""
        pause = min(_FIRST_RETRY * 2 ** min(self.tries, 10), _MAX_RETRY)
        return replace(self, tries=self.tries + 1, due=time.time() + pause)

    def is_due(self, last_seq: int, now: float) -> bool:
        """Return whether there is something to be done at a time, with a log that ends at `last_seq`."""
        return self.due <= now or (self.refused > 0 and last_seq > self.seq)


class Replicator:
    """Copies the names of a hub to its targets: `run` until `stop`, then `close`.

    Args:
        targets: The targets.
        workers: Threads of this hub; the replicator uses one of its own for each target.
        database: The tables of the hub.
        jobs: The claims of this process.
    """

    def __init__(
        self,
        targets: Sequence[Replication],
        *,
        workers: Workers,
        database: HubDatabase,
        jobs: Jobs,
    ) -> None:
        self._targets, self._workers, self._database, self._jobs = targets, workers, database, jobs
        self._pool = ThreadPoolExecutor(max(len(targets), 1), "hub-replication")
        self._active: set[Replica] = set()
        self._stopped = False

    async def run(self) -> None:
        """Copy to all targets until canceled."""
        await asyncio.to_thread(self._forget_other_targets)
        await asyncio.gather(*(self._follow(target) for target in self._targets))

    async def _follow(self, target: Replication) -> None:
        job, loop = f"replicate {target.key}", asyncio.get_running_loop()
        while not self._stopped:
            pause = _INTERVAL
            try:
                if not await asyncio.to_thread(self._jobs.owner, job):
                    async with self._jobs.claim(job):
                        pause = await loop.run_in_executor(self._pool, self.replicate, target)
            except AdapterhubError as error:  # the database is away, for instance: try again later
                _log.warning("replication to %s is postponed: %s", target.url, error)
            await asyncio.sleep(pause)

    def stop(self) -> None:
        """Stop the transfers; the next process resumes where each one stopped."""
        self._stopped = True
        for replica in list(self._active):
            replica.remote.stop()

    def close(self) -> None:
        """Wait for the threads."""
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    # ---- in a thread of its own

    def replicate(self, target: Replication) -> float:
        """Copy what waits for a target, as far as it is due; return the seconds until the next look."""
        worker, started, clock = self._workers.worker(), time.time(), time.monotonic()
        names, waiting, failing = list[tuple[LogState, _Progress]](), 0, 0
        for state, progress in self._pending_names(worker, target):
            waiting, failing = waiting + 1, failing + (progress.tries > 0)
            if progress.is_due(state.seq, started) and len(names) < _MAX_NAMES:
                names.append((state, progress))
        took = time.monotonic() - clock
        self._record(target, started, waiting, failing)
        completed = failures = 0
        for state, progress in names:
            if self._stopped or failures == _MAX_FAILURES:
                break
            try:
                completed += self._send(worker, target, state, progress)
                failures = 0
            except AdapterhubError as error:
                if self._stopped:
                    break
                failures += isinstance(error, (RemoteError, LocalIOError))
                self._note_failure(target, state.name, progress, error)
        if completed:
            is_complete = completed == waiting
            self._record(target, started, waiting - completed, max(failing - completed, 0), complete=is_complete)
        elif not waiting:
            self._record(target, started, 0, 0, complete=True)
        return 0.0 if completed == _MAX_NAMES else max(_INTERVAL, _PAUSE * took)

    def _pending_names(self, worker: Worker, target: Replication) -> Iterator[tuple[LogState, _Progress]]:
        """Yield each name of a target that has moves to make there, and how far it is."""
        index, last = worker.registry.index, ""
        sql = "SELECT name, seq, private, tries, due, refused FROM replicated WHERE target = ? AND name > ? AND name <= ?"
        while page := queries.log_states_after(index, last, _MAX_PAGE):
            rows = self._database.select(sql, target.key, last, page[-1].name)
            progress_by_name = {name: _Progress(seq, bool(private), *more) for name, seq, private, *more in rows}
            last = page[-1].name
            states = [state for state in page if fnmatchcase(state.name, target.pattern)]
            restricted = as_repositories(repository_rows.restricted_among(index, [state.name for state in states]))
            private_names = self._private_names({state.name: restricted.get(state.name) for state in states})
            for state in states:
                private, progress = state.name in private_names, progress_by_name.get(state.name) or _Progress()
                if progress.seq > state.seq:  # the log is that of a backup: its moves are made again
                    progress = replace(progress, seq=0, refused=0)
                if private and not (target.is_hub or target.with_private):
                    continue
                is_shown_there = private and target.is_hub and not (progress.private or state.deleted)
                if state.seq > progress.seq or progress.refused or is_shown_there:
                    yield state, progress

    def _private_names(self, records: Mapping[str, Repository | None]) -> set[str]:
        """Return those of a page of names, given with their records, that not everybody may read, as of now."""
        if not records:
            return set()
        namespaces = {name.partition("/")[0] for name in records}
        sql = (
            f"SELECT name FROM gates WHERE name IN ({', '.join('?' * len(records))})"  # noqa: S608 - marks
            f" UNION ALL SELECT name FROM namespaces WHERE readers <> ? AND name IN ({', '.join('?' * len(namespaces))})"
        )
        closed = {name for (name,) in self._database.select(sql, *records, READERS[0], *namespaces)}
        return {
            name
            for name, record in records.items()
            if not closed.isdisjoint((name, name.partition("/")[0])) or (record and (record.private or record.moved_from))
        }

    def _send(self, worker: Worker, target: Replication, state: LogState, progress: _Progress) -> bool:
        """Make the moves of a name at a target, up to the entry of `state`; return whether all of them are made."""
        name = state.name
        repository = worker.repositories.get(name)
        private = bool(self._private_names({name: repository}))
        if (private and not (target.is_hub or target.with_private)) or commits.is_arriving(worker, name, repository):
            return False
        if state.deleted:  # what was removed here stays there
            self._note(target, name, _Progress(state.seq, progress.private))
            return True
        with Replica(worker, name, target) as replica, self._stopping(replica):
            if private:
                replica.make_private()
                self._note(target, name, replace(progress, private=True))
            return self._replay(worker, replica, state, replace(progress, private=private))

    def _replay(self, worker: Worker, replica: Replica, state: LogState, progress: _Progress) -> bool:
        """Make the moves after those that are made, and if it is time for it the refused ones with all after them."""
        target, name, log = replica.target, state.name, worker.registry.store.log
        retries = progress.refused > 0 and progress.due <= time.time()
        first = progress.refused if retries else progress.seq + 1
        entries = (logged[0] for seq in range(first, state.seq + 1) if (logged := log.entry(name, seq)))
        refused, refusal = 0 if retries else progress.refused, None
        while batch := list[Entry](islice(entries, _MAX_ENTRIES)):
            for seq, error in replica.replay(batch):
                if error is not None:
                    _log.warning("entry %d of %s is refused by %s: %s", seq, name, target.url, error)
                    refused, refusal = refused or seq, error
                # Until a retry has reached its end, a process that is killed has the next one begin it again.
                progress = replace(progress, seq=max(seq, progress.seq), refused=progress.refused or refused)
                self._note(target, name, progress if progress.refused else replace(progress, tries=0, due=0.0))
                # Another process may have made it private since the look.
                if not progress.private and self._private_names({name: worker.repositories.get(name)}):
                    return False  # the next look makes it private there, before more of it is sent
        if refusal is not None:
            self._note(target, name, replace(progress.postponed(), refused=refused))
            self._note_error(target, name, refusal)
        elif not refused:
            self._note(target, name, replace(progress, tries=0, due=0.0, refused=0))
        return not refused

    @contextlib.contextmanager
    def _stopping(self, replica: Replica) -> Iterator[None]:
        """Have `stop` end what waits for a replica in the block."""
        self._active.add(replica)
        try:
            yield
        finally:
            self._active.discard(replica)

    # ---- the tables

    def _forget_other_targets(self) -> None:
        """Forget how far targets were behind that this hub has no more; what they have is kept in mind, if they come back."""
        keys = [target.key for target in self._targets]
        with contextlib.suppress(AdapterhubError):
            self._database.execute(f"DELETE FROM replications WHERE target NOT IN ({', '.join('?' * len(keys))})", *keys)  # noqa: S608

    def _note(self, target: Replication, name: str, progress: _Progress) -> None:
        sql = (
            "INSERT INTO replicated (target, name, seq, private, tries, due, refused) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (target, name) DO UPDATE SET seq = excluded.seq, private = excluded.private, tries = excluded.tries,"
            " due = excluded.due, refused = excluded.refused"
        )
        values = progress.seq, int(progress.private), progress.tries, progress.due, progress.refused
        self._database.execute(sql, target.key, name, *values)

    def _note_failure(self, target: Replication, name: str, progress: _Progress, error: AdapterhubError) -> None:
        """Postpone a name that could not be sent, which then goes on with the first move that is not made there."""
        _log.warning("%s is not replicated to %s: %s", name, target.url, error)
        later = progress.postponed()
        sql = (
            "INSERT INTO replicated (target, name, seq, private, tries, due) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (target, name) DO UPDATE SET tries = excluded.tries, due = excluded.due, refused = 0,"
            " seq = CASE WHEN replicated.refused > 0 THEN replicated.refused - 1 ELSE replicated.seq END"
        )
        self._database.execute(sql, target.key, name, progress.seq, int(progress.private), later.tries, later.due)
        self._note_error(target, name, error)

    def _note_error(self, target: Replication, name: str, error: AdapterhubError) -> None:
        text = f"{name}: {error}"[:_MAX_ERROR]
        self._database.execute("UPDATE replications SET error = ? WHERE target = ?", text, target.key)

    def _record(self, target: Replication, moment: float, waiting: int, failing: int, *, complete: bool = False) -> None:
        """Record how far a target is behind; with `complete`, that it has everything as of a time."""
        sql = (
            "INSERT INTO replications (target, complete, waiting, failing, error) VALUES (?, ?, ?, ?, '')"
            " ON CONFLICT (target) DO UPDATE SET waiting = excluded.waiting, failing = excluded.failing"
        )
        self._database.execute(sql, target.key, moment, waiting, failing)
        if complete:
            self._database.execute("UPDATE replications SET complete = ?, error = '' WHERE target = ?", moment, target.key)
