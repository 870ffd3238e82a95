"""Audits of the logs of a registry and its hub, and signed checkpoints of the ends of these logs.

An audit verifies that every entry is as it was written. It reads the store or a copy of it, without a network and without
registry.db; for a hub in PostgreSQL it reads the database. It changes nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import IntegrityError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from .workspace import StrPath

if TYPE_CHECKING:
    from adapterhub.identity import Identity
    from adapterhub.store.log_chain import Chains, Fault
    from adapterhub.trust.keys import Signer, TrustedSigner
    from adapterhub.trust.log_checkpoint import Checkpoint


_DATABASES = ("postgresql://", "postgres://")


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        where: The folder of the registry, or the database.
        faults: The first altered entry of each log; empty if the logs are intact.
        names: The number of logs: of names, and of the hub's own documents.
        entries: The number of entries that follow from the one before.
        rows: The number of rows of the hub's audit log; 0 without a hub.
        checkpoint: The checkpoint that the logs were compared with. Without one (None), entries missing at an end go unnoticed.
        signer: The file of the key, or the identity, that signed the checkpoint; empty without one.
    """

    where: str
    faults: tuple[Fault, ...]
    names: int
    entries: int
    rows: int
    checkpoint: Checkpoint | None = None
    signer: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


def audit(
    registry: StrPath, *, checkpoint: StrPath | None = None, keys: StrPath | Identity | Sequence[StrPath | Identity] = ()
) -> Audit:
    """Verify the logs of a registry and of the hub that serves it: each entry has the digest of the one before it.

    Args:
        registry: The folder of the registry, or the address of the database of a hub, `postgresql://user@host/name`.
        checkpoint: A file that `sign_checkpoint` wrote; its entries must still be there.
        keys: Public keys in PEM, folders of them, or identities; one of them must have signed the checkpoint.

    Raises:
        NotFoundError: There is no registry or no checkpoint.
        IntegrityError: The checkpoint is not signed by one of the keys, or it was changed.

    Example:
        >>> with ah.Registry("adapters") as registry:
        ...     _ = registry.push("./sql", "team/sql")
        >>> result = ah.audit("adapters")
        >>> result.ok, result.faults, result.entries > 0
        (True, (), True)
    """
    from adapterhub.trust.keys import read_trusted

    previous, signer = _read_checkpoint(Path(checkpoint), read_trusted(keys)) if checkpoint is not None else (None, None)
    label, chains, row = _follow(registry, previous)
    return _audit(label, chains, row, previous, signer)


def sign_checkpoint(
    registry: StrPath, path: StrPath, key: StrPath | Signer, *, passphrase: bytes | None = None, replace: bool = False
) -> Audit:
    """Verify the logs of a registry, and write a signed checkpoint of their ends for a later `audit`.

    Args:
        registry: The folder of the registry, or the address of the database of a hub.
        path: The file to write. Keep it where nobody who can write to the registry can write.
        key: A private key, the path of one in PEM, or the URI of one in hardware.
        passphrase: The passphrase of the key, if it is encrypted, or the PIN of its hardware.
        replace: Replace an earlier checkpoint.

    Raises:
        IntegrityError: An entry is not as it was written; nothing is signed.
        OutputExistsError: The file exists.
    """
    from adapterhub.trust.log_checkpoint import Checkpoint
    from adapterhub.trust.signers import read

    signer = read(key, passphrase)
    label, chains, row = _follow(registry, None)
    if chains.faults:
        fault = chains.faults[0]
        raise IntegrityError(f"{label}: {fault.where}", f"{fault.kind}: {fault.what}", "Restore the log from a backup")
    new_checkpoint = Checkpoint(datetime.now(UTC).isoformat(timespec="seconds"), _nonempty(chains), row)
    with atomic.pending_output(Path(path), folder=False, replace=replace) as file:
        file.write_bytes(new_checkpoint.sign(signer, str(path)))
    # The report counts the logs that were signed, which leaves out names without an entry.
    return _audit(label, dataclasses.replace(chains, ends=new_checkpoint.ends), row, new_checkpoint, signer.public)


def _audit(
    location: str, chains: Chains, row: tuple[int, str] | None, checkpoint: Checkpoint | None, signer: TrustedSigner | None
) -> Audit:
    names, rows = sum(map(len, chains.ends.values())), row[0] if row else 0
    return Audit(location, chains.faults, names, chains.entries, rows, checkpoint, signer.source if signer else "")


def _nonempty(chains: Chains) -> dict[str, dict[str, tuple[int, str]]]:
    """Return the ends of the logs that have an entry: a name that is being created has an empty folder first."""
    return {log: {name: end for name, end in names.items() if end[0]} for log, names in chains.ends.items()}


FollowedLogs = tuple[str, "Chains", tuple[int, str] | None]
"""The label of the logs, their chains with the fault of the hub's audit log, and the number and hash of its newest row."""


def _follow(registry: StrPath, previous: Checkpoint | None) -> FollowedLogs:
    text = os.fspath(registry)
    return _follow_database(text, previous) if text.startswith(_DATABASES) else _follow_folder(Path(text), previous)


def _follow_database(url: str, previous: Checkpoint | None) -> FollowedLogs:
    from adapterhub.hub.accounts import audit_log as rows
    from adapterhub.hub.storage.postgres import PostgresDatabase
    from adapterhub.hub.storage.shared_log import DatabaseLog
    from adapterhub.store.log_chain import verify_chains

    # Opened as it is: an audit must not migrate the tables that it verifies.
    with closing(PostgresDatabase(url, as_it_is=True)) as database:
        chains = verify_chains(DatabaseLog(database), previous.ends if previous else None)
        newest, broken = rows.verify_chain(database, previous.audit if previous else None)
        label = database.location
    faults = [broken] if broken else []
    return label, dataclasses.replace(chains, faults=(*chains.faults, *faults)), newest


def _follow_folder(registry: Path, previous: Checkpoint | None) -> FollowedLogs:
    from adapterhub.hub.accounts import audit_log as rows
    from adapterhub.hub.hub_database import FILE, ReadDatabase
    from adapterhub.store.log_chain import REMOVED, Fault, verify_chains
    from adapterhub.store.store import FOLDER, Store

    store = Store(registry / FOLDER)
    store.check()
    if not store.exists():
        raise NotFoundError(str(registry), "no registry there", code="no-registry", folder=str(registry))
    chains = verify_chains(store.log, previous.ends if previous else None)
    recorded_row = previous.audit if previous else None
    # registry.db is an index of the store, so an audit works without it. Only the hub's audit log is nowhere else.
    if (registry / FILE).is_file():
        with closing(ReadDatabase(registry)) as database:
            newest, broken = rows.verify_chain(database, recorded_row)
        faults = [dataclasses.replace(broken, where=f"{FILE}: {broken.where}")] if broken else []
    else:
        newest, faults = None, [Fault(FILE, REMOVED, "is missing, and the checkpoint has rows of it")] if recorded_row else []
    return str(registry), dataclasses.replace(chains, faults=(*chains.faults, *faults)), newest


def _read_checkpoint(path: Path, keys: Iterable[TrustedSigner]) -> tuple[Checkpoint, TrustedSigner]:
    from adapterhub.trust import log_checkpoint

    raw = json_file.read_text(path, log_checkpoint.MAX_CHECKPOINT).encode()
    return log_checkpoint.read(raw, keys, str(path))
