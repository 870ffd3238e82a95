"""`adapterhub tag`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import catalogs, output, remotes
from adapterhub.cli.options import Settings, command, dry_run_option, expect_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import ref_at_remote, remote_option
from adapterhub.cli.version_results import render_push
from adapterhub.operations import tag as tag_operation
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Version
    from adapterhub.remotes.catalog import Catalog


@command(
    "tag",
    example="""
    adapterhub tag team/sql:v2 prod
    adapterhub tag team/sql@sha256:5f2c1a prod --expect sha256:90b1…
    adapterhub tag team/sql:prod --protect
    adapterhub tag team/sql:prod --restore""",
)
@click.argument("ref")
@click.argument("tag_name", metavar="[TAG]", required=False)
@expect_option
@click.option("--protect/--unprotect", "protect", default=None, help="Forbid moving or removing the tag, or allow it again.")
@click.option(
    "--restore",
    metavar="[SEQ]",
    type=int,
    is_flag=False,
    flag_value=-1,
    help="Undo its last move, or restore its value at SEQ.",
)
@dry_run_option
@remote_option
@click.pass_obj
def tag(
    settings: Settings,
    *,
    ref: str,
    tag_name: str | None,
    expect: str | None,
    protect: bool | None,
    restore: int | None,
    dry_run: bool,
    remote: str | None,
) -> None:
    """Point a tag at a version, wherever it pointed before. Only pushes set `latest` and v1, v2 ….

    Without TAG, REF is the tag itself, NAME:TAG: to protect it, or to restore its value before the last move or, with SEQ, at
    that entry of `adapterhub log`. The log records every move, so every move can be undone. REF may be on a hub
    of adapterhub; at other addresses, a tag can only be moved.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.address_schemes import is_address
    from adapterhub.remotes.version_documents import version_document

    address = ref_at_remote(ref, remote)
    opened = catalogs.open_hub(address, dry_run=dry_run) if is_address(address) else None
    if is_address(address) and opened is None:
        if dry_run:
            catalogs.refuse_dry_run(address)
        _tag_at_address(settings, address, tag_name, expect=expect, only_here=protect is not None or restore is not None)
        return
    target = Ref.parse(ref) if opened is None else opened[1]
    if restore is not None and (tag_name or expect):
        raise UsageError("--restore", "takes NAME:TAG only", f"Write `adapterhub tag {target.name}:TAG --restore`")
    if not tag_name and restore is None and protect is None:
        hint = f"Write `adapterhub tag {ref} TAG`; `adapterhub list {target.name}` shows the tags"
        raise UsageError(ref, "TAG is missing", hint)
    with catalogs.open_to_change(settings, opened, dry_run=dry_run) as catalog:
        version = _tag_in_catalog(catalog, target, tag_name, expect=expect, protect=protect, restore=restore)
    document = version_document(version)
    del document["new"], document["skipped"]
    word = {True: ", protected", False: ", not protected", None: ""}[protect]
    text = f"{version.name}:{version.tag} is {version.ref}{word}"
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)


def _tag_at_address(settings: Settings, address: str, name: str | None, *, expect: str | None, only_here: bool) -> None:
    if only_here:
        raise remotes.unsupported_error(address, "protection of tags, and no log to restore them from")
    if name is None:
        raise UsageError(address, "TAG is missing", f"Write `adapterhub tag {address} TAG`")
    report = render_push(tag_operation.tag(address, name, workspace(settings), expect=expect))
    output.emit(report.document, as_json=settings.as_json, text=lambda: output.write(report.text))


def _tag_in_catalog(
    catalog: Catalog, ref: Ref, name: str | None, *, expect: str | None, protect: bool | None, restore: int | None
) -> Version:
    """Do what was requested in the only order that works: unprotect, move, protect."""
    from adapterhub.ref import Ref

    tag_ref = Ref(ref.name, tag=name) if name else ref
    if protect is False:
        version = catalog.protect(tag_ref, on=False)
    if restore is not None:
        # -1 is the flag value of --restore without SEQ.
        version = catalog.restore_tag(tag_ref, None if restore == -1 else restore)
    if name:
        version = catalog.tag(ref, name, expect=expect)
    if protect:
        version = catalog.protect(tag_ref)
    return version
