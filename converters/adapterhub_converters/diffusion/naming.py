"""What a module of a kohya file is in the base's names, and the other way round.

A name without its dots is read by the base's own modules, else by the closed tables; two readings that differ are one
too many. Which table's names are written is settled by the modules, the source's header or the base, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from adapterhub_converters.adapter import Adapter, Delta
from adapterhub_converters.base import BaseSpec
from adapterhub_converters.errors import RefusedError, refused

from . import pipeline, tables
from .tables import Reading, Table

# Prefix to the model; "" for the one that is no text encoder.
_PREFIXES = {
    "lora_unet_": "", "lora_transformer_": "", "diffusion_model.": "", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3", "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2", "text_encoders.t5xxl.transformer.": "text_encoder_3",
}  # fmt: skip
_BARE = re.compile(r"(?:double|single)_blocks\.\d+\.")
_UNKNOWN = ("lycoris_",)
# sd-scripts' and musubi's word for a model (`ss_base_model_version`, `modelspec.architecture`) to the table of its names.
_SAID = (
    (re.compile(r"sdxl|stable-diffusion-xl"), (tables.SD, tables.SDXL)),
    (re.compile(r"sd_v[12]|stable-diffusion-v[12]"), (tables.SD,)),
    (re.compile(r"hunyuan|flux\.?2|flux[-_]2|sd3|stable-diffusion-3"), ()),
    (re.compile(r"flux\.?1|flux-1"), (tables.FLUX, tables.TRANSFORMER, tables.XLABS)),
    (re.compile(r"wan"), (tables.WAN,)),
    (re.compile(r"qwen"), (tables.TRANSFORMER,)),
)
_SAID_IN = ("modelspec.architecture", "ss_base_model_version")


def is_ours(name: str) -> bool:
    """Whether a tensor is called as kohya, LyCORIS, ComfyUI or XLabs call it."""
    return bool(name.startswith((*_PREFIXES, *_UNKNOWN)) or _BARE.match(name))


def header(stems: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """What a file has to say of its names where they and its header `known` leave open whose they are: FLUX.1's."""
    inner = [stem.removeprefix("lora_unet_") for stem in stems if stem.startswith("lora_unet_")]
    open_ = inner and all(tables.FLUX.read(stem) and tables.HUNYUAN.read(stem) for stem in inner)
    return {pipeline.NAMES_KEY: tables.FLUX.name} if open_ and _tables_of(known) is None else {}


def _tables_of(metadata: Mapping[str, str]) -> tuple[Table, ...] | None:
    """The tables that a header says are a file's; None where it says nothing that is known."""
    own = tuple(table for table in tables.TABLES if table.name == metadata.get(pipeline.NAMES_KEY))
    said = (tabled for key in _SAID_IN for word, tabled in _SAID if word.search(metadata.get(key, "").lower()))
    return own or next(said, None)


def targets(
    stems: Iterable[str], metadata: Mapping[str, str], base: BaseSpec | None, where: str
) -> tuple[dict[str, Reading], str]:
    """What each module of the file is in the base's names, the model first; and by whose names it goes."""
    split = {stem: _prefix(stem, where) for stem in stems}
    modules = {part: _Modules(listed) for part, listed in pipeline.modules_of(base).items()}
    inner = {stem: rest for stem, (part, rest) in split.items() if not part}
    found, chosen = _inner(inner, metadata, modules, where)
    for stem, (part, rest) in split.items():
        if part:
            # FLUX has two encoders, of which sd-scripts numbers the second as the third.
            own = "text_encoder_2" if part == "text_encoder_3" and chosen in (tables.FLUX, tables.XLABS) else part
            found[stem] = _text(stem, own, rest, modules.get(own), where)
    return found, chosen.name if chosen else ""


def _prefix(stem: str, where: str) -> tuple[str, str]:
    """The text encoder that a module is in, or none, and its name there."""
    for prefix, part in _PREFIXES.items():
        if stem.startswith(prefix):
            return part, stem.removeprefix(prefix)
    if _BARE.match(stem):
        return "", stem
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
            where, f"{stem!r}: no module of a text encoder that is known", "Give --base, whose modules settle it"
        )
    return Reading((f"{part}.{reading.targets[0]}",))


def _inner(
    stems: Mapping[str, str], metadata: Mapping[str, str], base: Mapping[str, _Modules], where: str
) -> tuple[dict[str, Reading], Table | None]:
    """What the modules of the model that is no text encoder are, and by whose names."""
    if not stems:
        return {}, None
    models = {part: modules for part, modules in base.items() if not part.startswith("text_encoder")}
    if len(models) == 1:
        ((part, modules),) = models.items()
        return _by_base(stems, part, modules, where)
    said = _tables_of(metadata)
    fits = {table.name: table for table in tables.TABLES if all(table.read(rest) for rest in stems.values())}
    if said is not None and fits:
        fits = {name: table for name, table in fits.items() if table in said}
    if not fits:
        stem = next((s for s, rest in stems.items() if not any(t.read(rest) for t in tables.TABLES)), next(iter(stems)))
        known = ", ".join(table.name for table in tables.TABLES if table.part)
        raise RefusedError(
            where, f"{stem!r}: no module that is known of an image model ({known})", "Give --base, whose modules settle it"
        )
    choices = {
        table.name: {stem: _in_part(table, reading) for stem, rest in stems.items() if (reading := table.read(rest))}
        for table in fits.values()
    }
    first = next(iter(choices))
    other = next((name for name, choice in choices.items() if choice != choices[first]), None)
    if other:
        reason = f"its names fit {first} and {other}, whose modules differ"
        raise RefusedError(where, reason, "Give --base, whose modules settle it")
    return choices[first], fits[first]


