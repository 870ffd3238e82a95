"""Prefixes and names of modules in trainers' files of image models, translated to the base's, and vice versa.

A name without its dots is resolved by the base's own modules, else by the closed tables; it is refused if two readings differ.
The table to write with is determined by the modules, the source's header or the base, never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Adapter, Delta
from adapterhub_converters.bases.canonical_names import PIPELINE_PARTS
from adapterhub_converters.errors import NotUnderstoodError, RefusedError, refused_error
from adapterhub_converters.formats import pipeline

from . import family_tables, image_transformers, joined_modules, preserved_header
from .name_table import Reading, Table

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# Prefix to the model; "" for the one that is not a text encoder. The first that fits counts.
_PREFIXES = {
    "diffusion_model.llm_adapter.": "text_conditioner", "lora_unet_llm_adapter_": "text_conditioner",
    "text_embedding_projection.": "connectors",
    "lora_unet_": "", "lora_transformer_": "", "diffusion_model.": "", "lycoris_": "", "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}  # fmt: skip
# Prefixes of a transformer's modules in some trainers' files: diffusers' name of the model, DiffSynth-Studio's, Ideogram's.
_PIPELINE = ("transformer.", "pipe.dit.", "dit.", "model.diffusion_model.", "conditional_transformer.")
_BEGINNINGS = (*_PREFIXES, *_PIPELINE, *(f"{first}." for first in sorted(family_tables.FOREIGN_FIRST)))
TRAINERS = tuple(prefix for prefix in _PREFIXES if prefix.endswith("_"))
"""Prefixes that only trainers of adapters write, even for kinds that are not supported."""
# Keys with sd-scripts' and musubi's name of the model; and models that share the names of other families but are not supported.
_MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version")
_SEVERAL_BLOCKS = safe_regex.Pattern(r"\.transformer_blocks\.[1-9]")
_UNSUPPORTED_MODELS = safe_regex.Pattern(r"hidream[-_]?o1")

Outlines = Mapping[str, tuple[int, int] | None]
"""Module to the rows and columns of its weight; None if they do not follow from its factors."""


def may_be_trainer_name(name: str) -> bool:
    """Return whether a tensor's name begins like those in modules for which `is_trainer_name` is true. A cheap first test."""
    return name.startswith(_BEGINNINGS)


def is_trainer_name(stem: str) -> bool:
    """Return whether a module has a name of kohya, LyCORIS, ComfyUI, XLabs or DiffSynth-Studio."""
    return bool(stem.startswith(tuple(_PREFIXES)) or _bare_name(stem))


def header(outlines: Outlines, recorded: Mapping[str, str], table: Table | None) -> dict[str, str]:
    """Return the header's record of the `table`, unless it follows from the names and the `recorded` header."""
    inner = {stem: _prefix(stem, "")[1] for stem in outlines if not _prefix(stem, "")[0]}
    if not inner or table is None:
        return {}
    try:
        _, chosen = _read_model(inner, outlines, recorded, {}, "")
    except RefusedError:
        chosen = None
    return {} if chosen is table else {preserved_header.NAMES_KEY: table.name}


def _tables_of(metadata: Mapping[str, str]) -> tuple[Table, ...] | None:
    """Return the tables that a header names; None if it names no known one."""
    if named_tables := tuple(table for table in family_tables.TABLES if table.name == metadata.get(preserved_header.NAMES_KEY)):
        return named_tables
    text = " ".join(metadata.get(key, "") for key in _MODEL_KEYS).lower()
    if _UNSUPPORTED_MODELS.search(text):
        return ()
    tables_found = tuple(
        table for table in family_tables.TABLES if table.headers and safe_regex.Pattern(table.headers).search(text)
    )
    # SDXL's modules have the names of its checkpoint, or diffusers'.
    return ((family_tables.SD, *tables_found) if family_tables.SDXL in tables_found else tables_found) or None


def targets(
    outlines: Outlines, metadata: Mapping[str, str], base: BaseSpec | None, location: str
) -> tuple[dict[str, Reading], str]:
    """Return each module of the file under the base's names, and the name of the table that was used, if any.

    The base's names begin with the model.
    """
    part_and_path = {stem: _prefix(stem, location) for stem in outlines}
    modules = {part: _Modules(module_names) for part, module_names in pipeline.modules_of(base).items()}
    inner = {stem: path for stem, (part, path) in part_and_path.items() if not part}
    readings, chosen = _read_model(inner, outlines, metadata, modules, location)
    for stem, (part, path) in part_and_path.items():
        if part:
            encoder = _third_encoder(stem, chosen, metadata, modules, location) if part == "text_encoder_3" else part
            readings[stem] = _text_reading(stem, encoder, path, modules.get(encoder), location)
    return readings, chosen.name if chosen else ""


