"""Versions that a command has stored or written, as documents and lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub.cli.views.versions import version_document
from adapterhub.manifest.package_files import shortened
from adapterhub.ref import LATEST

from . import output

if TYPE_CHECKING:
    from adapterhub.registry.registry import Version
    from adapterhub.sharing.pulling import Pulled
    from adapterhub.sharing.sent import Sent


class Shown(NamedTuple):
    """A result, as a document and as a line."""

    document: dict[str, Any]
    text: str


def published(made: Version | Sent) -> Shown:
    """Show a version that was stored, in the registry or at an address; notes go to stderr."""
    from adapterhub.sharing.sent import Sent

    if made.overridden:
        count = output.plural(len(made.overridden), "error")
        output.say(output.one_line(f"stored despite {count}, the first {made.overridden[0]}"))
    if "files-changed" in made.overridden:
        output.say("left out of adapter.json: the records of other weights, such as a training")
    if made.skipped:
        output.say(output.one_line(f"left out: {shortened(made.skipped)}"))
    if not isinstance(made, Sent):
        if not made.new and made.tag in (None, LATEST) and LATEST not in made.tags:
            output.say(f"{made.name}:{LATEST} stays at the newer version; `adapterhub tag` moves other tags")
        tags = f" ({', '.join(made.tags)})" if made.tags else ""
        line = f"{made.ref}{tags}  {output.size(made.size or 0)}  {output.digest(made.digest)}"
        return Shown(version_document(made), _change(made, made.tag) + line)
    document = {
        **({"commit": made.commit} if made.commit else {}),
        "ref": made.ref,
        "tags": [made.tag],
        "digest": made.digest,
        "size": made.size,
        "sent": made.sent,
        "new": made.new,
        "moved": made.moved,
        "number": made.number,
        "skipped": list(made.skipped),
    }
    number = f" (v{made.number})" if made.number and made.tag != f"v{made.number}" else ""
    line = f"{made.ref}{number}  {output.size(made.size)}  {output.digest(made.digest)}"
    return Shown(document, _change(made, made.tag) + line)


def _change(made: Version | Sent, tag: str | None) -> str:
    """What a push changed, unless it stored a new version."""
    if made.new:
        return ""
    return f"tagged {tag} (its bytes were there): " if made.moved and tag else "already there: "


def pulled(made: Pulled) -> Shown:
    """Show what was written of a version."""
    many = output.plural(len(made.files), "file")
    # Tags and ranges at an address move without a log here, so the digest is the only name of what came.
    which = made.ref if made.version or "@" in made.ref else f"{made.ref}@{output.digest(made.digest)}"
    text = f"{'' if made.new else 'already there: '}{made.path}: {which}, {many}, {output.size(made.size)}, verified"
    if made.version is None:
        document: dict[str, Any] = {
            **({"commit": made.commit} if made.commit else {}),
            "ref": made.ref,
            "digest": made.digest,
            "size": made.size,
            "output": str(made.path),
            "new": made.new,
            "files": list(made.files),
        }
        return Shown(document, text)
    document = {**version_document(made.version), "new": made.new, "output": str(made.path), "files": list(made.files)}
    del document["skipped"]
    return Shown(document, text)


def converted(made: Pulled, to: str) -> Shown:
    """Show what a version was converted to on its way out."""
    loss = made.loss or {}
    document = {
        "ref": made.ref,
        "digest": made.digest,
        "deprecated": made.version.deprecated if made.version else None,
        "output": str(made.path),
        "format": to,
        "loss": loss,
        "cached": made.cached,
    }
    losses = ", ".join(f"{count} {name}" for name, count in loss.items())
    cached = ", from the cache" if made.cached else ""
    return Shown(document, f"{made.path}: {made.ref} as {to}, {sum(loss.values())} tensors: {losses}{cached}")
