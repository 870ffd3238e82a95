"""The gate of every store: an adapter is checked, compared with the project's policy and pinned to its base.

Every command and function that stores an adapter, in the registry or in a remote, calls `package` first. A `Package` carries
what was read meanwhile, so that storing it reads each file only once more and no header again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.checks import ERROR, FIT, Problem, Report, open_check
from adapterhub.checks.report import CODES
from adapterhub.manifest import card, derive, weight_facts
from adapterhub.manifest.document import AdapterManifest, FileEntry
from adapterhub.manifest.package_files import Listing, Selection, first_bytes, listing
from adapterhub.project.policy_rules import NO_FACTS, NO_MEASUREMENTS, Measurements, ReadParent, VersionFacts, no_parent
from adapterhub_converters.adapter_files import ADAPTER_JSON, resolve_adapter
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .version_facts import first_problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from adapterhub.checks.contents import Contents
    from adapterhub.manifest.derive import Draft
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.project.policy import Policy
    from adapterhub.store.store import Store
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.formats.candidate import Candidate

MENDED_BY_CONVERSION = frozenset({"key-prefix", "other-prefix", "no-such-module", "base-shallower"})
"""Codes of errors in names alone: a conversion gives modules the names of the base, or refuses them."""
_MAX_ERRORS = 1_000  # in headers and config: an adapter with more is refused, and nothing further is checked of it
_FOR_GOOD = ("check-failed-for-good", "check-failed-for-good-on-base")  # codes without and with a base
_TO_STORE = ("check-failed", "check-failed-on-base")
_TO_CONVERT = ("check-failed-to-convert", "check-failed-to-convert-on-base")


@dataclass(frozen=True)
class Package:
    """An adapter that may be stored.

    Attributes:
        folder: The folder with the adapter, and nothing else in it.
        where: The name of the adapter in errors.
        draft: Its adapter.json without digests, with the base pinned.
        overridden: The errors of its check that `force` accepted.
        policy: The policy it meets, which also says who must have signed it.
        signatures: The signatures that came with it, unverified.
        metrics: What other programs measured, under the names that a search uses.
        read_parent: Returns the adapter.json of a parent by its digest; None for one that is not at hand.
    """

    folder: Path
    where: str
    draft: Draft
    overridden: tuple[Problem, ...] = ()
    policy: Policy | None = None
    signatures: tuple[bytes, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    read_parent: ReadParent = no_parent


def package(
    folder: Path,
    *,
    location: str = "",
    base: BaseSpec | None = None,
    policy: Policy | None = None,
    force: bool = False,
    already_checked: bool = False,
    hash_below: int = 0,
    selection: Selection | None = None,
    file_list: Listing | None = None,
    metrics: Mapping[str, float] | None = None,
    read_parent: ReadParent = no_parent,
) -> Package:
    """Check the adapter in `folder` and compare it with the policy; nothing is stored.

    Args:
        folder: The adapter's own folder.
        location: The name of the adapter in errors; the folder's path if empty.
        base: The model it was trained on, to be pinned: the adapter must fit it.
        policy: The project's policy; None without one.
        force: Accept an adapter whose check finds errors. A policy cannot be overridden.
        already_checked: The adapter was converted from another format, and checked there.
        hash_below: Hash files of fewer bytes while they are open anyway, for digests that are needed before sending.
        selection: Patterns of files to package and to leave out.
        file_list: The files to package, if the caller has looked at each.
        metrics: What other programs measured, under the names that a search uses, for a policy that bounds them.
        read_parent: Returns the adapter.json of a parent by its digest, for a policy that asks; None if it is not at hand.

    Raises:
        RefusedError: The check finds errors (code `check-failed`), or the policy does not allow the adapter
            (`against-policy`).
    """
    location = location or str(folder)
    if already_checked:
        result = Package(folder, location, derive.draft(folder, base=base), metrics=metrics or {}, read_parent=read_parent)
        return apply_policy(_with_signatures(result), policy)
    with _open_gate(resolve_adapter(folder), base, location=location, force=force) as (report, contents):

        def draft(errors: tuple[Problem, ...]) -> Draft:
            if contents is None:
                return derive.draft(folder, base=base)
            contents.manifest()
            contents.card()
            packaged = file_list or listing(folder, head=partial(_head, contents, hash_below), selection=selection)
            # An adapter.json about other weights is not used: everything is derived from the files instead.
            inspected, text = (
                # A manifest is derived without the base, which the names of what was read as a whole may follow.
                contents.inspected() if base is None or contents.adapter is None else None,
                "" if any(problem.code == "files-changed" for problem in errors) else contents.manifest_text,
            )
            return derive.draft(
                folder,
                listing=packaged,
                inspected=inspected,
                text=text,
                base=base,
                digests=contents.digests,
                card=contents.card(),
            )

        overridden = raise_or_collect_errors(report, base, force=force, try_storing=draft)
        result = Package(folder, location, draft(overridden), overridden, metrics=metrics or {}, read_parent=read_parent)
    return apply_policy(_with_signatures(result), policy)


def _open_gate(
    path: Path | Candidate, base: BaseSpec | None, *, location: str, force: bool
) -> AbstractContextManager[tuple[Report, Contents | None]]:
    """Check an adapter as far as it takes to refuse it; its report has no verdicts of runtimes."""
    limit = None if force else _MAX_ERRORS  # what is forced is recorded with all of its errors
    return open_check(path, base=base, display_name=location, limit=limit, most_errors=limit, verdicts=False)


def _head(contents: Contents, hash_below: int, path: Path) -> bytes:
    """Return the first bytes of a file, and hash the file while it is open if it is small enough."""
    if path.stat().st_size < hash_below:
        contents.digest(path)
    return contents.heads[path] if path in contents.heads else first_bytes(path)


def _with_signatures(package: Package) -> Package:
    from . import signature_policy  # of what is stored; a conversion is only checked

    return replace(package, signatures=signature_policy.in_folder(package.folder))


def apply_policy(package: Package, policy: Policy | None) -> Package:
    """Return the adapter with one more policy that it meets; raise RefusedError if it does not meet it."""
    if policy is not None and policy.needs_manifest:
        paths = [path for path in package.draft.listing.files if path != ADAPTER_JSON]
        facts = VersionFacts(
            size=sum((package.folder / path).stat().st_size for path in paths),
            measurements=Measurements(package.metrics),
            read_parent=package.read_parent,
            find_problem=partial(first_problem, package.folder, paths),
        )
        policy.check_manifest(package.draft.manifest(), package.where, facts)
    from adapterhub.project.policy import join

    return replace(package, policy=join(package.policy, policy))


def check_adapter(
    path: Path,
    *,
    location: str,
    base: BaseSpec | None = None,
    force: bool = False,
    try_storing: Callable[[], object] | None = lambda: None,
) -> tuple[Problem, ...]:
    """Check an adapter and raise RefusedError for its errors; with `force`, return them.

    `try_storing` is as in `raise_or_collect_errors`, without an argument.
    """
    with _open_gate(path, base, location=location, force=force) as (report, contents):
        store = None if contents is None or try_storing is None else lambda _: try_storing()
        return raise_or_collect_errors(report, base, force=force, try_storing=store)


def check_received(
    folder: Path,
    manifest: Manifest,
    *,
    location: str,
    policy: Policy | None = None,
    force: bool = False,
    check: bool = True,
    measurements: Measurements = NO_MEASUREMENTS,
    read_parent: ReadParent = no_parent,
) -> tuple[Problem, ...]:
    """Check a version that somebody else packaged, as `package` does: its adapter, its adapter.json, and the policy.

    Args:
        folder: The files of the version.
        manifest: Its OCI manifest.
        location: Its name in errors.
        policy: The project's policy; None without one.
        force: Accept an adapter whose check finds errors. An adapter.json that contradicts the weights is never accepted.
        check: Check the adapter; otherwise, only compare its adapter.json with the headers of the weights.
        measurements: What was measured of it, apart from the metrics at the end of its training.
        read_parent: Returns the adapter.json of a parent by its digest; None if it is not at hand.

    Returns:
        The errors that `force` accepted.

    Raises:
        RefusedError: The check finds errors, or the policy does not allow the adapter.
        IntegrityError: Its adapter.json is not about these weights (code `wrong-facts`).
    """
    errors: tuple[Problem, ...] = ()
    inspected = None
    if check:
        with _open_gate(resolve_adapter(folder), None, location=location, force=force) as (report, contents):
            errors = raise_or_collect_errors(report, None, force=force, try_storing=lambda _: None)
            inspected = contents.inspected() if contents is not None else None
    adapter_manifest = weight_facts.manifest_matching_weights(folder, inspected=inspected, location=location)
    adapter_manifest = adapter_manifest and card.with_card(adapter_manifest, card.read(folder))
    paths = [layer.path for layer in manifest.layers if layer.path != ADAPTER_JSON]
    facts = VersionFacts(manifest.files_size, measurements, read_parent, partial(first_problem, folder, paths))
    check_manifest(policy, adapter_manifest, location, facts)
    return errors


def _succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except AdapterhubError:
        return False
    return True


def check_listed(store: Store, manifest: Manifest, location: str) -> None:
    """Raise IntegrityError if the adapter.json of a manifest does not list exactly the manifest's other files."""
    if manifest.adapter_json is None:
        return
    location = f"{location}: {ADAPTER_JSON}"
    listed_files = AdapterManifest.parse(store.read_document(manifest.adapter_json.digest), location).files
    files = {FileEntry(layer.path, layer.digest, layer.size) for layer in manifest.layers if layer.path != ADAPTER_JSON}
    if set(listed_files) != files:
        raise IntegrityError(location, "lists other files than the manifest")


