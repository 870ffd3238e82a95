"""The one way in: an adapter is checked, compared with the project's policy and pinned to its base before it is stored.

Every command and function that stores an adapter, in the registry or in a remote, asks `package` for it. A `Package` carries
what was read on the way, so that storing it reads each file once more and no header again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.checks import ERROR, FIT, Problem, Report, examined
from adapterhub.manifest import describe
from adapterhub.manifest.package_files import Selection, first_bytes, listing
from adapterhub_converters.adapter_files import adapter_in
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.checks.contents import Contents
    from adapterhub.manifest.describe import Draft
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.project.policy import Policy
    from adapterhub_converters.bases import BaseSpec

CODE, CODE_ON_BASE, CODE_FOR_GOOD = "check-failed", "check-failed-on-base", "check-failed-for-good"


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
    hash_below: int = 0,
    selection: Selection | None = None,
) -> Package:
    """Check the adapter in `folder` and compare it with the policy; nothing is stored.

    Args:
        folder: The adapter's own folder.
        where: Its name in errors; the folder's path if empty.
        base: The model it was trained on, to pin: the adapter must fit it.
        policy: The project's, None where it has none.
        force: Accept an adapter whose check finds errors. A policy cannot be overridden.
        checked: It was checked in another format, from which it was converted.
        hash_below: Hash files of fewer bytes while they are open anyway, for digests needed before sending.
        selection: Patterns of files to package and to leave out.

    Raises:
        RefusedError: The check finds errors (code `check-failed`), or the policy does not allow it (`against-policy`).
    """
    where = where or str(folder)
    if checked:
        return _allowed(Package(folder, where, describe.draft(folder, base=base)), policy)
    with examined(adapter_in(folder), base=base, where=where) as (report, contents):
        overridden = errors_of(report, base, force=force, readable=contents is not None)
        if contents is None:
            return _allowed(Package(folder, where, describe.draft(folder, base=base), overridden), policy)
        contents.manifest()
        contents.card()
        found = listing(folder, head=partial(_head, contents, hash_below), selection=selection)
        # Records of other weights are not those of these.
        seen, text = contents.seen(), "" if any(one.code == "files-changed" for one in overridden) else contents.manifest_text
        draft = describe.draft(
            folder, listing=found, seen=seen, text=text, base=base, digests=contents.digests, card=contents.card()
        )
    return _allowed(Package(folder, where, draft, overridden), policy)


def _head(contents: Contents, hash_below: int, path: Path) -> bytes:
    """The first bytes of a file, which is hashed while it is open if it is small enough."""
    if path.stat().st_size < hash_below:
        contents.digest(path)
    return contents.heads[path] if path in contents.heads else first_bytes(path)


def _allowed(package: Package, policy: Policy | None) -> Package:
    if policy is not None and policy.needs_manifest:
        policy.check_manifest(package.draft.manifest(), package.where)
    return package


def check_adapter(path: Path, *, where: str, base: BaseSpec | None = None, force: bool = False) -> tuple[Problem, ...]:
    """Check an adapter and refuse it for errors; with `force` the errors are returned."""
    with examined(path, base=base, where=where) as (report, contents):
        return errors_of(report, base, force=force, readable=contents is not None)


def check_received(
    folder: Path, *, where: str, policy: Policy | None = None, force: bool = False, check: bool = True
) -> tuple[Problem, ...]:
    """Check a version that somebody else packaged as `package` does: its adapter, its adapter.json, and the policy.

    Args:
        folder: The files of the version.
        where: Its name in errors.
        policy: The project's, None where it has none.
        force: Accept an adapter whose check finds errors. Facts that are not those of the weights cannot be overridden.
        check: Check the adapter; without, only its adapter.json is compared with the headers of the weights.

    Returns:
        The errors that `force` accepted.

    Raises:
        RefusedError: The check finds errors, or the policy does not allow the adapter.
        IntegrityError: Its adapter.json is not about these weights (code `wrong-facts`).
    """
    errors: tuple[Problem, ...] = ()
    seen = None
    if check:
        with examined(adapter_in(folder), where=where) as (report, contents):
            errors = errors_of(report, None, force=force)
            seen = contents.seen() if contents is not None else None
    check_manifest(policy, describe.true_manifest(folder, seen=seen, where=where), where)
    return errors


def check_manifest(policy: Policy | None, manifest: AdapterManifest | None, where: str) -> None:
    """Compare the manifest of an adapter with the policy, if there is one that needs it."""
    if policy is not None and policy.needs_manifest:
        if manifest is None:
            raise RefusedError(where, "no adapter.json to compare with the project's policy", code="no-manifest")
        policy.check_manifest(manifest, where)


def errors_of(report: Report, base: BaseSpec | None, *, force: bool, readable: bool = True) -> tuple[Problem, ...]:
    """The errors of a report; RefusedError for them unless `force`, which helps only if the adapter is `readable`."""
    errors = tuple(problem for problem in report.problems if problem.severity == ERROR)
    if not errors or force:
        return errors
    first = errors[0]
    misfit = f"does not fit {base.where}: " if base and any(problem.code in FIT for problem in errors) else ""
    more = f" (and {len(errors) - 1} more error{'s' if len(errors) > 2 else ''})" if errors[1:] else ""
    place = f"{first.where}: " if first.where else ""
    what = f"{misfit}{first.code}: {place}{first.what}{more}"
    if report.format is None:  # nothing can be stored of what cannot be read
        error = RefusedError(report.where, what, first.hint)
        if first.cause:
            error.code, error.fields = first.cause.code, first.cause.fields
        raise error
    forcible = readable and not any(problem.code == "not-packaged" for problem in errors)
    raise RefusedError(
        report.where,
        what,
        "Check it for the rest, or store it with force" if forcible else "Check it for the rest",
        code=(CODE_ON_BASE if base else CODE) if forcible else CODE_FOR_GOOD,
        adapter=report.where,
        base=base.where if base else "",
    )
