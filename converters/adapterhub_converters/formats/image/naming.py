"""What a module of a kohya file is in the base's names, and the other way round.

A name without its dots is read by the base's own modules, else by the closed tables; two readings that differ are one
too many. Which table's names are written is settled by the modules, the source's header or the base, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from adapterhub_converters.adapter import Adapter, Delta
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError, refused

from . import families, pipeline, tables
from .table import Reading, Table

# Prefix to the model; "" for the one that is no text encoder.
_PREFIXES = {
    "lora_unet_": "", "lora_transformer_": "", "diffusion_model.": "", "lycoris_": "", "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}  # fmt: skip
TRAINERS = tuple(prefix for prefix in _PREFIXES if prefix.endswith("_"))
"""What names begin with that no model has, but trainers of adapters write, of kinds that aren't read too."""
# Of FLUX.1, HunyuanVideo and Stable Diffusion 3, as some trainers save them: without a model, or with diffusers' word for it.
_BARE = re.compile(r"(?:transformer\.)?(?=(?:double|single|joint)_blocks\.\d+\.)")
# sd-scripts' and musubi's word for a model is in these; of some the names are those of others, and not known.
_SAID_IN = ("modelspec.architecture", "ss_base_model_version")
_UNREAD = re.compile(r"hunyuan[-_]?image|hunyuan[-_]video[-_]1[-._]5|flux[._-]?3")

Outlines = Mapping[str, tuple[int, int] | None]
"""How many rows and columns the weight of each module has, where its factors say it."""


def is_ours(name: str) -> bool:
    """Whether a tensor is called as kohya, LyCORIS, ComfyUI or XLabs call it."""
    return bool(name.startswith(tuple(_PREFIXES)) or _BARE.match(name))


def header(outlines: Outlines, known: Mapping[str, str], table: Table | None) -> dict[str, str]:
    """What a file has to say of its names where they and its header `known` leave open that they are `table`'s."""
    inner = {stem: _prefix(stem, "")[1] for stem in outlines if not _prefix(stem, "")[0]}
    if not inner or table is None:
        return {}
    try:
        _, chosen = _inner(inner, outlines, known, {}, "")
    except RefusedError:
        chosen = None
    return {} if chosen is table else {pipeline.NAMES_KEY: table.name}


def _tables_of(metadata: Mapping[str, str]) -> tuple[Table, ...] | None:
    """The tables that a header says are a file's; None where it says nothing that is known."""
    if own := tuple(table for table in tables.TABLES if table.name == metadata.get(pipeline.NAMES_KEY)):
        return own
    text = " ".join(metadata.get(key, "") for key in _SAID_IN).lower()
    if _UNREAD.search(text):
        return ()
    said = tuple(table for table in tables.TABLES if table.said and re.search(table.said, text))
    # SDXL's modules go by the names of its checkpoint, or by diffusers'.
    return ((tables.SD, *said) if tables.SDXL in said else said) or None


def targets(
    outlines: Outlines, metadata: Mapping[str, str], base: BaseSpec | None, where: str
) -> tuple[dict[str, Reading], str]:
    """What each module of the file is in the base's names, the model first; and by whose names it goes."""
    split = {stem: _prefix(stem, where) for stem in outlines}
    modules = {part: _Modules(listed) for part, listed in pipeline.modules_of(base).items()}
    inner = {stem: rest for stem, (part, rest) in split.items() if not part}
    found, chosen = _inner(inner, outlines, metadata, modules, where)
    for stem, (part, rest) in split.items():
        if part:
            own = _third(stem, chosen, metadata, modules, where) if part == "text_encoder_3" else part
            found[stem] = _text(stem, own, rest, modules.get(own), where)
    return found, chosen.name if chosen else ""


def _third(stem: str, chosen: Table | None, metadata: Mapping[str, str], base: Mapping[str, _Modules], where: str) -> str:
    """Which encoder the third is: FLUX.1 has two, of which sd-scripts numbers the second as the third."""
    said = {chosen} if chosen else set(_tables_of(metadata) or ())
    if said & {families.FLUX, families.XLABS}:
        return "text_encoder_2"
    if families.SD3 in said or "text_encoder_3" in base or stem.startswith("text_encoders."):
        return "text_encoder_3"
    if "text_encoder_2" in base:
        return "text_encoder_2"
    reason = f"{stem!r}: the second text encoder of FLUX.1 and the third of Stable Diffusion 3 go by this name"
    raise RefusedError(where, reason, "Name the base model, the pipeline's folder", code="base-required")


def _prefix(stem: str, where: str) -> tuple[str, str]:
    """The text encoder that a module is in, or none, and its name there."""
    for prefix, part in _PREFIXES.items():
        if stem.startswith(prefix):
            return part, stem.removeprefix(prefix)
    if _BARE.match(stem):
        return "", _BARE.sub("", stem, count=1)
    raise RefusedError(where, f"{stem!r}: nothing says which model it is in", f"Known: {', '.join(_PREFIXES)}")


