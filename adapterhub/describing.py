"""adapter.json of a folder, written or renewed in place: a base pinned, facts declared, digests brought up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import RefusedError, UsageError

from . import sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.checks import Problem
    from adapterhub.manifest.changes import Change
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True, repr=False)
class Described:
    """The adapter.json of a folder.

    Attributes:
        path: The file.
        manifest: Its content.
        changes: What is different from before; none if it was up to date.
        new: There was no adapter.json.
        written: False for a dry run, and where nothing had changed.
    """

    path: Path
    manifest: AdapterManifest
    changes: tuple[Change, ...]
    new: bool
    written: bool

    def __repr__(self) -> str:
        return f"<Described {self.path}: {len(self.changes)} changes>"


def describe(
    folder: StrPath,
    declared: Mapping[str, Any],
    workspace: Workspace,
    *,
    base: BaseSpec | None = None,
    dry_run: bool = False,
) -> Described:
    """Write or renew the adapter.json in `folder`; its records of a training, of parents and of a recipe are kept.

    Args:
        folder: The adapter's own folder.
        declared: What its owner declares, as in adapter.toml.
        workspace: The policy.
        base: The model it was trained on, to pin by its headers.
        dry_run: Write nothing.

    Raises:
        UsageError: A key cannot be declared, or adapter.toml declares it already.
        RefusedError: The adapter does not fit the base, or adapter.json pins another one.
        IntegrityError: adapter.json is that of other weights.
    """
    from adapterhub.manifest import changes as documents
    from adapterhub.manifest import describe as describing
    from adapterhub_converters.adapter_files import ADAPTER_JSON, ADAPTER_TOML
    from adapterhub_converters.containers import atomic

    path = Path(folder)
    if not path.is_dir():
        sources.existing(str(path))
        raise UsageError(str(path), "is a file, and adapter.json describes a folder", "Put it in a folder of its own")
    draft = describing.draft(path, base=base)
    _check_toml(draft.declared, declared, f"{path}/{ADAPTER_TOML}")
    if base is not None:
        _check_base(path, draft.known, base)
    made, raw = draft.settle(describing.digests(path))
    if declared:
        made = describing.declare(made, declared, path)
        raw = made.dump()
    before = draft.known.to_dict() if draft.known else {}
    changes = tuple(documents.changes(before, made.to_dict()))
    write = bool(changes) and not dry_run
    if write:
        with atomic.whole(path / ADAPTER_JSON, folder=False, replace=True) as file:
            file.write_bytes(raw)
    return Described(path / ADAPTER_JSON, made, changes, draft.known is None, write)


def _check_toml(there: Mapping[str, Any], declared: Mapping[str, Any], where: str) -> None:
    """Refuse to declare what adapter.toml declares otherwise, as that takes precedence in a push."""
    for key, value in declared.items():
        if isinstance(value, Mapping) and isinstance(there.get(key), Mapping):
            _check_toml(there[key], value, where)
        elif key in there and there[key] != value:
            raise UsageError(where, f"declares {key}, and takes precedence", "Change it there")


def _check_base(folder: Path, known: AdapterManifest | None, base: BaseSpec) -> None:
    from adapterhub.checks import ERROR, FIT, check
    from adapterhub_converters.adapter_files import adapter_in

    pinned = known.base.fingerprint if known else None
    if pinned and pinned != base.fingerprint:
        what = f"adapter.json pins the base {pinned[:19]}, and {base.where} is another model"
        raise RefusedError(str(folder), what, "Name the one that it was trained on")
    report = check(adapter_in(folder), base=base, headers_only=True)
    wrong: list[Problem] = [one for one in report.problems if one.severity == ERROR and one.code in FIT]
    if wrong:
        what = f"does not fit {base.where}: {wrong[0].code}: {wrong[0].what}"
        raise RefusedError(
            str(folder), what, "Check it on that base", code="other-base-shapes", adapter=str(folder), base=base.where
        )
