"""What the classes of vLLM's models say themselves: its Python runs this, which prints a line of JSON for each architecture."""

from __future__ import annotations

import json
from typing import Any


def facts(model_class: Any) -> dict[str, Any]:
    """Return whether a class has LoRA, whether its experts are stacks, and the prefixes of its components."""
    from vllm.model_executor.models.interfaces import supports_lora

    if not supports_lora(model_class):
        return {"lora": False}
    components: dict[str, list[str]] = {}
    if hasattr(model_class, "get_mm_mapping"):
        try:
            mapping = model_class.get_mm_mapping(None)
        except AttributeError:  # a mapping that depends on the config
            return {"lora": True, "stacked": bool(model_class.is_3d_moe_weight)}
        components = {"language": mapping.language_model, "towers": mapping.tower_model, "connectors": mapping.connector}
    return {"lora": True, "stacked": bool(model_class.is_3d_moe_weight), "components": components}


if __name__ == "__main__":
    from vllm.model_executor.models import registry

    skipped = {*registry._SPECULATIVE_DECODING_MODELS, *registry._TRANSFORMERS_BACKEND_MODELS}
    for architecture in sorted(registry._VLLM_MODELS.keys() - skipped):
        try:
            loaded_class = registry.ModelRegistry.models[architecture].load_model_cls()
        except (ImportError, AttributeError, RuntimeError) as error:  # what only another accelerator has
            print("\n" + json.dumps({"name": architecture, "error": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        print("\n" + json.dumps({"name": architecture, **facts(loaded_class)}), flush=True)
