"""`adapterhub find`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.inputs import existing
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views.versions import row_document
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.index.search import Holder
    from adapterhub.index.tensors import Share
    from adapterhub.registry.finding import Found

_Deprecated = Mapping[tuple[str, int], str]


@command(
    "find",
    example="""
    adapterhub find adapter_model.safetensors
    adapterhub find ./sql
    adapterhub find --sha256 5f2c1a…""",
)
@click.argument("files", metavar="FILE…", nargs=-1)
@click.option(
    "--sha256", "digests", metavar="HEX", multiple=True, help="Digest of a file, version or tensor, or 6 digits or more."
)
@click.pass_obj
def find(settings: Settings, *, files: Sequence[str], digests: Sequence[str]) -> int:
    """Find the versions that contain a file, by the digest of its bytes; for a folder, the version it is.

    A folder that is not a version as a whole is searched by its weights. For weights that no version contains as a whole, the
    20 versions that share most of their tensors are shown: bytes are compared, whatever the tensors are called. Exits 3 unless
    each was found, as a whole or with all its tensors in one version.
    """
    from adapterhub.index import tensors
    from adapterhub.index.search import parse_digest_prefix
    from adapterhub.registry import finding

    if not files and not digests:
        raise UsageError("find", "needs a FILE or --sha256", "Name one")
    with open_registry(settings) as registry:
        found = [finding.by_digest(registry, text, parse_digest_prefix(text), bytes_bar) for text in digests]
        found += [finding.by_content(registry, text, existing(text), bytes_bar) for text in files]
        deprecated = registry.deprecations()
        unlisted = len(tensors.unlisted(registry.index))
    missing = [item for item in found if not item.is_whole]
    if unlisted and missing:
        files = output.plural(unlisted, "file")
        output.say(f"not searched: the tensors of {files}, missing or damaged; `adapterhub fsck` shows which")
    if not any(item.holders or item.shares for item in found):
        raise NotFoundError(
            found[0].source, "no version contains it" if len(found) == 1 else "no version contains it or the others"
        )
    document = {"found": [_document(item, deprecated) for item in found]}
    output.emit(document, as_json=settings.as_json, text=lambda: _find_text(found))
    return NotFoundError.exit_code if missing else 0


def _document(found: Found, deprecated: _Deprecated) -> dict[str, Any]:
    tensors = None
    if not found.holders and found.tensors:
        tensors = {
            "count": found.tensors,
            "size": found.size,
            "holders": [_share(share, deprecated) for share in found.shares],
        }
    return {
        "source": found.source,
        "holders": [_holder(holder, deprecated) for holder in found.holders],
        "tensors": tensors,
    }


def _holder(holder: Holder, deprecated: _Deprecated) -> dict[str, Any]:
    row = row_document(holder.row, deprecated)
    where = {"path": holder.path or None, "tensor": holder.tensor or None, "digest": holder.digest}
    return {"ref": row["ref"], "tags": row["tags"], **where, "adapter": row}


def _share(share: Share, deprecated: _Deprecated) -> dict[str, Any]:
    row = row_document(share.row, deprecated)
    where = {"path": share.path, "digest": share.digest, "count": share.count, "size": share.size}
    return {"ref": row["ref"], "tags": row["tags"], **where, "adapter": row}


def _find_text(found: Sequence[Found]) -> None:
    columns = [Column("REF"), Column("TAGS", drop=2), Column("FILE", drop=1)]
    if any(item.shares for item in found):
        columns.append(Column("TENSORS"))
    several = len(found) > 1
    if several:
        columns.insert(0, Column("SOURCE"))
    cells = []
    for item in found:
        for row, what, held in _held(item):
            cells.append([*([item.source] if several else []), str(row.ref), ", ".join(row.tags) or "-", what, held])
    output.write_table(columns, [row[: len(columns)] for row in cells])
    for item in found:
        if not item.holders:
            rest = " as a whole" if item.shares else ""
            output.say(output.one_line(f"{item.source}: no version contains it{rest}"))


def _held(found: Found) -> list[tuple[Any, str, str]]:
    """For each version that has it: the version, where, and how much."""
    whole = [
        (held.row, ": ".join(filter(None, (held.path, held.tensor))) or "(the whole adapter)", "all") for held in found.holders
    ]
    return whole + [(share.row, share.path, f"{share.count} of {found.tensors}") for share in found.shares]
