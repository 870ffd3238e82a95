"""What a file's header says about the model that an adapter is for, and about the program that saved it.

sd-scripts and musubi-tuner write `ss_base_model_version`, `ss_sd_model_name` and the keys of Stability's model spec; ai-toolkit
writes `software`, OneTrainer `ot_*`. A name that no table has is taken from the header if it is a plain word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Meta
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.formats import pipeline

from . import family_tables, image_transformers

_WORD = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,59}")
_REPO = safe_regex.Pattern(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MUSUBI = safe_regex.Pattern(r"musubi|networks\.lora_(?:wan|framepack|flux_|qwen|zimage|hv_|kandinsky|krea|ideogram|hidream)")


def describe(meta: Meta, metadata: Mapping[str, str], names: str, targets: Iterable[str]) -> Meta:
    """Return `meta` with the family, the base and the program, as far as they are known.

    Args:
        meta: What is known about the adapter otherwise.
        metadata: The metadata of the file's header.
        names: The name of the table of the file's names; empty if they are diffusers' own.
        targets: What the adapter changes, with the models of the pipeline.
    """
    model = metadata.get("ss_sd_model_name", "")
    family = _family(names) or _family_of(targets) or version(metadata)
    is_repo = _REPO.fullmatch(model) and not model.endswith(".safetensors")  # else a file of the trainer's machine
    base_model = meta.base_model or (model if is_repo else None)
    return dataclasses.replace(meta, base_model=base_model, family=family, program=program(metadata))


def version(metadata: Mapping[str, str]) -> str:
    """Return the model as the header calls it, `flux-1-dev` or `Krea-2`; empty if it has no name."""
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    name = architecture or metadata.get("ss_base_model_version", "")
    return name if _WORD.fullmatch(name) else ""


def program(metadata: Mapping[str, str]) -> str:
    """Return the program that saved a file; empty if the header does not tell."""
    module = metadata.get("ss_network_module", "")
    if module:
        return "LyCORIS" if module.startswith("lycoris") else "musubi-tuner" if _MUSUBI.search(module) else "sd-scripts"
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    try:
        software = json_file.parse(metadata.get("software", "null"), "")
    except FormatError:
        return ""
    name = software.get("name") if isinstance(software, dict) else ""
    return name if isinstance(name, str) and _WORD.fullmatch(name) else ""


def _family(names: str) -> str:
    return "" if names == image_transformers.TRANSFORMER.name else names.partition(" by ")[0]


def _family_of(targets: Iterable[str]) -> str:
    """Return the only family that has all these modules; empty if there are several."""
    inner = [target.partition(".") for target in targets if not pipeline.is_text(target.partition(".")[0])]
    fits = {
        _family(table.name)
        for table in family_tables.TABLES
        if inner and all(part == table.part and table.trainer_path(path) for part, _, path in inner)
    }
    return fits.pop() if len(fits) == 1 else ""