class _Modules:
    """The modules of one model of a base, by their names and by those without dots."""

    def __init__(self, listed: set[str]) -> None:
        self.listed = listed
        self._flat: dict[str, list[str]] = {}
        for name in sorted(listed):
            self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def named(self, stem: str, rest: str, where: str) -> Reading | None:
        """The one that has this name, its dots perhaps underscores; RefusedError for two."""
        found = self._flat.get(rest.replace(".", "_"), [])
        if len(found) > 1:
            raise RefusedError(where, f"{stem!r} may be {found[0]} or {found[1]} of the base")
        return Reading((found[0],)) if found else None


def _text(stem: str, part: str, rest: str, modules: _Modules | None, where: str) -> Reading:
    # transformers 5 saves CLIP's text encoder without the `text_model.` of its checkpoints.
    short = rest.removeprefix("text_model_")
    listed = (modules.named(stem, rest, where) or modules.named(stem, short, where)) if modules else None
    reading = listed or tables.TEXT.read(rest)
    if reading is None:
        raise RefusedError(
            where, f"{stem!r}: no module of a text encoder that is known", "Name the base model", code="base-required"
        )
    return Reading((f"{part}.{reading.targets[0]}",))


def _inner(
    stems: Mapping[str, str],
    outlines: Outlines,
    metadata: Mapping[str, str],
    base: Mapping[str, _Modules],
    where: str,
) -> tuple[dict[str, Reading], Table | None]:
    """What the modules of the model that is no text encoder are, and by whose names."""
    if not stems:
        return {}, None
    models = {part: modules for part, modules in base.items() if not part.startswith("text_encoder")}
    if len(models) == 1:
        ((part, modules),) = models.items()
        return _by_base(stems, part, modules, where)
    said = _tables_of(metadata)
    fits = [table for table in tables.TABLES if all(table.read(rest) for rest in stems.values())]
    if said is not None and fits:
        fits = [table for table in fits if table in said]
    if not fits:
        raise _unknown(stems, where)
    choices = _choices(fits, stems)
    if any(choice != choices[fits[0]] for choice in choices.values()):
        choices = _of_these_sizes(choices, outlines) or choices
    first = next(iter(choices))
    other = next((table for table, choice in choices.items() if choice != choices[first]), None)
    if other:
        reason = f"its names fit {first.name} and {other.name}, whose modules differ"
        raise RefusedError(where, reason, "Name the base model", code="base-required")
    chosen = _by_prefix(choices, stems) or first
    return choices[chosen], chosen


def _unknown(stems: Mapping[str, str], where: str) -> RefusedError:
    """The first module that no table has, or two that no table has together."""
    hint = "Name the base model"
    homes = {stem: [table for table in tables.TABLES if table.read(rest)] for stem, rest in stems.items()}
    first = next((stem for stem, several in homes.items() if not several), next(iter(stems)))
    other = next((stem for stem, several in homes.items() if several and not set(several) & set(homes[first])), None)
    if homes[first] and other:
        reason = f"{first!r} is known of {homes[first][0].name} and {other!r} of {homes[other][0].name}, and of no model both"
        return RefusedError(where, reason, hint, code="base-required")
    known = ", ".join(table.name for table in tables.TABLES if not table.variant)
    reason = f"{first!r}: no module that is known of an image model ({known})"
    return RefusedError(where, reason, hint, code="base-required")


def _choices(fits: Iterable[Table], stems: Mapping[str, str]) -> dict[Table, dict[str, Reading]]:
    return {
        table: {stem: reading.of(f"{table.part}.") for stem, rest in stems.items() if (reading := table.read(rest))}
        for table in fits
    }


def _of_these_sizes(choices: Mapping[Table, dict[str, Reading]], outlines: Outlines) -> dict[Table, dict[str, Reading]]:
    """Without the families whose modules have another ratio of rows to columns."""
    return {
        table: choice
        for table, choice in choices.items()
        if not any(reading.excludes(outlines[stem]) for stem, reading in choice.items())
    }


def _by_base(stems: Mapping[str, str], part: str, modules: _Modules, where: str) -> tuple[dict[str, Reading], Table | None]:
    found: dict[str, Reading] = {}
    used = {table for table in tables.TABLES if not table.shared}
    for stem, rest in stems.items():
        read = {table: reading for table in tables.TABLES if (reading := table.read(rest))}
        readings = {table: reading for table, reading in read.items() if modules.listed.issuperset(reading.targets)}
        own = modules.named(stem, rest, where)
        different = {reading for reading in (*readings.values(), own) if reading}
        if len(different) != 1:
            what = "names no module of the base" if not different else f"names {len(different)} modules of the base"
            raise RefusedError(where, f"{stem!r} {what}", "" if different else "Is it the base that the adapter was made for?")
        used &= set(readings)
        found[stem] = next(iter(readings.values()), different.pop()).of(f"{part}." if part else "")
    fits = [table for table in tables.TABLES if table in used]
    return found, _by_prefix(fits, stems)


