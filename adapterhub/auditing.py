"""Audits of the logs of a registry and its hub: whether they are as they were written, and signed checkpoints of their ends.

What is verified is the store, or a copy of it, without a network and without registry.db; or, of a hub in PostgreSQL, its
database. Nothing of either is changed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import IntegrityError, NotFoundError

from .workspace import StrPath

if TYPE_CHECKING:
    from .identity import Identity
    from .store.chain import Chains, Fault
    from .trust.checkpoint import Checkpoint
    from .trust.keys import Signer, TrustedSigner


_DATABASES = ("postgresql://", "postgres://")


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        where: The folder of the registry, or the database.
        faults: The first entry of each log that is not as it was written; none if all are.
        names: The number of logs, of names and of the hub's own documents.
        entries: The number of entries that follow each from the one before it.
        rows: The number of rows of the hub's audit log; 0 without a hub.
        checkpoint: The checkpoint that they were compared with; None without one, when nothing shows what is missing at an end.
        signer: The file of the key, or the identity, that signed it; empty without one.
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
        """True if there is no fault."""
        return not self.faults


def audit(
    registry: StrPath, *, checkpoint: StrPath | None = None, keys: StrPath | Identity | Sequence[StrPath | Identity] = ()
) -> Audit:
    """Verify the logs of a registry, and of the hub that serves it: each entry has the digest of the one before it.

    Args:
        registry: The folder of the registry, or the address of the database of a hub, `postgresql://user@host/name`.
        checkpoint: A file that `sign_checkpoint` wrote, whose entries must still be there.
        keys: Public keys in PEM, folders of them, and identities, one of which must have signed it.

    Raises:
        NotFoundError: There is no registry, or no checkpoint.
        IntegrityError: The checkpoint is not signed by one of the keys, or was changed.

    Example:
        >>> with ah.Registry("adapters") as registry:
        ...     _ = registry.push("./sql", "team/sql")
        >>> found = ah.audit("adapters")
        >>> found.ok, found.faults, found.entries > 0
        (True, (), True)
    """
    from .trust.keys import trusted

    known, signer = _read(Path(checkpoint), trusted(keys)) if checkpoint is not None else (None, None)
    where, chains, row = _follow(registry, known)
    return _audit(where, chains, row, known, signer)


def sign_checkpoint(
    registry: StrPath, path: StrPath, key: StrPath | Signer, *, passphrase: bytes | None = None, replace: bool = False
) -> Audit:
    """Verify the logs of a registry, and write a signed checkpoint of their ends for a later `audit`.

    Args:
        registry: The folder of the registry, or the address of the database of a hub.
        path: The file. Keep it where nobody who can write to the registry can write.
        key: A private key, the path of one in PEM, or the URI of one in hardware.
        passphrase: That of the key, if it is encrypted; the PIN of its hardware.
        replace: Replace an earlier checkpoint.

    Raises:
        IntegrityError: An entry is not as it was written; nothing is signed.
        OutputExistsError: The file exists.
    """
    from .trust.checkpoint import Checkpoint
    from .trust.signers import read

    signer = read(key, passphrase)
    where, chains, row = _follow(registry, None)
    if chains.faults:
        first = chains.faults[0]
        raise IntegrityError(f"{where}: {first.where}", f"{first.kind}: {first.what}", "Restore the log from a backup")
    made = Checkpoint(datetime.now(UTC).isoformat(timespec="seconds"), _nonempty(chains), row)
    with atomic.whole(Path(path), folder=False, replace=replace) as file:
        file.write_bytes(made.sign(signer, str(path)))
    return _audit(where, dataclasses.replace(chains, ends=made.ends), row, made, signer.public)


def _audit(
    where: str, chains: Chains, row: tuple[int, str] | None, checkpoint: Checkpoint | None, signer: TrustedSigner | None
) -> Audit:
    names, rows = sum(map(len, chains.ends.values())), row[0] if row else 0
    return Audit(where, chains.faults, names, chains.entries, rows, checkpoint, signer.where if signer else "")


def _nonempty(chains: Chains) -> dict[str, dict[str, tuple[int, str]]]:
    """The ends of the logs that have an entry: a name that is being created has an empty folder first."""
    return {log: {name: end for name, end in names.items() if end[0]} for log, names in chains.ends.items()}


Followed = tuple[str, "Chains", tuple[int, str] | None]
"""Where the logs are, their chains with the fault of the hub's audit log, and the number and the hash of its newest row."""


def _follow(registry: StrPath, known: Checkpoint | None) -> Followed:
    text = os.fspath(registry)
    return _in_database(text, known) if text.startswith(_DATABASES) else _in_folder(Path(text), known)


def _in_database(url: str, known: Checkpoint | None) -> Followed:
    from .hub.people import audit as rows
    from .hub.storage.log import DatabaseLog
    from .hub.storage.postgres import PostgresDatabase
    from .store.chain import follow

    with closing(PostgresDatabase(url, as_it_is=True)) as database:
        chains = follow(DatabaseLog(database), known.ends if known else None)
        newest, broken = rows.follow(database, known.audit if known else None)
        where = database.where
    faults = [broken] if broken else []
    return where, dataclasses.replace(chains, faults=(*chains.faults, *faults)), newest


def _in_folder(registry: Path, known: Checkpoint | None) -> Followed:
    from .hub.database import FILE, ReadDatabase
    from .hub.people import audit as rows
    from .store.chain import REMOVED, Fault, follow
    from .store.store import FOLDER, Store

    store = Store(registry / FOLDER)
    store.check()
    if not store.exists():
        raise NotFoundError(str(registry), "no registry there", code="no-registry")
    chains = follow(store.log, known.ends if known else None)
    noted = known.audit if known else None
    if (registry / FILE).is_file():
        with closing(ReadDatabase(registry)) as database:
            newest, broken = rows.follow(database, noted)
        faults = [dataclasses.replace(broken, where=f"{FILE}: {broken.where}")] if broken else []
    else:
        newest, faults = None, [Fault(FILE, REMOVED, "is missing, and the checkpoint has rows of it")] if noted else []
    return str(registry), dataclasses.replace(chains, faults=(*chains.faults, *faults)), newest


def _read(path: Path, keys: Iterable[TrustedSigner]) -> tuple[Checkpoint, TrustedSigner]:
    from .trust import checkpoint

    raw = json_file.read_text(path, checkpoint.MAX_CHECKPOINT).encode()
    return checkpoint.read(raw, keys, str(path))
