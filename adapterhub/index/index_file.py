"""Updates of the store's index.json to the state of registry.db."""

from __future__ import annotations

from adapterhub.store.store import Store

from .index_database import Index
from .queries import ref_lines

_MAX_CHANGED_NAMES = 8  # names; for more, the file is built again


def is_current(index: Index, store: Store) -> bool:
    """Return True if index.json is the file that was last written through this index.

    If not, refs may have moved without this index, as after it was restored from a backup.
    """
    return index.select("SELECT stamp FROM index_file") == [(store.index_file.stamp(),)]


def state(index: Index) -> str:
    """Return a text that changes with every move: whatever was read of the index under another one is out of date."""
    stamps = index.select("SELECT stamp FROM index_file", kinds="s")
    return str(stamps[0][0]) if stamps else ""


def write(index: Index, store: Store) -> None:
    """Bring index.json up to date; call this in the transaction of the move.

    If the file is the one that was written last, only the lines of names that have moved since are replaced.
    """
    # In reverse order: a new name goes before the next name, which must be in the file already.
    moved = [name for (name,) in index.select("SELECT name FROM unwritten ORDER BY name DESC LIMIT ?", _MAX_CHANGED_NAMES + 1)]
    stamp = ""
    # A file that another program has written is built again.
    if len(moved) <= _MAX_CHANGED_NAMES and is_current(index, store):
        stamp = store.index_file.change([(name, ref_lines(index, name), _next_name(index, name)) for name in moved])
    _set_stamp(index, stamp or store.index_file.write(ref_lines(index)))


def _next_name(index: Index, name: str) -> str | None:
    names = index.select("SELECT name FROM versions WHERE name > ? ORDER BY name LIMIT 1", name)
    return names[0][0] if names else None


def adopt(index: Index, store: Store) -> None:
    """Accept index.json if it is byte for byte what the logs imply, else write it; call this in a transaction."""
    lines = ref_lines(index)
    stamp = store.index_file.stamp()
    _set_stamp(index, stamp if stamp and store.index_file.is_written(lines) else store.index_file.write(lines))


def _set_stamp(index: Index, stamp: str) -> None:
    index.execute("DELETE FROM unwritten")
    index.execute("DELETE FROM index_file")
    index.execute("INSERT INTO index_file (stamp) VALUES (?)", stamp)
