"""Audits of the logs of a registry and its hub: whether they are as they were written, and signed checkpoints of their ends.

Nothing is asked over a network, and no registry.db is needed: what is verified is the store, or a copy of it.
"""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        where: The folder of the registry.
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
        registry: The folder of the registry.
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
    chains, row = _follow(Path(registry), known)
    return _audit(registry, chains, row, known, signer)


def sign_checkpoint(
    registry: StrPath, path: StrPath, key: StrPath | Signer, *, passphrase: bytes | None = None, replace: bool = False
) -> Audit:
    """Verify the logs of a registry, and write a signed checkpoint of their ends for a later `audit`.

    Args:
        registry: The folder of the registry.
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
    chains, row = _follow(Path(registry), None)
    if chains.faults:
        first = chains.faults[0]
        raise IntegrityError(f"{registry}: {first.where}", f"{first.kind}: {first.what}", "Restore the log from a backup")
    made = Checkpoint(datetime.now(UTC).isoformat(timespec="seconds"), _nonempty(chains), row)
    with atomic.whole(Path(path), folder=False, replace=replace) as file:
        file.write_bytes(made.sign(signer, str(path)))
    return _audit(registry, dataclasses.replace(chains, ends=made.ends), row, made, signer.public)


def _audit(
    registry: StrPath, chains: Chains, row: tuple[int, str] | None, checkpoint: Checkpoint | None, signer: TrustedSigner | None
) -> Audit:
    names, rows = sum(map(len, chains.ends.values())), row[0] if row else 0
    return Audit(str(registry), chains.faults, names, chains.entries, rows, checkpoint, signer.where if signer else "")


def _nonempty(chains: Chains) -> dict[str, dict[str, tuple[int, str]]]:
    """The ends of the logs that have an entry: a name that is being created has an empty folder first."""
    return {log: {name: end for name, end in names.items() if end[0]} for log, names in chains.ends.items()}


def _follow(registry: Path, known: Checkpoint | None) -> tuple[Chains, tuple[int, str] | None]:
    """The chains of the logs, the fault of the hub's audit log among theirs, and the number and hash of its newest row."""
    from .hub.database import FILE, HubDatabase
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
        with closing(HubDatabase(registry)) as database:
            newest, broken = rows.follow(database, noted)
        faults = [Fault(f"{FILE}: audit row {broken[0]}", broken[1], broken[2])] if broken else []
    else:
        newest, faults = None, [Fault(FILE, REMOVED, "is missing, and the checkpoint has rows of it")] if noted else []
    return dataclasses.replace(chains, faults=(*chains.faults, *faults)), newest


def _read(path: Path, keys: Iterable[TrustedSigner]) -> tuple[Checkpoint, TrustedSigner]:
    from .trust import checkpoint

    raw = json_file.read_text(path, checkpoint.MAX_CHECKPOINT).encode()
    return checkpoint.read(raw, keys, str(path))
