"""The commands attach and attached: what is said of a version where it is shared, and not in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.oci.referrers import Referrer, Referring


@command(
    "attach",
    short="Attach files to a version elsewhere.",
    example="""
    adapterhub attach oci://registry.example/team/sql:v2 scan.json --type application/vnd.example.scan+json
    adapterhub attach layout://adapters.tar:team/sql:v2 model.sig --type application/vnd.example.signature""",
)
@click.argument("address", metavar="ADDRESS")
@click.argument("files", metavar="FILE…", nargs=-1, required=True)
@click.option("--type", "kind", metavar="TYPE", required=True, help="What it is, as a media type: by this others find it.")
@click.pass_obj
def attach(settings: Settings, *, address: str, files: tuple[str, ...], kind: str) -> None:
    """Attach files to a version in a registry or an image layout; the version and its digest stay as they are.

    It is a manifest of its own that names the version as its subject (an OCI referrer), which oras discover and cosign
    find too. The same files of the same type again are the same attachment.
    """
    from adapterhub.remotes.oci import referrers

    with _opened(address) as (place, where):
        subject = place.manifest(where.reference)
        made = referrers.attach(place, subject, kind, [Path(file) for file in files])
    document = {"ref": str(where), "subject": subject.digest, **_document(made)}
    text = f"{where.repository}@{output.digest(made.digest)}  {made.artifact_type}, attached to {output.digest(subject.digest)}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


@command(
    "attached",
    short="List what is attached to a version elsewhere.",
    example="""
    adapterhub attached oci://registry.example/team/sql:v2
    adapterhub attached oci://registry.example/team/sql:v2 --type application/vnd.example.scan+json -o ./scan""",
)
@click.argument("address", metavar="ADDRESS")
@click.option("--type", "kind", metavar="TYPE", help="Only what is of this type.")
@click.option("-o", "--output", "out", metavar="DIR", help="Write the files of the one there is, verified.")
@click.pass_obj
def attached(settings: Settings, *, address: str, kind: str | None, out: str | None) -> None:
    """List what is attached to a version in a registry or an image layout, or write its files.

    In a registry that doesn't list them itself it is what the tag sha256-… of the version says.
    """
    from adapterhub.remotes.oci import referrers

    files: list[str] | None = None
    with _opened(address) as (place, where):
        digest = where.digest or place.manifest(where.reference).digest
        found = referrers.referrers(place, digest, kind)
        if out is not None:
            files = referrers.fetch(place, _only(found, address, kind), Path(out))
    document: dict[str, object] = {"ref": str(where), "subject": digest, "attached": [_document(each) for each in found]}
    if files is not None:
        document |= {"output": out, "files": files}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(found, out, files))


def _only(found: list[Referrer], address: str, kind: str | None) -> Referrer:
    if not found:
        raise NotFoundError(address, f"nothing {f'of the type {kind} ' if kind else ''}is attached to it")
    if len(found) > 1:
        types = ", ".join(dict.fromkeys(each.artifact_type for each in found))
        hint = "Name the one with --type" if kind is None else "`oras pull` takes one by its digest"
        raise UsageError(address, f"{len(found)} things are attached to it: {types[:200]}", hint)
    return found[0]


def _text(found: list[Referrer], out: str | None, files: list[str] | None) -> None:
    if files is not None:
        output.write(output.one_line(f"{out}: {', '.join(files)}, verified"))
        return
    if not found:
        output.say("nothing is attached")
    rows = [[each.artifact_type or "-", each.digest] for each in found]
    for line in output.table((Column("TYPE"), Column("DIGEST")), rows, screen=output.width()) if rows else ():
        output.write(line)


def _document(referrer: Referrer) -> dict[str, object]:
    return {
        "digest": referrer.digest,
        "size": referrer.size,
        "type": referrer.artifact_type,
        "annotations": dict(referrer.annotations),
    }


@contextmanager
def _opened(address: str) -> Iterator[tuple[Referring, Place]]:
    """A place that can keep attachments, open; UsageError for any other."""
    from adapterhub.remotes.location import is_address, parse

    from . import remotes

    if not is_address(address):
        hint = "Copy it to a registry or a layout, and name that: oci://HOST/NAME:TAG or layout://PATH:NAME"
        raise UsageError(address, "is not an address: things are attached where versions are shared", hint)
    place = parse(address)
    with remotes.opened(address) as there:
        if not hasattr(there, "referrers"):
            raise UsageError(address, "nothing can be attached in this kind of place", "OCI registries and layouts can")
        yield cast("Referring", there), place


def carry(source: str, target: str) -> int:
    """Copy what is attached to a version to where the version is about to go; how many things that was."""
    from adapterhub.remotes.oci import referrers

    with _opened(source) as (there, where), _opened(target) as (place, _):
        return len(referrers.copy(there, there.manifest(where.reference).digest, place))
