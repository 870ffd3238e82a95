"""The formats that can be read and written: `adapterhub convert --list`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub_converters.formats.round_trips import Row

# What `convert` or `push` can also write, besides formats of adapters.
_OTHER_FORMATS = {
    "hf": "a whole model as a Hugging Face folder: `convert BASE.gguf --to hf`",
    "image": "a container image with the adapter, in an OCI registry: `push SRC oci://… --to image`",
}
_SHOWN_ITEMS = 5
_MARKS = {"bytes": "=", "function": "~", "no": "-"}


def show_formats(*, as_json: bool, verbose: bool) -> None:
    """Print the formats that can be read and written, which of them need a base, and which round trips are exact.

    Both tables were measured with a tiny adapter. A format that another package adds is measured here. Long lists of models
    are shown as a whole if `verbose`, and always in JSON.
    """
    from adapterhub_converters import formats as table
    from adapterhub_converters.adapter import TUNERS
    from adapterhub_converters.architectures import architecture_lookup
    from adapterhub_converters.formats import format_probe, round_trips
    from adapterhub_converters.formats.image import family_tables
    from adapterhub_converters.formats.mlx import full_tuning

    rows, other_formats = round_trips.rows(), dict(_OTHER_FORMATS)
    for name in table.added_names():
        try:
            rows.append(format_probe.probe_added(table.find(name)))
        except AdapterhubError as error:
            other_formats[name] = error.what
    families = family_tables.families()
    models: list[dict[str, Any]] = [
        {
            "gguf": names_of_model.gguf,
            "classes": [*names_of_model.classes, *names_of_model.wrapped],
            "folders": names_of_model.folder,
            "merged_into": names_of_model.whole,
        }
        for names_of_model in architecture_lookup.ADAPTERS
    ]
    document = {
        "formats": [asdict(row) for row in rows],
        "others": [{"name": n, "what": description} for n, description in other_formats.items()],
        "image_models": families,
        "gguf_models": models,
        "tuners": [{"method": row.method, "merges": not row.unmerged} for row in TUNERS.values()],
        "mlx_full": sorted(full_tuning.SAME_PARAMETERS),
    }
    lines = {
        "image and video models in kohya and diffusers": families,
        "adapters to gguf, by the class of their base": sorted({name for model in models for name in model["classes"]}),
        "whole models from a folder to gguf": sorted(
            {names_of_model.gguf for names_of_model in architecture_lookup.ADAPTERS if names_of_model.folder}
        ),
        "peft's tuners that are not saved as low-rank pairs, merged into a base": [
            r.method for r in TUNERS.values() if not r.unmerged
        ],
        "those that no weight can express, described and checked": [r.method for r in TUNERS.values() if r.unmerged],
        "models that mlx-lm tuned as a whole (full), merged into a base": sorted(full_tuning.SAME_PARAMETERS),
    }
    output.emit(document, as_json=as_json, text=lambda: _text(rows, other_formats, lines, verbose=verbose))


def _text(rows: list[Row], other_formats: Mapping[str, str], lists: Mapping[str, list[str]], *, verbose: bool) -> None:
    columns = [output.Column(title) for title in ("FORMAT", "READ", "WRITTEN", "BASE")] + [output.Column("FILES", wrap=True)]
    cells = [
        [row.name, _word(yes=row.reads), _word(yes=row.writes), "to write it" if row.base else "", ", ".join(row.files)]
        for row in rows
    ]
    output.write_table(columns, cells)
    output.write()
    output.write_pairs(dict(other_formats))
    output.write()
    _write_round_trips([row for row in rows if row.writes])
    output.write_pairs({"=": "the same file, byte for byte", "~": "the same function, in other numbers", "-": "not possible"})
    output.write()
    for title, items in lists.items():
        surplus = 0 if verbose else len(items) - _SHOWN_ITEMS
        names = f"{', '.join(items[:_SHOWN_ITEMS])} and {surplus} more" if surplus > 1 else ", ".join(items)
        for line in output.wrap(f"{title}: {names}", output.width(), indent=2):
            output.write(line)
    if not verbose:
        output.say("--verbose lists all of them")


def _write_round_trips(rows: Sequence[Row]) -> None:
    """Print which round trips are exact, in as many blocks of columns as the terminal needs."""
    title, screen = "FROM \\ AND BACK", output.width()
    targets = [row.name for row in rows if any(row.name in other_row.back for other_row in rows)]
    while targets:
        block = list(targets)
        while screen is not None and len(block) > 1 and len("  ".join([title, *block])) > screen:
            block.pop()
        marks = [[row.name, *(_MARKS[row.back[name]] if name in row.back else "" for name in block)] for row in rows]
        output.write_lines(output.table([output.Column(text) for text in (title, *block)], marks))
        output.write()
        targets = targets[len(block) :]


def _word(*, yes: bool) -> str:
    return "yes" if yes else "no"
