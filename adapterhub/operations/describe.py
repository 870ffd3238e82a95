"""The adapter.json of a folder, written or renewed in place: base pinned, facts declared, digests updated.

The content comes from `adapterhub.manifest.derive`; this module compares it with adapter.toml and the base, and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, source_names
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.checks import Problem
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.fact_changes import FactChange
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True, repr=False)
class DescribeResult:
    """The adapter.json of a folder.

    Attributes:
        path: The file.
        manifest: Its content.
        changes: Differences from the earlier content; empty if it was up to date.
        new: Whether there was no adapter.json.
        written: Whether it was written; False for a dry run, and if nothing changed.
    """

    path: Path
    manifest: AdapterManifest
    changes: tuple[FactChange, ...]
    new: bool
    written: bool

    def __repr__(self) -> str:
        return f"<DescribeResult {self.path}: {len(self.changes)} changes>"


def describe(
    folder: StrPath,
    *,
    base: base_sources.Base | None = None,
    dry_run: bool = False,
    workspace: Workspace | None = None,
    **declared: Any,
) -> DescribeResult:
    """Write or renew the adapter.json in a folder, in place; its record of a training is kept.

    Args:
        folder: The adapter's own folder.
        base: The model it was trained on, to pin by its headers; refused where the adapter does not fit it.
        dry_run: Write nothing; `changes` has what would be different.
        workspace: Where names are looked up.
        declared: What its owner declares: `name`, `description`, `license`, `task`, and `training` as a mapping.

    Example:
        >>> [change.key for change in ah.describe("./sql", license="MIT", dry_run=True).changes if change.key == "license"]
        ['license']
    """
    spec = base_sources.base_spec(base, workspace or Workspace())
    return describe_folder(folder, declared, base=spec, dry_run=dry_run)


def describe_folder(
    folder: StrPath, declared: Mapping[str, Any], *, base: BaseSpec | None = None, dry_run: bool = False
) -> DescribeResult:
    """Write or renew the adapter.json in `folder`; its records of a training, parents and a recipe are kept.

    Args:
        folder: The adapter's own folder.
        declared: Facts that its owner declares, as in adapter.toml.
        base: The model it was trained on, to pin by its headers.
        dry_run: Write nothing.

    Raises:
        UsageError: A key cannot be declared, or adapter.toml declares it already.
        RefusedError: The adapter does not fit the base, or adapter.json pins another one.
        IntegrityError: adapter.json describes other weights.
    """
    from adapterhub.manifest import declarations, folder_contents
    from adapterhub.manifest import derive as describing
    from adapterhub.manifest import fact_changes as documents
    from adapterhub_converters.adapter_files import ADAPTER_JSON, ADAPTER_TOML
    from adapterhub_converters.containers import atomic

    path = Path(folder)
    if not path.is_dir():
        source_names.existing_path(str(path))
        raise UsageError(str(path), "is a file, and adapter.json describes a folder", "Put it in a folder of its own")
    contents = folder_contents.read_folder(path)
    draft = describing.draft_contents(contents, base=base)
    _check_toml(draft.declared, declared, f"{path}/{ADAPTER_TOML}")
    if base is not None:
        _check_base(path, draft.recorded, base)
    manifest, raw = draft.finalize(contents.files)
    if declared:
        manifest = declarations.declare(manifest, declared, path).renewed()
        raw = manifest.dump()
    earlier = draft.recorded.to_dict() if draft.recorded else {}
    changes = tuple(documents.changes(earlier, manifest.to_dict()))
    must_write = bool(changes) and not dry_run
    if must_write:
        with atomic.pending_output(path / ADAPTER_JSON, folder=False, replace=True) as file:
            file.write_bytes(raw)
    return DescribeResult(path / ADAPTER_JSON, manifest, changes, draft.recorded is None, must_write)


def _check_toml(toml: Mapping[str, Any], declared: Mapping[str, Any], location: str) -> None:
    """Refuse to declare what adapter.toml declares otherwise, because adapter.toml takes precedence in a push."""
    for key, value in declared.items():
        if isinstance(value, Mapping) and isinstance(toml.get(key), Mapping):
            _check_toml(toml[key], value, location)
        elif key in toml and toml[key] != value:
            raise UsageError(location, f"declares {key}, and takes precedence", "Change it there")


def _check_base(folder: Path, manifest: AdapterManifest | None, base: BaseSpec) -> None:
    from adapterhub.checks import ERROR, FIT, check
    from adapterhub_converters.adapter_files import resolve_adapter

    pinned = manifest.base.fingerprint if manifest else None
    if pinned and not base.has_fingerprint(pinned):
        mismatch = f"adapter.json pins the base {pinned[:19]}, and {base.source} is another model"
        raise RefusedError(str(folder), mismatch, "Name the one that it was trained on")
    # Headers suffice: they have the names and shapes, which decide whether the adapter fits.
    report = check(resolve_adapter(folder), base=base, headers_only=True)
    misfits: list[Problem] = [problem for problem in report.problems if problem.severity == ERROR and problem.code in FIT]
    if misfits:
        misfit = f"does not fit {base.source}: {misfits[0].code}: {misfits[0].what}"
        raise RefusedError(
            str(folder), misfit, "Check it on that base", code="other-base-shapes", adapter=str(folder), base=base.source
        )