def _third_encoder(
    stem: str, chosen: Table | None, metadata: Mapping[str, str], base: Mapping[str, _Modules], location: str
) -> str:
    """Return the model that `lora_te3_` denotes: sd-scripts numbers the second of FLUX.1's two encoders as the third."""
    families = {chosen} if chosen else set(_tables_of(metadata) or ())
    if families & {image_transformers.FLUX, image_transformers.XLABS}:
        return "text_encoder_2"
    if image_transformers.SD3 in families or "text_encoder_3" in base or stem.startswith("text_encoders."):
        return "text_encoder_3"
    if "text_encoder_2" in base:
        return "text_encoder_2"
    reason = f"{stem!r} may be in FLUX.1's second text encoder or in Stable Diffusion 3's third"
    raise RefusedError(location, reason, "Name the pipeline's folder as its base", code="base-required")


def _prefix(stem: str, location: str) -> tuple[str, str]:
    """Return the text encoder that a module is in, empty for other models, and the module's name there."""
    for prefix, part in _PREFIXES.items():
        if stem.startswith(prefix):
            return part, stem.removeprefix(prefix)
    # Modules outside of blocks have names that would not, by themselves, identify the file as a trainer's.
    if any(table.read(stem) for table in family_tables.TRANSFORMERS if not table.prefixed):
        return "", stem
    if bare_name := _bare_name(stem):
        return "", bare_name
    raise RefusedError(location, f"{stem!r}: its name does not begin with a model", f"Known: {', '.join(_PREFIXES)}")


def _bare_name(stem: str) -> str:
    """Return the name of a module in a transformer that has none of the prefixes; empty for any other.

    Only names that neither models of diffusers nor language models have: those that a table renames.
    """
    name = next((stem.removeprefix(prefix) for prefix in _PIPELINE if stem.startswith(prefix)), stem)
    return name if "." in name and family_tables.is_foreign(name) else ""


class _Modules:
    """The modules of one model of a base, by their names with and without dots."""

    def __init__(self, listed: set[str]) -> None:
        self.listed = listed
        self._flat: dict[str, list[str]] = {}
        for name in sorted(listed):
            self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def find(self, stem: str, path: str, location: str) -> Reading | None:
        """Return the module with this name, in which dots may be underscores.

        Returns:
            The reading; None if there is no such module.

        Raises:
            RefusedError: There are two.
        """
        candidates = self._flat.get(path.replace(".", "_"), [])
        if len(candidates) > 1:
            raise RefusedError(location, f"{stem!r} may be {candidates[0]} or {candidates[1]} of the base")
        return Reading((candidates[0],)) if candidates else None


def _text_reading(stem: str, part: str, path: str, modules: _Modules | None, location: str) -> Reading:
    # transformers 5 saves CLIP's text encoder without the `text_model.` of its checkpoints.
    short = path.removeprefix("text_model_")
    base_reading = (modules.find(stem, path, location) or modules.find(stem, short, location)) if modules else None
    reading = base_reading or family_tables.TEXT.read(path)
    if reading is None:
        problem = f"{stem!r}: not a known module of a text encoder"
        raise RefusedError(location, problem, "Name its base model", code="base-required")
    return Reading((f"{part}.{reading.targets[0]}",))


def _read_model(
    stems: Mapping[str, str],
    outlines: Outlines,
    metadata: Mapping[str, str],
    base: Mapping[str, _Modules],
    location: str,
) -> tuple[dict[str, Reading], Table | None]:
    """Return the modules of the one model that is not a text encoder, under the base's names, and the table used."""
    if not stems:
        return {}, None
    models = {part: modules for part, modules in base.items() if not pipeline.is_text(part)}
    if len(models) == 1:
        ((part, modules),) = models.items()
        return _read_by_base(stems, part, modules, location)
    # Without a base, names are compared with every table; a header only narrows the choice.
    recorded = _tables_of(metadata)
    fits = [table for table in family_tables.TABLES if all(table.read(path) for path in stems.values())]
    if recorded is not None and fits:
        fits = [table for table in fits if table in recorded]
    if not fits:
        raise _unknown_error(stems, location)
    choices = _choices(fits, stems)
    # Several families fit and mean different modules: their shapes may tell them apart.
    if any(choice != choices[fits[0]] for choice in choices.values()):
        choices = _matching_sizes(choices, outlines) or choices
    first = next(iter(choices))
    rival = next((table for table, choice in choices.items() if choice != choices[first]), None)
    if rival:
        reason = f"its names match {first.name} and {rival.name}, whose modules differ"
        raise RefusedError(location, reason, "Name its base model", code="base-required")
    chosen = _by_prefix(choices, stems) or first
    return choices[chosen], chosen


