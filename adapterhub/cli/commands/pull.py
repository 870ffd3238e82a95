"""`adapterhub pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, inputs, output, signing_options
from adapterhub.cli.conversion_options import conversion_options
from adapterhub.cli.options import (
    Settings,
    base_option,
    command,
    dry_run_option,
    model_option,
    output_option,
    replace_option,
    transfer_options,
)
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import hint_default_remote, ref_at_remote, remote_option
from adapterhub.cli.version_results import render_conversion, render_pull, show_plan
from adapterhub.identity import Identity
from adapterhub.operations import pull as pull_operation
from adapterhub.operations.signature_checks import Demand
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.operations.pull import PullResult
    from adapterhub.registry.adapter_recipe import Conversion

_FOLDER = "adapters"  # where --locked writes without -o

_NETWORK = ("http://", "https://", "hf://")


@command(
    "pull",
    example="""
    adapterhub pull team/sql:v2
    adapterhub pull team/sql:prod -o ./sql-prod
    adapterhub pull team/sql:v2 -o ./sql-v2 --dry-run
    adapterhub pull team/sql:v2 --to gguf
    adapterhub pull team/sql:v2 --remote
    adapterhub pull team/sql:v2 --from adapters.tar --offline
    adapterhub pull oci://registry.example/team/sql:v2 -o ./sql
    adapterhub pull --locked -o ./adapters""",
)
@click.argument("ref", required=False)
@output_option("folder or file to write. [default: ./NAME, with the suffix of a file]")
@base_option("needed by --to where adapter.json does not record enough.")
@remote_option
@click.option("--lock", is_flag=True, help="Record the version in adapters.lock.")
@click.option("--locked", is_flag=True, help="Pull the digests in adapters.lock: REF, or all of them into OUT.")
@click.option("--from", "bundled", metavar="SRC", help="Source: a bundle (a .tar or a folder) instead of a registry.")
@click.option("--offline", is_flag=True, help="Use no network; refused where REF or BASE needs one.")
@click.option("--require-signature", is_flag=True, help="Refuse a version that no accepted signer has signed.")
@signing_options.accepted_signers
@signing_options.signed_as
@click.option("--remember", is_flag=True, help="Require its signer for the whole namespace from now on.")
@replace_option
@dry_run_option
@conversion_options("ollama")
@model_option
@transfer_options
@click.pass_obj
def pull(
    settings: Settings,
    *,
    ref: str | None,
    out: str | None,
    base: str | None,
    remote: str | None,
    lock: bool,
    locked: bool,
    bundled: str | None,
    offline: bool,
    require_signature: bool,
    keys: tuple[Path | Identity, ...],
    signed_as: str | None,
    remember: bool,
    replace: bool,
    dry_run: bool,
    conversion: Conversion | None,
    model: str | None,
) -> None:
    """Write the files of a version into a folder: every byte verified, all of them or none.

    A folder that has another version, unmodified, is updated: the new version replaces it in one step, and files that both
    have are left untouched. A folder with changes of your own is refused, with the names of the files; --replace discards them.

    --to converts it under the rules of `adapterhub convert`; the registry caches the result, so that the next pull is a copy.
    --require-signature refuses, before any file is fetched, a version that is not signed under this name by one of --key and
    --identity, or without these by a signer of the project's policy. A signature is written as model.sig, unverified where none
    is required. --remember records the signer: from then on everything from the namespace must be signed by it, without an
    option.

    An interrupted pull from a remote or an address (oci://HOST/NAME[:TAG|@DIGEST]) resumes.
    """
    if model and conversion is None:
        raise UsageError("--model", "is for --to ollama", "Leave it out", code="conflicting-options")
    if locked:
        signing = (require_signature, keys, signed_as, remember)
        elsewhere = (remote is not None, bundled, offline)
        other_options = (lock, base is not None, conversion is not None, dry_run, *elsewhere, *signing)
        _pull_locked(settings, ref, out, is_alone=not any(other_options), replace=replace)
        return
    if ref is None:
        raise UsageError("pull", "Missing argument 'REF'", "See `adapterhub pull --help`")
    address = ref_at_remote(ref, remote)
    if offline:
        _check_offline(address, base or "")
    if bundled:
        # The address of the version in the bundle takes the place of the ref: what follows is one path.
        address = _bundle_address(address, bundled)
    _check_conversion(address, conversion, base=base, model=model, lock=lock)
    remote_name = ref.partition("@")[0].partition(":")[0] if remote is not None else None
    demand = Demand(keys if require_signature or keys or remember else None, signed_as or "", remember and not dry_run)
    if dry_run:
        if conversion is not None:
            raise UsageError("--dry-run", "shows the files of a version", "Leave out --to", code="conflicting-options")
        with hint_default_remote(address):
            from adapterhub.operations import transfer_plans

            plan = transfer_plans.plan_pull(address, out, workspace(settings), name=remote_name, replace=replace, demand=demand)
        show_plan(plan, "pulled", as_json=settings.as_json)
        return
    with hint_default_remote(address):
        result = pull_operation.pull(
            address,
            out,
            to=conversion,
            base=inputs.read_base(base, settings) if base else None,
            model=model,
            name=remote_name,
            replace=replace,
            demand=demand,
            workspace=workspace(settings),
        )
    if lock:
        _lock(settings, ref, address if remote is None else ref, address, result)
    document, text = render_conversion(result, conversion.to) if conversion else render_pull(result)
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _lock(settings: Settings, ref: str, remote_ref: str, address: str, result: PullResult) -> None:
    """Record the version of a pull in the lock file: a local one under `ref`, one from elsewhere under `remote_ref`."""
    from adapterhub.cli import locks

    if result.version is not None:
        locks.record_local_version(settings, ref, result.version)
    elif result.manifest is not None:
        locks.record(remote_ref, address, result.manifest)


def _check_conversion(address: str, conversion: Conversion | None, *, base: str | None, model: str | None, lock: bool) -> None:
    """Refuse a conversion of a version that is elsewhere, and options that do not go with it."""
    from adapterhub.remotes.address_schemes import is_address

    if is_address(address) and (conversion is not None or base is not None):
        raise UsageError("--to", "converts versions of the local registry only", code="convert-there", address=address)
    if conversion is None:
        if base is not None:
            raise UsageError("--base", "is for --to", "Leave it out", code="conflicting-options")
        return
    if lock:
        problem = "records the version, not a conversion of it"
        raise UsageError("--lock", problem, "Lock it with `adapterhub lock`", code="conflicting-options")
    if model and conversion.to != "ollama":
        raise UsageError("--model", f"the format {conversion.to} records no name of a base", "Leave it out")


def _check_offline(*names: str) -> None:
    """Refuse the name of a version or a base that needs a network."""
    from adapterhub.remotes import address_schemes

    for name in names:
        # Decided by the scheme alone: parsing another address imports urllib3, which binds a socket to look for IPv6.
        if not address_schemes.is_layout(name) and (address_schemes.is_address(name) or name.lower().startswith(_NETWORK)):
            hint = "Leave out --offline, or name something local"
            raise UsageError(name, "needs a network, and --offline allows none", hint)


def _bundle_address(ref: str, bundle: str) -> str:
    """Return the address of a version in a bundle."""
    from adapterhub.remotes import address_schemes
    from adapterhub.remotes.layouts import layout_address as layout
    from adapterhub.remotes.version_bundle import resolve_name

    if address_schemes.is_address(ref):
        raise UsageError(ref, "is an address; --from takes the name in the bundle", "Write it like team/sql:v2")
    bundle_address = bundle if address_schemes.is_address(bundle) else f"layout://{bundle}"
    if not address_schemes.is_layout(bundle_address):
        raise UsageError(bundle, "is not a bundle", "Name a folder or a .tar, or pull the address itself")
    address = layout.parse(bundle_address)
    if address.tag or address.digest:
        raise UsageError(bundle, "names a version, as the ref does", f"Write --from {address.path}")
    with layout.connect(address) as bundled:
        name = resolve_name(bundled, ref)
    return f"{address.repository}{'@' if name.startswith('sha256:') else ':'}{name}"


def _pull_locked(settings: Settings, ref: str | None, out: str | None, *, is_alone: bool, replace: bool) -> None:
    """Pull the versions in the lock file below a folder, or one of them; `is_alone` if no other option contradicts it."""
    from adapterhub.operations import lock as lock_operation
    from adapterhub.project import lockfile

    if not is_alone:
        raise UsageError(
            "--locked", "takes refs and addresses from the lock file", "Leave out --remote, --lock, --to, --base and --key"
        )
    path = environment.lock_file()
    entries = lockfile.read(path)
    if ref is None:
        parent = Path(out or _FOLDER)
        targets = [(entry, parent / entry.name) for entry in sorted(entries.values(), key=lambda entry: entry.name)]
        # All targets are checked before the first one is written.
        for _, target in targets:
            lockfile.check_no_link(target, Path(out or ""))
    else:
        entry = lockfile.find(entries, ref, path)
        targets = [(entry, Path(out) if out else Path(entry.name.rpartition("/")[2]))]
    if not targets:
        raise UsageError(str(path), "contains no adapters", "Add them with `adapterhub lock REF…`")
    documents = []
    for entry, target in targets:
        new = lock_operation.pull(entry, target, workspace(settings), environment.lock_file(), replace=replace)
        documents.append({"name": entry.name, **entry.document(), "output": str(target), "new": new})
        if not settings.as_json:
            text = f"{target}: {entry.name}@{output.digest(entry.digest)}, {output.size(entry.size)}, verified"
            output.write(f"{'' if new else 'already there: '}{text}")
    if settings.as_json:
        output.write_json({"adapters": documents})
