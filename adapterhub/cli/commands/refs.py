"""Commands on refs: tag, rm, log, deprecate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub.cli.environment import complete_ref, open_registry
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub_converters.errors import UsageError

from .registry import version_document

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.store.store import Entry

_EXPECT = "Fail (exit 7) unless the tag still has this digest, or is `absent`."


@command(
    "tag",
    short="Point a tag at a version.",
    example="""
    adapterhub tag team/sql:v2 prod
    adapterhub tag team/sql@sha256:5f2c1a prod --expect sha256:90b1…
    adapterhub tag team/sql:prod --protect
    adapterhub tag team/sql:prod --restore""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.argument("tag_name", metavar="[TAG]", required=False)
@click.option("--expect", metavar="DIGEST", help=_EXPECT)
@click.option(
    "--protect/--unprotect", "protect", default=None, help="Let the tag neither move nor be removed, or let it again."
)
@click.option(
    "--restore", metavar="[SEQ]", type=int, is_flag=False, flag_value=-1, help="Undo its last move, or take what it was at SEQ."
)
@click.pass_obj
def tag(
    settings: Settings, *, ref: str, tag_name: str | None, expect: str | None, protect: bool | None, restore: int | None
) -> None:
    """Point a tag at a version, whatever it pointed at before. `latest` and v1, v2 … are set by pushes alone.

    Without TAG, REF is NAME:TAG itself: to protect it, or to restore where it pointed before its last move or, with a number of
    `adapterhub log`, then. Every move is in that log, so every move can be undone.
    """
    from adapterhub.ref import Ref

    target = Ref.parse(ref)
    if restore is not None and (tag_name or expect):
        raise UsageError("--restore", "takes NAME:TAG alone", f"Write `adapterhub tag {target.name}:TAG --restore`")
    if not tag_name and restore is None and protect is None:
        raise UsageError(ref, "the TAG that should point there is missing", f"Write `adapterhub tag {ref} TAG`")
    with open_registry(settings) as registry:
        version = _tag(registry, target, tag_name, expect=expect, protect=protect, restore=restore)
    document = version_document(version)
    del document["new"], document["skipped"]
    word = {True: ", protected", False: ", not protected", None: ""}[protect]
    text = f"{version.name}:{version.tag} is {version.ref}{word}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _tag(
    registry: Registry, ref: Ref, name: str | None, *, expect: str | None, protect: bool | None, restore: int | None
) -> Version:
    """What was asked for, in the order that makes it possible: unprotect, move, protect."""
    from adapterhub.ref import Ref

    own = Ref(ref.name, tag=name) if name else ref
    if protect is False:
        version = registry.protect(own, on=False)
    if restore is not None:
        version = registry.restore_tag(own, None if restore == -1 else restore)
    if name:
        version = registry.tag(ref, name, expect=expect)
    if protect:
        version = registry.protect(own)
    return version


@command(
    "rm",
    short="Remove a tag or a name.",
    example="""
    adapterhub rm team/sql:prod
    adapterhub rm team/sql""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.option("--expect", metavar="DIGEST", help=_EXPECT)
@click.option("--force", is_flag=True, help="Also a name from which others in the registry were made.")
@click.pass_obj
def rm(settings: Settings, *, ref: str, expect: str | None, force: bool) -> None:
    """Remove a tag, or a whole name with all its versions.

    A single version is never removed: versions are immutable. A removed name is not given to another adapter. The bytes stay
    until `adapterhub gc`. A name from which others were merged or converted is refused (exit 6), as those could not be made
    again.
    """
    from adapterhub.ref import Ref

    target = Ref.parse(ref)
    with open_registry(settings) as registry:
        registry.rm(target, expect=expect, force=force)
    kind = "tag" if target.tag else "name"
    output.emit(
        {"removed": str(target), "kind": kind}, as_json=settings.as_json, text=lambda: output.write(f"removed {kind} {target}")
    )


_LOG = (
    Column("#", right=True),
    Column("WHEN", drop=2),
    Column("OP"),
    Column("VERSION"),
    Column("TAGS"),
    Column("DIGEST", drop=1),
    Column("WHY", drop=3, wrap=True),
)


@command(
    "log",
    short="Say when a name's refs moved.",
    example="""
    adapterhub log team/sql
    adapterhub log team/sql:prod --json""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.pass_obj
def log(settings: Settings, ref: str) -> None:
    """Say every move of a name's refs, the newest first: when, what, which version, which tags.

    REF is a name, even a removed one, or a tag or a version: then what is about that. Times are UTC.
    """
    from adapterhub.ref import Ref

    target = Ref.parse(ref)
    with open_registry(settings) as registry:
        entries = registry.log(target)
    document = {"name": target.name, "entries": [_entry_document(entry) for entry in entries]}

    def text() -> None:
        for line in output.table(_LOG, [_entry_cells(entry) for entry in entries], screen=output.width()):
            output.write(line)

    output.emit(document, as_json=settings.as_json, text=text)


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "seq": entry.seq,
        "time": entry.time,
        "op": entry.op,
        "number": entry.number or None,
        "numbers": list(entry.numbers),
        "tags": list(entry.tags),
        "digest": entry.digest or None,
        "message": entry.message or None,
        "keep": entry.keep if entry.op == "keep" else None,
    }


def _entry_cells(entry: Entry) -> list[str]:
    numbers = entry.numbers or ((entry.number,) if entry.number else ())
    why = entry.message
    if entry.op == "evaluate":
        from adapterhub.manifest import measurement

        why = measurement.line(entry.message)
    if entry.op == "keep":
        why = f"the {entry.keep} newest and what has a tag" if entry.keep else "what has a tag"
    return [
        str(entry.seq),
        entry.time.replace("T", " ").removesuffix("Z"),
        entry.op,
        " ".join(f"v{number}" for number in numbers) or "-",
        " ".join(entry.tags) or "-",
        output.digest(entry.digest) or "-",
        output.one_line(why) or "-",
    ]


@command(
    "deprecate",
    short="Warn whoever uses a version.",
    example="""
    adapterhub deprecate team/sql:v2 "overfits; use v3"
    adapterhub deprecate team/sql --undo""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.argument("message", required=False, default="")
@click.option("--undo", is_flag=True, help="Take the warning back.")
@click.pass_obj
def deprecate(settings: Settings, *, ref: str, message: str, undo: bool) -> None:
    """Warn whoever pulls, lists, shows or otherwise uses a version, or with a bare name any of its versions.

    Nothing else changes: what is deprecated still works.
    """
    from adapterhub.ref import Ref

    target = Ref.parse(ref)
    if undo and message:
        raise UsageError("--undo", "takes no MESSAGE")
    with open_registry(settings) as registry:
        number = registry.deprecate(target, message, undo=undo)
    said = str(Ref(target.name, number=number or None))
    document = {"name": target.name, "number": number or None, "deprecated": None if undo else message}
    text = f"{said} is {'no longer ' if undo else ''}deprecated"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