def _unknown_error(stems: Mapping[str, str], location: str) -> RefusedError:
    """Return an error that names the first module that is in no table, or two modules that no table has together."""
    hint = "Name its base model"
    homes = {stem: [table for table in family_tables.TABLES if table.read(path)] for stem, path in stems.items()}
    first = next((stem for stem, tables_of_stem in homes.items() if not tables_of_stem), next(iter(stems)))
    rival = next(
        (stem for stem, tables_of_stem in homes.items() if tables_of_stem and not set(tables_of_stem) & set(homes[first])), None
    )
    if homes[first] and rival:
        reason = (
            f"{first!r} is a module of {homes[first][0].name} and {rival!r} of {homes[rival][0].name}, but no model has both"
        )
        return RefusedError(location, reason, hint, code="base-required")
    known_families = ", ".join(family_tables.families())
    problem = f"{first!r}: not a known module of an image model ({known_families})"
    return NotUnderstoodError(location, problem, hint, code="base-required")


def _choices(fits: Iterable[Table], stems: Mapping[str, str]) -> dict[Table, dict[str, Reading]]:
    return {
        table: {stem: reading.with_prefix(f"{table.part}.") for stem, path in stems.items() if (reading := table.read(path))}
        for table in fits
    }


def _matching_sizes(choices: Mapping[Table, dict[str, Reading]], outlines: Outlines) -> dict[Table, dict[str, Reading]]:
    """Return `choices` without the families whose modules have another ratio of rows to columns."""
    return {
        table: choice
        for table, choice in choices.items()
        if not any(reading.excludes(outlines[stem]) for stem, reading in choice.items())
    }


def _read_by_base(
    stems: Mapping[str, str], part: str, modules: _Modules, location: str
) -> tuple[dict[str, Reading], Table | None]:
    readings_by_stem: dict[str, Reading] = {}
    used = {table for table in family_tables.TABLES if not table.shared}
    for stem, path in stems.items():
        read = {table: reading for table in family_tables.TABLES if (reading := table.read(path))}
        readings = {table: reading for table, reading in read.items() if modules.listed.issuperset(reading.targets)}
        base_reading = modules.find(stem, path, location)
        different = {reading for reading in (*readings.values(), base_reading) if reading}
        if len(different) != 1:
            problem = "matches no module of the base" if not different else f"matches {len(different)} modules of the base"
            raise RefusedError(location, f"{stem!r} {problem}", "" if different else "Was the adapter made for this base?")
        used &= set(readings)
        readings_by_stem[stem] = next(iter(readings.values()), different.pop()).with_prefix(f"{part}." if part else "")
    fits = [table for table in family_tables.TABLES if table in used]
    return readings_by_stem, _by_prefix(fits, stems)


def _by_prefix(fits: Iterable[Table], stems: Iterable[str]) -> Table | None:
    """Return the table that writes the prefix of the names, else the first."""
    fitting, names = [*fits], [*stems]
    return next((table for table in fitting if all(stem.startswith(table.prefix) for stem in names)), next(iter(fitting), None))


Groups = dict[str, tuple[dict[str, Delta], Reading]]
Places = dict[str, tuple[str, Reading]]


def group_deltas(adapter: Adapter, base: BaseSpec | None) -> tuple[Groups, Places, Table | None]:
    """Group deltas by the file's module that they are part of.

    Returns:
        The deltas and the reading of each module of the file; the module of each difference; the table of their names.
    """
    names = {target: target for target in adapter.deltas}
    names |= {name: module_of(name) for name in adapter.added}
    inner = [name for name in names.values() if not pipeline.is_text(pipeline.part_of(name))]
    table = _choose_table(inner, adapter, base)
    places = {changed: place for changed, name in names.items() if (place := _file_place(name, table, adapter))}
    if unnamed := [changed for changed in names if changed not in places]:
        raise refused_error("kohya", [f"{changed}: not a module that kohya is known to have a name for" for changed in unnamed])
    groups: Groups = {}
    for target, delta in adapter.deltas.items():
        stem, reading = places[target]
        groups.setdefault(stem, ({}, reading))[0][target] = delta
    return groups, {name: places[name] for name in adapter.added}, table


