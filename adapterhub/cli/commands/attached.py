"""`adapterhub attached`."""

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


@command(
    "attached",
    example="""
    adapterhub attached oci://registry.example/team/sql:v2
    adapterhub attached oci://registry.example/team/sql:v2 --type application/vnd.example.scan+json -o ./scan""",
)
@click.argument("address", metavar="ADDRESS")
@click.option("--type", "kind", metavar="TYPE", help="Media type: list only attachments of this type.")
@output_option("folder for the files of the only attachment, verified.")
@click.pass_obj
def attached(settings: Settings, *, address: str, kind: str | None, out: str | None) -> None:
    """List the attachments of a version in an OCI registry or an image layout, or write their files.

    Where a registry has no referrers API, the list is read from the tag sha256-… of the version.
    """
    from adapterhub.registry import version_selection
    from adapterhub.remotes.oci import referrers

    files: list[str] | None = None
    with attachments.open_referrers(address) as (registry, parsed):
        # A full digest saves the request for the manifest.
        has_full_digest = parsed.digest and not version_selection.is_prefix(parsed.digest)
        digest = parsed.digest if parsed.digest and has_full_digest else registry.manifest(parsed.reference).digest
        attachments_ = referrers.referrers(registry, digest, kind)
        if out is not None:
            files = referrers.fetch_files(registry, _only_attachment(attachments_, address, kind), Path(out))
    document: dict[str, object] = {
        "ref": str(parsed),
        "subject": digest,
        "attached": [attachments.document(attachment) for attachment in attachments_],
    }
    if files is not None:
        document |= {"output": out, "files": files}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(attachments_, out, files))


def _only_attachment(attachments_: list[Referrer], address: str, kind: str | None) -> Referrer:
    if not attachments_:
        hint = f"`adapterhub attached {address}` lists those of other types" if kind else ""
        raise NotFoundError(address, f"has no attachment{f' of type {kind}' if kind else ''}", hint)
    if len(attachments_) > 1:
        types = ", ".join(dict.fromkeys(attachment.artifact_type for attachment in attachments_))
        hint = "Choose one with --type" if kind is None else "Use `oras pull` with its digest"
        raise UsageError(address, f"has {len(attachments_)} attachments: {types[:200]}", hint)
    return attachments_[0]


def _text(attachments_: list[Referrer], out: str | None, files: list[str] | None) -> None:
    if files is not None:
        output.write(output.one_line(f"{out}: {', '.join(files)}, verified"))
        return
    if not attachments_:
        output.say("no attachments")
    rows = [[attachment.artifact_type or "-", attachment.digest] for attachment in attachments_]
    for line in output.table((Column("TYPE"), Column("DIGEST")), rows, screen=output.width()) if rows else ():
        output.write(line)
