"""Readers of base models by their headers: parameter names, logical shapes, and the numbers that change the function.

    base_reader      a base from any path: `hf_base` or `gguf_base`, over `model_files`
    base_spec        what was read: `BaseSpec`
    base_prompts     its chat template and special tokens
    canonical_names  names and shapes as on Hugging Face; `names_in_memory`, as transformers loads them
    config_shapes    shapes by config.json alone; `quantized_shapes`, of quantized weights; `bitsandbytes_state`, of 4-bit ones
    hub_layout       the name of a model in the cache of huggingface_hub

No weight is loaded. Names are Hugging Face's, and shapes are those of the model before quantization, whatever the file stores,
so that a base in 16 bits, in NF4, and as GGUF has the same fingerprint. Each name is imported when it is first used: most
commands read no base.
"""

from typing import TYPE_CHECKING

from adapterhub_converters.lazy_imports import lazy_names

if TYPE_CHECKING:
    from .base_reader import is_model, read_base, read_files
    from .base_spec import BaseSpec
    from .canonical_names import BaseTensor
    from .hf_base import read_hf, weight_files
    from .model_files import Files, LocalFiles, RangedFile

__all__ = [
    "BaseSpec",
    "BaseTensor",
    "Files",
    "LocalFiles",
    "RangedFile",
    "is_model",
    "read_base",
    "read_files",
    "read_hf",
    "weight_files",
]

__getattr__ = lazy_names(
    globals(),
    {
        ".base_reader": ("is_model", "read_base", "read_files"),
        ".base_spec": ("BaseSpec",),
        ".canonical_names": ("BaseTensor",),
        ".hf_base": ("read_hf", "weight_files"),
        ".model_files": ("Files", "LocalFiles", "RangedFile"),
    },
)
