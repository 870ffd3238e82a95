"""Results of commands that store or write a version, as documents and lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub.manifest.package_files import shorten_names
from adapterhub.ref import LATEST

from . import output

if TYPE_CHECKING:
    from adapterhub.operations.pull import PullResult
    from adapterhub.operations.push_result import PushResult
    from adapterhub.operations.transfer_plans import TransferPlan


class RenderedResult(NamedTuple):
    """A result, as a document and as a line."""

    document: dict[str, Any]
    text: str


def _errors_text(codes: Sequence[str]) -> str:
    """Return the number of errors that were overridden, by the code of each, and the first."""
    from adapterhub.checks.report import ERROR, count_text

    return f"{count_text(Counter(codes), ERROR)}, the first {codes[0]}"


def render_push(result: PushResult) -> RenderedResult:
    """Render a version that was stored, in the registry or at an address; notes go to stderr."""
    from adapterhub.remotes.version_documents import version_document

    if result.overridden:
        output.say(output.one_line(f"stored despite {_errors_text(result.overridden)}"))
    if "files-changed" in result.overridden:
        output.say("left out of adapter.json: the records of other weights, such as a training")
    if result.skipped:
        output.say(output.one_line(f"left out: {shorten_names(result.skipped)}"))
    if (version := result.version) is not None:
        if not result.new and result.tag in (None, LATEST) and LATEST not in version.tags:
            output.say(f"{version.name}:{LATEST} stays at the newer version; `adapterhub tag` moves other tags")
        tags = f" ({', '.join(version.tags)})" if version.tags else ""
        line = f"{result.ref}{tags}  {output.size(result.size)}  {output.digest(result.digest)}"
        return RenderedResult(version_document(version), _change_prefix(result) + line)
    document = {
        **({"commit": result.commit} if result.commit else {}),
        "ref": result.ref,
        "tags": [result.tag],
        "digest": result.digest,
        "size": result.size,
        "sent": result.sent,
        "new": result.new,
        "moved": result.moved,
        "number": result.number,
        "skipped": list(result.skipped),
    }
    number = f" (v{result.number})" if result.number and result.tag != f"v{result.number}" else ""
    line = f"{result.ref}{number}  {output.size(result.size)}  {output.digest(result.digest)}"
    return RenderedResult(document, _change_prefix(result) + line)


def show_plan(plan: TransferPlan, verb: str, *, as_json: bool) -> None:
    """Print what a push or a pull would move: its files, and the bytes that the target lacks."""
    if plan.overridden:
        output.say(f"would be stored despite {_errors_text(plan.overridden)}")
    if plan.skipped:
        output.say(output.one_line(f"left out: {shorten_names(plan.skipped)}"))
    document = {
        "target": plan.target,
        "digest": plan.digest,
        "size": plan.size,
        "missing": plan.missing,
        "files": [{"path": path, "size": size} for path, size in plan.files],
        "new": plan.new,
        "skipped": list(plan.skipped),
        "dry_run": True,
    }

    def text() -> None:
        columns = (output.Column("FILE"), output.Column("SIZE", right=True))
        output.write_table(columns, [[path, output.size(size)] for path, size in plan.files])
        name = f"{plan.target}  {output.size(plan.size)}  {output.digest(plan.digest)}"
        moved = f"{output.plural(len(plan.files), 'file')} would be {verb}, {output.size(plan.missing)} of them missing there"
        output.write(output.one_line(f"{name}: {moved}" if plan.new else f"{name}: already there, nothing would be {verb}"))

    output.emit(document, as_json=as_json, text=text)


def _change_prefix(result: PushResult) -> str:
    """Return what a push changed, if it stored no new version."""
    if result.new:
        return ""
    return f"tagged {result.tag} (its bytes were there): " if result.moved and result.tag else "already there: "


def render_pull(pull: PullResult) -> RenderedResult:
    """Render what was written of a version."""
    from adapterhub.remotes.version_documents import version_document

    file_count = output.plural(len(pull.files), "file")
    # No log here records where tags and ranges at an address lead, so the digest is the only name of the pulled version.
    version_name = pull.ref if pull.version or "@" in pull.ref else f"{pull.ref}@{output.digest(pull.digest)}"
    text = (
        f"{'' if pull.new else 'already there: '}{pull.path}: {version_name}, {file_count}, {output.size(pull.size)}, verified"
    )
    if pull.version is None:
        document: dict[str, Any] = {
            **({"commit": pull.commit} if pull.commit else {}),
            "ref": pull.ref,
            "digest": pull.digest,
            "size": pull.size,
            "output": str(pull.path),
            "new": pull.new,
            "files": list(pull.files),
        }
        return RenderedResult(document, text)
    document = {**version_document(pull.version), "new": pull.new, "output": str(pull.path), "files": list(pull.files)}
    # Only a push leaves files out.
    del document["skipped"]
    return RenderedResult(document, text)


def render_conversion(result: PullResult, to: str) -> RenderedResult:
    """Render what a version was converted to when it was pulled."""
    loss = result.loss or {}
    document = {
        "ref": result.ref,
        "digest": result.digest,
        "deprecated": result.version.deprecated if result.version else None,
        "output": str(result.path),
        "format": to,
        "loss": loss,
        "cached": result.cached,
    }
    losses = ", ".join(f"{count} {name}" for name, count in loss.items())
    cached = ", from the cache" if result.cached else ""
    return RenderedResult(document, f"{result.path}: {result.ref} as {to}, {sum(loss.values())} tensors: {losses}{cached}")