def module_of(name: str) -> str:
    """Return the module of a weight or bias; any other parameter is returned itself."""
    stem, _, kind = name.rpartition(".")
    return stem if kind in ("weight", "bias") else name


def _file_place(target: str, table: Table | None, adapter: Adapter) -> tuple[str, Reading] | None:
    """Return the file's name of the module that contains a target, and that module; None if there is none."""
    part = pipeline.part_of(target)
    path_in_model = target.removeprefix(f"{part}.")
    text = pipeline.is_text(part)
    target_table = family_tables.TEXT if text else table
    path_and_reading = (
        target_table.trainer_path(path_in_model) or family_tables.TEXT.trainer_path(f"text_model.{path_in_model}")
        if target_table
        else None
    )
    prefix = _encoder_prefix(part, table, adapter) if text else table.prefix if table else None
    if path_and_reading is None or prefix is None or part == "transformer_2":
        return None
    path, reading = path_and_reading
    return f"{prefix}{path if prefix.endswith('.') else path.replace('.', '_')}", reading.with_prefix(f"{part}.")


# The text encoders of each family; no known tool reads names for the encoders of other families.
_ENCODERS = {
    family_tables.SDXL: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    image_transformers.FLUX: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
    image_transformers.SD3: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"},
}


def _encoder_prefix(part: str, table: Table | None, adapter: Adapter) -> str | None:
    """Return the prefix of a text encoder's modules; None if no known tool reads them."""
    if not part.startswith("text_encoder"):
        return next(prefix for prefix, encoder in _PREFIXES.items() if encoder == part)
    if table in (family_tables.SD, None) and "text_encoder_2" not in adapter.meta.parts:
        return "lora_te_" if part == "text_encoder" else None
    return _ENCODERS.get(family_tables.SDXL if table is None else table, {}).get(part)


def _choose_table(targets: list[str], adapter: Adapter, base: BaseSpec | None) -> Table | None:
    """Return the table with the names that tools for this model read; None if there are no targets."""
    if not targets:
        return None
    paths = [target.partition(".")[2] for target in targets]
    part = pipeline.part_of(targets[0])
    fits = [
        table for table in family_tables.TABLES if table.writes and table.part == part and all(map(table.trainer_path, paths))
    ]
    if not fits:
        written = [table.trainer_path for table in family_tables.TABLES if table.part == part]
        unknown = [target for target, path in zip(targets, paths, strict=True) if not any(find(path) for find in written)]
        raise refused_error(
            "kohya", [f"{target}: not a module that kohya is known to have a name for" for target in unknown or targets]
        )
    recorded_name = preserved_header.entries(adapter).get(preserved_header.NAMES_KEY)
    if by_name := next((table for table in fits if table.name == recorded_name), _table_of_class(fits, base)):
        return by_name
    if base and "Transformer" in base.architecture and not _table_of_class(family_tables.TABLES, base):
        raise refused_error(
            "kohya",
            [f"{target}: the names in kohya of {base.architecture}'s modules are not known" for target in targets],
            code="unsupported-architecture",
        )
    preferred = [table for table in fits if not table.variant] or [table for table in fits if table.classes] or fits
    if len(preferred) == 1 and not preferred[0].shared:
        return preferred[0]
    family = _choose_family(paths, adapter, base)
    if family in preferred:
        return family
    candidates = " and ".join("Qwen-Image" if table is image_transformers.TRANSFORMER else table.name for table in preferred)
    problem = f"its modules may be those of {candidates} or of another model, which have different names in kohya"
    raise RefusedError("kohya", problem, "Name the folder of the model or pipeline as its base", code="base-required")


def _choose_family(paths: Iterable[str], adapter: Adapter, base: BaseSpec | None) -> Table | None:
    """Return the table of the model, by the base, the source's header or the modules; None if they do not determine it."""
    if by_class := _table_of_class(family_tables.TABLES, base):
        return by_class
    header_tables = _tables_of(preserved_header.source_header(adapter, "kohya")) or ()
    if header_tables:
        return family_tables.SDXL if family_tables.SDXL in header_tables else header_tables[0]
    if any(".img_m" in path or ".txt_m" in path for path in paths):
        return image_transformers.TRANSFORMER
    modules = {module for module_names in pipeline.modules_of(base).values() for module in module_names}
    if _is_sdxl(paths) or "text_encoder_2" in adapter.meta.parts or _is_sdxl(modules):
        return family_tables.SDXL
    return family_tables.SD if modules or any(path.startswith(("down_blocks.3.", "up_blocks.3.")) for path in paths) else None


