"""The one way in: an adapter is checked, compared with the project's policy and pinned to its base before it is stored.

Every command and function that stores an adapter, in the registry or in a remote, asks `package` for it. A `Package` carries
what was read on the way, so that storing it reads each file once more and no header again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.checks import ERROR, FIT, Problem, Report, examined
from adapterhub.manifest import card, describe
from adapterhub.manifest.document import AdapterManifest, FileEntry
from adapterhub.manifest.package_files import Listing, Selection, first_bytes, listing
from adapterhub.project.policy import joined
from adapterhub_converters.adapter_files import ADAPTER_JSON, adapter_in
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError

from . import signatures

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterhub.checks.contents import Contents
    from adapterhub.manifest.describe import Draft
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.project.policy import Policy
    from adapterhub.store.store import Store
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
        policy: What it was compared with, which also says who must have signed it.
        signatures: Those that came with it, unverified.
        metrics: What other programs measured, under the names that a search uses.
    """

    folder: Path
    where: str
    draft: Draft
    overridden: tuple[Problem, ...] = ()
    policy: Policy | None = None
    signatures: tuple[bytes, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


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
    listed: Listing | None = None,
    metrics: Mapping[str, float] | None = None,
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
        listed: The files to package, where the caller has looked at each.
        metrics: What other programs measured, under the names that a search uses, for a policy that bounds them.

    Raises:
        RefusedError: The check finds errors (code `check-failed`), or the policy does not allow it (`against-policy`).
    """
    where = where or str(folder)
    if checked:
        made = Package(folder, where, describe.draft(folder, base=base), metrics=metrics or {})
        return allowed(_signed(made), policy)
    with examined(adapter_in(folder), base=base, where=where) as (report, contents):

        def draft(errors: tuple[Problem, ...]) -> Draft:
            if contents is None:
                return describe.draft(folder, base=base)
            contents.manifest()
            contents.card()
            found = listed or listing(folder, head=partial(_head, contents, hash_below), selection=selection)
            # Records of other weights are not those of these.
            seen, text = contents.seen(), "" if any(one.code == "files-changed" for one in errors) else contents.manifest_text
            return describe.draft(
                folder, listing=found, seen=seen, text=text, base=base, digests=contents.digests, card=contents.card()
            )

        overridden = errors_of(report, base, force=force, forced=draft)
        made = Package(folder, where, draft(overridden), overridden, metrics=metrics or {})
    return allowed(_signed(made), policy)


def _head(contents: Contents, hash_below: int, path: Path) -> bytes:
    """The first bytes of a file, which is hashed while it is open if it is small enough."""
    if path.stat().st_size < hash_below:
        contents.digest(path)
    return contents.heads[path] if path in contents.heads else first_bytes(path)


def _signed(package: Package) -> Package:
    return replace(package, signatures=signatures.in_folder(package.folder))


def allowed(package: Package, policy: Policy | None) -> Package:
    """Return the adapter with one more policy that it meets; RefusedError if it does not."""
    if policy is not None and policy.needs_manifest:
        files = (package.folder / path for path in package.draft.listing.files if path != ADAPTER_JSON)
        size = sum(file.stat().st_size for file in files)
        policy.check_manifest(package.draft.manifest(), package.where, size=size, metrics=package.metrics)
    return replace(package, policy=joined(package.policy, policy))


def check_adapter(
    path: Path,
    *,
    where: str,
    base: BaseSpec | None = None,
    force: bool = False,
    forced: Callable[[], object] = lambda: None,
) -> tuple[Problem, ...]:
    """Check an adapter and refuse it for errors; with `force` the errors are returned. `forced` is as in `errors_of`."""
    with examined(path, base=base, where=where) as (report, contents):
        return errors_of(report, base, force=force, forced=None if contents is None else lambda _: forced())


def check_received(
    folder: Path,
    made: Manifest,
    *,
    where: str,
    policy: Policy | None = None,
    force: bool = False,
    check: bool = True,
    metrics: Mapping[str, float] | None = None,
) -> tuple[Problem, ...]:
    """Check a version that somebody else packaged as `package` does: its adapter, its adapter.json, and the policy.

    Args:
        folder: The files of the version.
        made: Its manifest.
        where: Its name in errors.
        policy: The project's, None where it has none.
        force: Accept an adapter whose check finds errors. Facts that are not those of the weights cannot be overridden.
        check: Check the adapter; without, only its adapter.json is compared with the headers of the weights.
        metrics: What was measured of it, besides at the end of its training.

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
            errors = errors_of(report, None, force=force, forced=lambda _: None)
            seen = contents.seen() if contents is not None else None
    known = describe.true_manifest(folder, seen=seen, where=where)
    known = known and card.fill(known, card.read(folder))
    check_manifest(policy, known, where, size=made.files_size, metrics=metrics)
    return errors


def _succeeds(act: Callable[[], object]) -> bool:
    try:
        act()
    except AdapterhubError:
        return False
    return True


def check_listed(store: Store, made: Manifest, where: str) -> None:
    """Raise IntegrityError if the adapter.json of a manifest lists other files than the manifest does."""
    if made.adapter_json is None:
        return
    where = f"{where}: {ADAPTER_JSON}"
    listed = AdapterManifest.parse(store.read_document(made.adapter_json.digest), where).files
    files = {FileEntry(layer.path, layer.digest, layer.size) for layer in made.layers if layer.path != ADAPTER_JSON}
    if set(listed) != files:
        raise IntegrityError(where, "lists other files than the manifest")


def check_manifest(
    policy: Policy | None,
    manifest: AdapterManifest | None,
    where: str,
    *,
    size: int | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Compare the manifest of an adapter with the policy, if there is one that needs it; as `Policy.check_manifest`."""
    if policy is not None and policy.needs_manifest:
        if manifest is None:
            raise RefusedError(where, "no adapter.json to compare with the project's policy", code="no-manifest")
        policy.check_manifest(manifest, where, size=size, metrics=metrics or {})


def errors_of(
    report: Report, base: BaseSpec | None, *, force: bool, forced: Callable[[tuple[Problem, ...]], object] | None
) -> tuple[Problem, ...]:
    """The errors of a report; RefusedError for them unless `force`.

    `forced` does what storing the adapter despite them takes: `force` is offered only if that succeeds. None if nothing helps.
    """
    errors = tuple(problem for problem in report.problems if problem.severity == ERROR)
    if not errors or (force and report.format is not None):
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
    forcible = forced is not None and _succeeds(partial(forced, errors))
    raise RefusedError(
        report.where,
        what,
        "Check it for the rest, or store it with force" if forcible else "Check it for the rest",
        code=(CODE_ON_BASE if base else CODE) if forcible else CODE_FOR_GOOD,
        adapter=report.where,
        base=base.where if base else "",
    )
