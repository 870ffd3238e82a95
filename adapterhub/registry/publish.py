"""The one way in: an adapter is checked, compared with the project's policy and pinned to its base before it is stored.

Every command and function that stores an adapter, in the registry or in a remote, asks `package` for it. A `Package` carries
what was read on the way, so that storing it reads each file once more and no header again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.check import ERROR, FIT, Problem, Report, examined
from adapterhub.check import check as checked_report
from adapterhub.manifest import describe
from adapterhub.manifest.package_files import adapter_in, listing
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.check.contents import Contents
    from adapterhub.manifest.describe import Draft
    from adapterhub.project.policy import Policy
    from adapterhub_converters.bases import BaseSpec

CODE, CODE_ON_BASE = "check-failed", "check-failed-on-base"


@dataclass(frozen=True)
class Package:
    """An adapter that may be stored.

    Attributes:
        folder: It holds the adapter and nothing else.
        where: The name of the adapter in errors.
        draft: Its adapter.json but for the digests, with the base pinned.
        overridden: The errors of its check, which `force` accepted.
    """

    folder: Path
    where: str
    draft: Draft
    overridden: tuple[Problem, ...] = ()


def package(
    folder: Path,
    *,
    where: str = "",
    base: BaseSpec | None = None,
    policy: Policy | None = None,
    force: bool = False,
    checked: bool = False,
) -> Package:
    """Check the adapter in `folder` and compare it with the policy; nothing is stored.

    Args:
        folder: The adapter's own folder.
        where: Its name in errors; the folder's path if empty.
        base: The model it was trained on, to pin: the adapter must fit it.
        policy: The project's, None where it has none.
        force: Accept an adapter whose check finds errors. A policy cannot be overridden.
        checked: It was checked in another format, from which it was converted.

    Raises:
        RefusedError: The check finds errors (code `check-failed`), or the policy does not allow it (`against-policy`).
    """
    where = where or str(folder)
    overridden: tuple[Problem, ...] = ()
    seen, read = None, ()
    if not checked:
        with examined(adapter_in(folder), base=base, where=where) as (report, contents):
            overridden = errors_of(report, base, force=force)
            seen = contents.seen() if contents else None
            read = _read(contents, folder) if contents else ()
    draft = describe.draft(folder, listing=listing(folder, read=read), seen=seen, base=base)
    if policy is not None and policy.reads_manifests:
        policy.check_manifest(draft.facts(), where)
    return Package(folder, where, draft, overridden)


def check_adapter(path: Path, *, where: str, base: BaseSpec | None = None, force: bool = False) -> tuple[Problem, ...]:
    """Check an adapter and refuse it for errors; with `force` the errors are returned."""
    return errors_of(checked_report(path, base=base, where=where), base, force=force)


def check_manifest(policy: Policy | None, manifest: Mapping[str, Any], where: str) -> None:
    """Compare the manifest (adapter.json) of an adapter with the policy, if there is one."""
    if policy is not None:
        policy.check_manifest(manifest, where)


def errors_of(report: Report, base: BaseSpec | None, *, force: bool) -> tuple[Problem, ...]:
    """The errors of a report; RefusedError for them unless `force`."""
    errors = tuple(problem for problem in report.problems if problem.severity == ERROR)
    if not errors or force:
        return errors
    first = errors[0]
    misfit = f"does not fit {base.where}: " if base and any(problem.code in FIT for problem in errors) else ""
    more = f" (and {len(errors) - 1} more error{'s' if len(errors) > 2 else ''})" if errors[1:] else ""
    place = f"{first.where}: " if first.where else ""
    raise RefusedError(
        report.where,
        f"{misfit}{first.code}: {place}{first.what}{more}",
        "Check it for the rest, or store it with force",
        code=CODE_ON_BASE if base else CODE,
        adapter=report.where,
        base=base.where if base else "",
    )


def _read(contents: Contents, folder: Path) -> tuple[str, ...]:
    """The files of `folder` that the check has read as what they are."""
    paths = list(contents.files) if contents.files else [contents.path] if contents.path.is_file() else []
    return ("adapter_config.json", *(path.relative_to(folder).as_posix() for path in paths if path.is_relative_to(folder)))