def _table_of_class(candidates: Iterable[Table], base: BaseSpec | None) -> Table | None:
    """Return the table of the base's class in diffusers; None if it is not known."""
    name = base.architecture if base else ""
    return next((table for table in candidates if table.classes and safe_regex.Pattern(table.classes).match(name)), None)


def _is_sdxl(paths: Iterable[str]) -> bool:
    """Return whether modules are SDXL's, which alone embeds sizes and has transformers of several blocks."""
    return any("add_embedding." in path or _SEVERAL_BLOCKS.search(path) for path in paths)


# ---- Models of a pipeline


def is_image_module(target: str) -> bool:
    """Return whether a target, without the model of its pipeline, is a module in a table of image models."""
    return any(table.part and table.trainer_path(target) for table in family_tables.TABLES)


def fit_to_base(adapter: Adapter, base: BaseSpec | None, location: str) -> Adapter:
    """Return the adapter under the names of `base`: targets begin with the model for a pipeline, but not for a single model."""
    if base is not None and pipeline.is_pipeline(base):
        return with_model_prefix(adapter, base, location)
    part = pipeline.part_of_base(base)
    if not part or base is None or not adapter.meta.parts:
        return adapter
    if other_models := sorted({model for model in adapter.meta.parts if model != part}):
        problem = f"it acts on {' and '.join(sorted(adapter.meta.parts))}, but the base is a {base.architecture}"
        hint = "Name the pipeline's folder, which has a model_index.json" if part in adapter.meta.parts else ""
        raise RefusedError(location, problem, hint or f"Name the {other_models[0]} as the base")
    return pipeline.without_part(adapter, part)


def in_diffusers_names(adapter: Adapter, location: str) -> Adapter:
    """Return an adapter that peft trained on the makers' own model under diffusers' names; any other unchanged."""
    if adapter.meta.parts or not any(map(family_tables.is_foreign, adapter.deltas)):
        return adapter
    outlines = {target: (delta.shape[0], delta.shape[1]) for target, delta in adapter.deltas.items()}
    readings, table = _read_model(
        {target: target for target in outlines}, outlines, preserved_header.entries(adapter), {}, location
    )
    deltas: dict[str, Delta] = {}
    for target, delta in adapter.deltas.items():
        deltas |= joined_modules.split_delta(target, delta, readings[target], location)
    meta = dataclasses.replace(adapter.meta, parts=(table.part,) if table else (), header=preserved_header.entries(adapter))
    return dataclasses.replace(adapter, deltas=deltas, meta=meta, source=None)


def with_model_prefix(adapter: Adapter, base: BaseSpec | None, location: str) -> Adapter:
    """Return the adapter with targets that begin with the model.

    The model is the one in its header, else the base, else the one that has such modules.
    """
    if adapter.meta.parts:
        return adapter
    header = adapter.source.metadata if adapter.source else adapter.meta.header
    recorded = header.get(pipeline.PART_KEY, "")
    part = recorded if recorded in PIPELINE_PARTS else pipeline.part_of_base(base) or _part_by_modules(adapter.deltas, location)
    meta = dataclasses.replace(adapter.meta, parts=(part,), header=preserved_header.entries(adapter))
    return pipeline.rename_targets(adapter, lambda name: f"{part}.{name}", meta)


def _part_by_modules(targets: Iterable[str], location: str) -> str:
    parts: set[str] = set()
    for target in targets:
        candidates = {table.part for table in family_tables.TABLES if table.part and table.trainer_path(target)}
        if family_tables.TEXT.trainer_path(target):
            problem = f"{target} may be in any text encoder of a pipeline"
            raise RefusedError(location, problem, "Name the folder of the model as its base", code="base-required")
        if len(candidates) != 1:
            problem = f"{target}: not a known module of an image model"
            raise RefusedError(location, problem, "Name the folder of the model as its base", code="base-required")
        parts |= candidates
    if len(parts) > 1:
        problem = f"it has modules of {' and '.join(sorted(parts))}"
        raise RefusedError(location, problem, "Name the folder of the model as its base", code="base-required")
    return parts.pop() if parts else "unet"
