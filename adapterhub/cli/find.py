"""`adapterhub find`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub_converters.errors import NotFoundError, UsageError

from . import output
from .app import Settings, command
from .locate import open_registry
from .output import Column
from .registry import row_document

if TYPE_CHECKING:
    from adapterhub.registry import Registry
    from adapterhub.search import Holder


@command(
    "find",
    short="Find the version that holds a file.",
    example="""
    adapterhub find adapter_model.safetensors
    adapterhub find ./sql
    adapterhub find --sha256 5f2c1a…""",
)
@click.argument("files", metavar="FILE…", nargs=-1)
@click.option(
    "--sha256", "digests", metavar="HEX", multiple=True, help="The digest of a file or of a version, or its first 6 digits."
)
@click.pass_obj
def find(settings: Settings, *, files: Sequence[str], digests: Sequence[str]) -> int:
    """Find which versions hold a file, by the digest of its bytes; of a folder, which version it is.

    A folder that is no version as a whole is looked for by its weights. Exits 3 unless each was found.
    """
    from adapterhub.search import holders, parse_digest_prefix

    if not files and not digests:
        raise UsageError("find", "no FILE and no --sha256", "Name one")
    with open_registry(settings) as registry:
        found = [(text, holders(registry.catalog, parse_digest_prefix(text))) for text in digests]
        found += [(text, _find(registry, text)) for text in files]
        deprecated = registry.deprecations()
    missing = [text for text, held in found if not held]
    if len(missing) == len(found):
        raise NotFoundError(missing[0], "no version holds it" if len(found) == 1 else "no version holds it, nor the others")
    document = {
        "found": [{"source": text, "holders": [_holder(holder, deprecated) for holder in held]} for text, held in found]
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _find_text(found))
    return NotFoundError.exit_code if missing else 0


def _find(registry: Registry, text: str) -> list[Holder]:
    from adapterhub import manifest
    from adapterhub.digest import sha256_file
    from adapterhub.folder import listing
    from adapterhub.search import holders

    from .sources import existing

    path = existing(text)
    if not path.is_dir():
        return holders(registry.catalog, sha256_file(path))
    whole = holders(registry.catalog, manifest.build(path).digest)
    weights = [name for name in listing(path).files if manifest.media_type(name) == manifest.WEIGHT_LAYER]
    return whole or [holder for name in weights for holder in holders(registry.catalog, sha256_file(path / name))]


def _holder(holder: Holder, deprecated: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    row = row_document(holder.row, deprecated)
    return {"ref": row["ref"], "tags": row["tags"], "path": holder.path or None, "digest": holder.digest, "adapter": row}


def _find_text(found: Sequence[tuple[str, Sequence[Holder]]]) -> None:
    several = len(found) > 1
    columns = (Column("SOURCE"), Column("REF"), Column("TAGS", drop=2), Column("FILE", drop=1))
    cells = [
        [source, str(holder.row.ref), ", ".join(holder.row.tags) or "-", holder.path or "(the whole adapter)"]
        for source, held in found
        for holder in held
    ]
    shown = columns if several else columns[1:]
    for line in output.table(shown, [row if several else row[1:] for row in cells], screen=output.width()):
        output.write(line)
    for source, held in found:
        if not held:
            output.say(output.one_line(f"{source}: no version holds it"))
