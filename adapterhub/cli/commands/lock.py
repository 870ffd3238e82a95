"""`adapterhub lock`, and what pull does with a lock file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import environment, output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub_converters.errors import IntegrityError, NotFoundError, UsageError

from . import rules

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.project.lockfile import Lock, Locked
    from adapterhub.registry.registry import Version

_FOLDER = "adapters"


@command(
    "lock",
    short="Fix which versions a project uses.",
    example="""
    adapterhub lock team/sql:prod --remote
    adapterhub pull --locked
    adapterhub lock --check
    adapterhub lock --update team/sql""",
)
@click.argument("refs", metavar="[REF…]", nargs=-1, shell_complete=environment.complete_ref)
@environment.remote_option
@click.option("--check", is_flag=True, help="Say whether tags have moved since (exit 1).")
@click.option("--update", is_flag=True, help="Lock what REFs, names in the lock file, are now; without any, all.")
@click.pass_obj
def lock(settings: Settings, *, refs: tuple[str, ...], remote: str | None, check: bool, update: bool) -> int:
    """Write into adapters.lock which version each REF is now: digest, base, size, and where it was found.

    `pull --locked` then writes just these, byte for byte, wherever the tags point by then. The file lies beside the project's
    adapterhub.toml, or else here; without REFs it is shown. REF may be an address, or be on a remote.
    """
    if check and update:
        raise UsageError("--check", "changes nothing, --update does", "Leave one out")
    if (check or update) and remote is not None:
        raise UsageError("--remote", "is in the lock file already", "Leave it out")
    if check:
        return _check(settings, refs)
    if update:
        _update(settings, refs)
    elif refs:
        found = [_resolved(settings, ref, remote) for ref in refs]
        _record(settings, {one.name: one for one in found})
    else:
        _show(settings)
    return 0


def keep_version(settings: Settings, ref: str, version: Version) -> None:
    """`keep`, of a version of the registry here."""
    from adapterhub.ref import Ref

    keep(ref, None, _here(settings, str(Ref(version.name, digest=version.digest))))


def keep(ref: str, address: str | None, made: Manifest) -> None:
    """What `pull REF --lock` records: a version of the registry here, or of an address that `ref` was."""
    from adapterhub.project import lockfile

    path = environment.lock_file()
    new = lockfile.record(path, {(locked := _entry(ref, address, made)).name: locked})
    output.say(output.one_line(f"{'locked' if new else 'already locked'}: {locked.ref} in {_shown(path)}"))


def pull_locked(settings: Settings, ref: str | None, out: str | None, *, locked: bool, alone: bool) -> None:
    """What `pull --locked` does: all, below a folder, or one into one. `alone`: no other option says what and from where."""
    from adapterhub.project import lockfile

    if not locked:
        raise UsageError("pull", "Missing argument 'REF'", "`adapterhub pull --help` says how")
    if not alone:
        raise UsageError("--locked", "has what and from where in the lock file", "Leave --remote, --lock, --as and --base out")
    path = environment.lock_file()
    there = lockfile.read(path)
    if ref is None:
        below = Path(out or _FOLDER)
        wanted = [(one, below / one.name) for one in sorted(there.values(), key=lambda one: one.name)]
    else:
        one = lockfile.find(there, ref, path)
        wanted = [(one, Path(out) if out else Path(one.name.rpartition("/")[2]))]
    if not wanted:
        raise UsageError(str(path), "has no adapters", "`adapterhub lock REF…` puts some there")
    documents = []
    for one, target in wanted:
        new = _pull(settings, one, target)
        documents.append({"name": one.name, **one.document(), "output": str(target), "new": new})
        if not settings.as_json:
            text = f"{target}: {one.name}@{output.digest(one.digest)}, {output.size(one.size)}, verified"
            output.write(f"{'' if new else 'already there: '}{text}")
    if settings.as_json:
        output.write_json({"adapters": documents})


def _pull(settings: Settings, locked: Locked, target: Path) -> bool:
    """Have a folder be the locked version; whether it wasn't."""
    from adapterhub.project import lockfile

    rules.allowed(locked.name)
    if lockfile.is_version(target, locked.digest):
        return False
    if locked.source == lockfile.HERE:
        from adapterhub.ref import Ref

        ref = Ref(locked.name, digest=locked.digest)
        rules.ref_fits(settings, str(ref))
        with environment.open_registry(settings) as registry:
            registry.pull(ref, target)
        return True
    from adapterhub.remotes import location

    from . import remotes

    with remotes.opened(locked.source) as there:
        rules.fits(there, locked.digest, locked.ref)
        made, new = remotes.downloaded(there, locked.digest, target, location.parse(locked.source).host)
    if made.digest != locked.digest:
        raise IntegrityError(locked.source, f"{made.digest} came, not {locked.digest}", "Ask its owner")
    return new


