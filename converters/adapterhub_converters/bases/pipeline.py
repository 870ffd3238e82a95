"""A pipeline of image models as one base: a folder with a `model_index.json` and a folder for each model.

Names of tensors begin with that of their model, as diffusers says them: `unet.down_blocks.0.…`.
"""

from __future__ import annotations

from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError

from . import hf
from .spec import BaseSpec

INDEX = "model_index.json"
PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The models of a pipeline that adapters act on."""


def read(folder: Path) -> BaseSpec:
    """The base in a pipeline's folder, from the headers of all its models."""
    name = json_file.read_object(folder / INDEX).get("_class_name")
    models = {part: hf.read_hf(folder / part) for part in PARTS if (folder / part / hf.CONFIG).is_file()}
    if not models:
        raise NotFoundError(str(folder), f"a pipeline without any of its models: none of {', '.join(PARTS)} is there")
    return BaseSpec(
        where=str(folder),
        kind="hf",
        architecture=name if isinstance(name, str) and name.endswith("Pipeline") else "DiffusionPipeline",
        model_type="",
        config={},
        tensors={f"{_stem(part, model)}{name}": t for part, model in models.items() for name, t in model.tensors.items()},
        size=sum(model.size for model in models.values()),
        notes=tuple(f"{part}: {note}" for part, model in models.items() for note in model.notes),
    )


def _stem(part: str, model: BaseSpec) -> str:
    """What its names begin with; transformers 5 saves CLIP's text encoder without the `text_model.` of its checkpoints."""
    bare = model.architecture == "CLIPTextModel" and not any(name.startswith("text_model.") for name in model.tensors)
    return f"{part}.text_model." if bare else f"{part}."