def _in_part(table: Table, reading: Reading) -> Reading:
    return Reading(tuple(f"{table.part}.{target}" for target in reading.targets), reading.swapped)


def _by_base(stems: Mapping[str, str], part: str, modules: _Modules, where: str) -> tuple[dict[str, Reading], Table | None]:
    found: dict[str, Reading] = {}
    used: Table | None = None
    for stem, rest in stems.items():
        read = {table: reading for table in tables.TABLES if (reading := table.read(rest))}
        readings = {table: reading for table, reading in read.items() if modules.listed.issuperset(reading.targets)}
        own = modules.named(stem, rest, where)
        different = {reading for reading in (*readings.values(), own) if reading}
        if len(different) != 1:
            what = "names no module of the base" if not different else f"names {len(different)} modules of the base"
            raise RefusedError(where, f"{stem!r} {what}", "" if different else "Is it the base that the adapter was made for?")
        reading = different.pop()
        used = next((table for table in readings if table is not tables.TRANSFORMER), used)
        found[stem] = Reading(tuple(f"{part}.{target}" if part else target for target in reading.targets), reading.swapped)
    return found, used


Groups = dict[str, tuple[dict[str, Delta], Reading]]


def groups(adapter: Adapter, base: BaseSpec | None) -> Groups:
    """The deltas by the module they are in there."""
    inner = [target for target in adapter.deltas if not pipeline.part_of(target).startswith("text_encoder")]
    table = _table(inner, adapter, base)
    found_groups: Groups = {}
    failed: list[str] = []
    for target, delta in adapter.deltas.items():
        part = pipeline.part_of(target)
        rest = target.removeprefix(f"{part}.")
        own = tables.TEXT if part.startswith("text_encoder") else table
        found = own.written(rest) or tables.TEXT.written(f"text_model.{rest}") if own else None
        prefix = _te_prefix(part, table, adapter) if part.startswith("text_encoder") else "lora_unet_"
        if found is None or prefix is None or part == "transformer_2":
            failed.append(f"{target}: kohya has no name for it that is known")
            continue
        path, reading = found
        whole = Reading(tuple(f"{part}.{each}" for each in reading.targets), reading.swapped)
        found_groups.setdefault(f"{prefix}{path.replace('.', '_')}", ({}, whole))[0][target] = delta
    if failed:
        raise refused("kohya", failed)
    return found_groups


def _te_prefix(part: str, table: Table | None, adapter: Adapter) -> str | None:
    """How the modules of a text encoder begin; None where no tool is known to read them."""
    if table in (tables.SD, None) and "text_encoder_2" not in adapter.meta.parts:
        return "lora_te_" if part == "text_encoder" else None
    second = {None: "lora_te2_", tables.SDXL: "lora_te2_", tables.FLUX: "lora_te3_"}
    return {"text_encoder": "lora_te1_", "text_encoder_2": second[table]}.get(part) if table in second else None


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
    if len(fits) == 1 and fits[0] is not tables.TRANSFORMER:
        return fits[0]
    said = _said(bare, adapter, base)
    if said in fits:
        return said
    known = " and ".join("Qwen-Image" if table is tables.TRANSFORMER else table.name for table in fits)
    hint = "Give --base, the model's or pipeline's folder, whose config says which it is"
    raise RefusedError("kohya", f"its modules may be those of {known} or of another, which kohya calls otherwise", hint)


def _said(bare: Iterable[str], adapter: Adapter, base: BaseSpec | None) -> Table | None:
    """What the modules, the source's header or the base say of the model."""
    own = pipeline.own_header(adapter).get(pipeline.NAMES_KEY)
    if names := next((table for table in tables.TABLES if table.name == own and table.writes), None):
        return names
    again = pipeline.header_again(adapter, "kohya")
    text = " ".join(again.get(key, "") for key in _SAID_IN).lower()
    name = base.architecture if base else ""
    if name.startswith(("StableDiffusionXL",)) or re.search("sdxl|stable-diffusion-xl", text):
        return tables.SDXL
    if (name.startswith("Flux") and not name.startswith("Flux2")) or re.search(r"flux\.?1|flux-1", text):
        return tables.FLUX
    if name.startswith("QwenImage") or "qwen" in text or any(".img_m" in path or ".txt_m" in path for path in bare):
        return tables.TRANSFORMER
    modules = {module for listed in pipeline.modules_of(base).values() for module in listed}
    sdxl = _is_sdxl(bare) or "text_encoder_2" in adapter.meta.parts or _is_sdxl(modules)
    if not sdxl and (modules or name.startswith("StableDiffusion") or re.search("sd_v[12]|stable-diffusion-v[12]", text)):
        return tables.SD if not name.startswith("StableDiffusion3") else None
    return tables.SDXL if sdxl else tables.SD if any(re.match(r"(?:down|up)_blocks\.3\.", path) for path in bare) else None


def _is_sdxl(paths: Iterable[str]) -> bool:
    """SDXL alone embeds sizes and has transformers of several blocks."""
    return any("add_embedding." in path or re.search(r"\.transformer_blocks\.[1-9]", path) for path in paths)