def _by_prefix(fits: Iterable[Table], stems: Iterable[str]) -> Table | None:
    """The one that writes what the names begin with, else the first."""
    listed, names = [*fits], [*stems]
    return next((table for table in listed if all(stem.startswith(table.prefix) for stem in names)), next(iter(listed), None))


Groups = dict[str, tuple[dict[str, Delta], Reading]]


def groups(adapter: Adapter, base: BaseSpec | None) -> tuple[Groups, Table | None]:
    """The deltas by the module they are in there, and by whose names that goes."""
    inner = [target for target in adapter.deltas if not pipeline.part_of(target).startswith("text_encoder")]
    table = _table(inner, adapter, base)
    found_groups: Groups = {}
    failed: list[str] = []
    for target, delta in adapter.deltas.items():
        part = pipeline.part_of(target)
        rest = target.removeprefix(f"{part}.")
        text = part.startswith("text_encoder")
        own = tables.TEXT if text else table
        found = own.written(rest) or tables.TEXT.written(f"text_model.{rest}") if own else None
        prefix = _te_prefix(part, table, adapter) if text else table.prefix if table else None
        if found is None or prefix is None or part == "transformer_2":
            failed.append(f"{target}: kohya has no name for it that is known")
            continue
        path, reading = found
        stem = f"{prefix}{path if prefix.endswith('.') else path.replace('.', '_')}"
        found_groups.setdefault(stem, ({}, reading.of(f"{part}.")))[0][target] = delta
    if failed:
        raise refused("kohya", failed)
    return found_groups, table


# Of each family its text encoders; those of the others have no names that a tool is known to read.
_ENCODERS = {
    tables.SDXL: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    families.FLUX: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
    families.SD3: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"},
}


def _te_prefix(part: str, table: Table | None, adapter: Adapter) -> str | None:
    """How the modules of a text encoder begin; None where no tool is known to read them."""
    if table in (tables.SD, None) and "text_encoder_2" not in adapter.meta.parts:
        return "lora_te_" if part == "text_encoder" else None
    return _ENCODERS.get(tables.SDXL if table is None else table, {}).get(part)


def _table(targets: list[str], adapter: Adapter, base: BaseSpec | None) -> Table | None:
    """By whose names the tools for this model know its modules."""
    if not targets:
        return None
    bare = [target.partition(".")[2] for target in targets]
    part = pipeline.part_of(targets[0])
    fits = [table for table in tables.TABLES if table.writes and table.part == part and all(map(table.written, bare))]
    if not fits:
        written = [table.written for table in tables.TABLES if table.part == part]
        unknown = [target for target, rest in zip(targets, bare, strict=True) if not any(find(rest) for find in written)]
        raise refused("kohya", [f"{target}: kohya has no name for it that is known" for target in unknown or targets])
    own = pipeline.own_header(adapter).get(pipeline.NAMES_KEY)
    if named := next((table for table in fits if table.name == own), None):
        return named
    usual = [table for table in fits if not table.variant]
    if len(usual) == 1 and not usual[0].shared:
        return usual[0]
    said = _said(bare, adapter, base)
    if said in usual:
        return said
    known = " and ".join("Qwen-Image" if table is families.TRANSFORMER else table.name for table in usual)
    reason = f"its modules may be those of {known} or of another, which kohya calls otherwise"
    raise RefusedError("kohya", reason, "Name the base model", code="base-required")


def _said(bare: Iterable[str], adapter: Adapter, base: BaseSpec | None) -> Table | None:
    """What the base, the source's header or the modules say of the model."""
    name = base.architecture if base else ""
    if own := next((table for table in tables.TABLES if table.classes and re.match(table.classes, name)), None):
        return own
    named = _tables_of(pipeline.header_again(adapter, "kohya")) or ()
    if named:
        return tables.SDXL if tables.SDXL in named else named[0]
    if any(".img_m" in path or ".txt_m" in path for path in bare):
        return families.TRANSFORMER
    modules = {module for listed in pipeline.modules_of(base).values() for module in listed}
    if _is_sdxl(bare) or "text_encoder_2" in adapter.meta.parts or _is_sdxl(modules):
        return tables.SDXL
    return tables.SD if modules or any(re.match(r"(?:down|up)_blocks\.3\.", path) for path in bare) else None


def _is_sdxl(paths: Iterable[str]) -> bool:
    """SDXL alone embeds sizes and has transformers of several blocks."""
    return any("add_embedding." in path or re.search(r"\.transformer_blocks\.[1-9]", path) for path in paths)