def check_manifest(
    policy: Policy | None,
    manifest: AdapterManifest | None,
    location: str,
    facts: VersionFacts = NO_FACTS,
) -> None:
    """Compare the manifest of an adapter with the policy, if there is one that needs it.

    Raises:
        RefusedError: There is no manifest (code `no-manifest`), or the policy does not allow the adapter.
    """
    if policy is not None and policy.needs_manifest:
        if manifest is None:
            raise RefusedError(location, "no adapter.json to compare with the project's policy", code="no-manifest")
        policy.check_manifest(manifest, location, facts)


def raise_or_collect_errors(
    report: Report,
    base: BaseSpec | None,
    *,
    force: bool,
    try_storing: Callable[[tuple[Problem, ...]], object] | None,
    mended: frozenset[str] | None = None,
) -> tuple[Problem, ...]:
    """Return the errors of a report if they are accepted by `force`, else raise RefusedError for them.

    Args:
        report: The result of the check.
        base: The base that the adapter was checked on, if any.
        force: Accept errors. An adapter that cannot be read at all is never accepted.
        try_storing: Called with the errors; does what storing the adapter despite them takes, or raises an AdapterhubError. The
            error suggests `force` only if this succeeds. None if nothing helps.
        mended: Codes of errors that do not count, as the conversion that follows mends them; None if the adapter is stored.
    """
    errors = tuple(problem for problem in report.problems if problem.severity == ERROR and problem.code not in (mended or ()))
    if not errors or (force and report.format is not None):
        return errors
    first = errors[0]
    misfit = f"does not fit {base.source}: " if base and any(problem.code in FIT for problem in errors) else ""
    suffix = f" ({report.count_text(ERROR, without=mended or ())})" if len(errors) > 1 else ""
    location = f"{first.where}: " if first.where else ""
    problem_text = f"{misfit}{first.code}: {location}{first.what}{suffix}"
    if report.format is None:  # nothing can be stored of what cannot be read
        error = RefusedError(report.where, problem_text, first.hint)
        if first.cause:
            # The code of the cause, such as a missing file, says more than that of the check.
            error.code, error.fields = first.cause.code, first.cause.fields
        raise error
    # Of one with thousands of errors this is not tried: it takes as long as storing it.
    count = sum(n for code, n in report.counted().items() if CODES[code][0] == ERROR and code not in (mended or ()))
    can_force = try_storing is not None and count <= _MAX_ERRORS and _succeeds(partial(try_storing, errors))
    codes = (_TO_STORE if mended is None else _TO_CONVERT) if can_force else _FOR_GOOD
    with_force = f", or {'store' if mended is None else 'convert'} it with force" if can_force else ""
    raise RefusedError(
        report.where,
        problem_text,
        f"Check it for the rest of the errors{with_force}",
        code=codes[base is not None],
        adapter=report.where,
        base=base.source if base else "",
    )