# ---- resolving


def _resolved(settings: Settings, ref: str, remote: str | None) -> Locked:
    """The entry that a ref is now."""
    from adapterhub.remotes.location import is_address

    address = environment.at_remote(ref, remote)
    if is_address(address):
        return _entry(ref, address, _manifest(address))
    with environment.hinting(ref):
        return _entry(ref, None, _here(settings, ref))


def _again(settings: Settings, locked: Locked) -> Locked:
    """The same entry as it would be now."""
    from adapterhub.project import lockfile

    made = _here(settings, locked.ref) if locked.source == lockfile.HERE else _manifest(locked.source)
    return lockfile.entry(locked.name, locked.ref, locked.source, made)


def _entry(ref: str, address: str | None, made: Manifest) -> Locked:
    from adapterhub.project import lockfile
    from adapterhub.remotes import location

    name = ref.partition("@")[0].partition(":")[0]
    if "://" in ref:
        place = location.parse(ref)
        named = (place.tag or "").partition(":")[0]  # in an image layout, a whole ref is the tag
        name = named if "/" in named else lockfile.name_of(place.repository)
    return lockfile.entry(name, ref, address or lockfile.HERE, made)


def _manifest(address: str) -> Manifest:
    from adapterhub.remotes import location

    from . import remotes

    with remotes.opened(address) as there:
        return there.manifest(location.parse(address).reference)


def _here(settings: Settings, text: str) -> Manifest:
    from adapterhub.ref import Ref
    from adapterhub.remotes.local import Local

    ref = Ref.parse(text)
    with environment.open_registry(settings) as registry:
        version = registry.resolve(ref)
        output.deprecated(str(version.ref), version.deprecated)
        return Local(registry, ref.name).manifest(version.digest)


# ---- the command


def _record(settings: Settings, found: Lock) -> None:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    new = lockfile.record(path, found)
    document = {"file": str(path), "new": new, "adapters": [{"name": name, **one.document()} for name, one in found.items()]}

    def text() -> None:
        for name, one in found.items():
            output.write(output.printable(f"{name}  {output.size(one.size)}  {output.digest(one.digest)}  {one.source}"))
        output.say(f"{'locked in' if new else 'already so in'} {_shown(path)}")

    output.emit(document, as_json=settings.as_json, text=text)


def _update(settings: Settings, names: tuple[str, ...]) -> None:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    chosen = lockfile.chosen(lockfile.read(path), names, path)
    _record(settings, {name: _again(settings, locked) for name, locked in chosen.items()})


def _check(settings: Settings, names: tuple[str, ...]) -> int:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    chosen = lockfile.chosen(lockfile.read(path), names, path)
    rows = []
    for name, locked in sorted(chosen.items()):
        try:
            now = _again(settings, locked).digest
        except NotFoundError:
            now = None
        rows.append({"name": name, "ref": locked.ref, "locked": locked.digest, "now": now, "moved": now != locked.digest})
    moved = [row for row in rows if row["moved"]]
    document = {"file": str(path), "ok": not moved, "adapters": rows}
    output.emit(document, as_json=settings.as_json, text=lambda: _check_text(rows, len(moved)))
    return 1 if moved else 0


def _check_text(rows: list[dict[str, Any]], moved: int) -> None:
    for row in rows:
        if row["moved"]:
            now = f"is {output.digest(row['now'])} now" if row["now"] else "is gone"
            output.write(output.one_line(f"{row['name']}: {row['ref']} {now}, locked is {output.digest(row['locked'])}"))
    count = output.plural(len(rows), "adapter")
    output.write(
        f"{moved} of {count} moved; `adapterhub lock --update` locks what they are now" if moved else f"ok: {count}, none moved"
    )


_LIST = (
    Column("NAME"),
    Column("REF", drop=3),
    Column("SIZE", right=True, drop=4),
    Column("DIGEST"),
    Column("BASE", drop=2),
    Column("SOURCE", drop=5),
)


def _show(settings: Settings) -> None:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    there = sorted(lockfile.read(path).values(), key=lambda one: one.name)
    document = {"file": str(path), "adapters": [{"name": one.name, **one.document()} for one in there]}
    cells = [[one.name, one.ref, output.size(one.size), output.digest(one.digest), _base(one), one.source] for one in there]

    def text() -> None:
        for line in output.table(_LIST, cells, screen=output.width()):
            output.write(line)

    output.emit(document, as_json=settings.as_json, text=text)


def _base(locked: Locked) -> str:
    return locked.base.get("repo", "").rpartition("/")[2] or output.digest(locked.base.get("fingerprint", "-"))


def _shown(path: Path) -> str:
    return path.name if path.parent == Path.cwd() else str(path)
