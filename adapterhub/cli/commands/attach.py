"""`adapterhub attach`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import attachments, output
from adapterhub.cli.options import Settings, command, output_option
from adapterhub.cli.output import Column
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.oci.referrers import Referrer
    from adapterhub.remotes.protocol import ReferringTarget

_FOLDER_DIGITS = 16  # of the digest of an attachment, in the name of its folder


@command(
    "attach",
    example="""
    adapterhub attach oci://registry.example/team/sql:v2 scan.json --type application/vnd.example.scan+json
    adapterhub attach layout://adapters.tar:team/sql:v2 model.sig --type application/vnd.example.signature
    adapterhub attach oci://registry.example/team/sql:v2 --list
    adapterhub attach oci://registry.example/team/sql:v2 --list --type application/vnd.example.scan+json -o ./scan""",
)
@click.argument("address", metavar="ADDRESS")
@click.argument("files", metavar="[FILE]...", nargs=-1)
@click.option("--type", "kind", metavar="TYPE", help="Media type: how others find the attachment; with --list, only these.")
@click.option("--list", "listed", is_flag=True, help="List the attachments of the version, and attach nothing.")
@output_option("with --list, folder for the files, verified; for those of several attachments, a folder each in it.")
@click.pass_obj
def attach(
    settings: Settings, *, address: str, files: tuple[str, ...], kind: str | None, listed: bool, out: str | None
) -> None:
    """Attach files to a version in an OCI registry or an image layout; the version and its digest do not change.

    An attachment is a manifest of its own with the version as its subject (an OCI referrer), which `oras discover` and cosign
    find too. Attaching the same files under the same type again changes nothing. --list shows what is attached, or writes its
    files; where a registry has no referrers API, the list is read from the tag sha256-… of the version.
    """
    if listed or out is not None:
        if files or not listed:
            option, problem = ("--list", "attaches nothing") if files else ("-o", "is the folder for what --list shows")
            hint = "Leave out the files" if files else "Add --list"
            raise UsageError(option, problem, hint, code="conflicting-options")
        _show_attachments(settings, address, kind, out)
        return
    if not files or kind is None:
        missing = "a FILE to attach" if not files else "--type, its media type"
        raise UsageError("attach", f"needs {missing}", "Name it, or pass --list to see what is attached")
    _attach_files(settings, address, files, kind)


def _attach_files(settings: Settings, address: str, files: tuple[str, ...], kind: str) -> None:
    from adapterhub.remotes.oci import referrers

    with attachments.open_referrers(address) as (registry, parsed):
        subject = registry.manifest(parsed.reference)
        added = referrers.attach_files(registry, subject, kind, [Path(file) for file in files])
    document = {"ref": str(parsed), "subject": subject.digest, **attachments.document(added)}
    text = (
        f"{parsed.repository}@{output.digest(added.digest)}  {added.artifact_type}, attached to {output.digest(subject.digest)}"
    )
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _show_attachments(settings: Settings, address: str, kind: str | None, out: str | None) -> None:
    from adapterhub.registry import version_selection
    from adapterhub.remotes.oci import referrers

    files: list[str] | None = None
    with attachments.open_referrers(address) as (registry, parsed):
        # A full digest saves the request for the manifest.
        has_full_digest = parsed.digest and not version_selection.is_prefix(parsed.digest)
        digest = parsed.digest if parsed.digest and has_full_digest else registry.manifest(parsed.reference).digest
        attachments_ = referrers.referrers(registry, digest, kind)
        if out is not None:
            files = _fetch(registry, _require_some(attachments_, address, kind), Path(out))
    document: dict[str, object] = {
        "ref": str(parsed),
        "subject": digest,
        "attached": [attachments.document(attachment) for attachment in attachments_],
    }
    if files is not None:
        document |= {"output": out, "files": files}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(attachments_, out, files))


def _fetch(registry: ReferringTarget, attachments_: list[Referrer], out: Path) -> list[str]:
    """Write the files of an attachment into `out`, or of several each into a folder there, and return their paths in it."""
    from adapterhub.remotes.oci import referrers

    if len(attachments_) == 1:
        return referrers.fetch_files(registry, attachments_[0], out)
    paths = []
    for attachment in attachments_:
        folder = attachment.digest.removeprefix("sha256:")[:_FOLDER_DIGITS]
        paths += [f"{folder}/{path}" for path in referrers.fetch_files(registry, attachment, out / folder)]
    return paths


def _require_some(attachments_: list[Referrer], address: str, kind: str | None) -> list[Referrer]:
    """Return the attachments; NotFoundError if there is none."""
    if not attachments_:
        hint = f"`adapterhub attach {address} --list` lists those of other types" if kind else ""
        raise NotFoundError(address, f"has no attachment{f' of type {kind}' if kind else ''}", hint)
    return attachments_


def _text(attachments_: list[Referrer], out: str | None, files: list[str] | None) -> None:
    if files is not None:
        output.write(output.one_line(f"{out}: {', '.join(files)}, verified"))
        return
    if not attachments_:
        output.say("no attachments")
    rows = [[attachment.artifact_type or "-", attachment.digest] for attachment in attachments_]
    for line in output.table((Column("TYPE"), Column("DIGEST")), rows, screen=output.width()) if rows else ():
        output.write(line)
