"""What vLLM does with adapters of models that it builds without an engine: its Python runs this with pairs of base and adapter.

For each it prints a line of JSON: the error at load, or the modules of the adapter that it has no place for. Adapters of the
base before them are loaded into the same model. Nothing is computed, so weights are as they lay in memory, in bfloat16, which
is what vLLM's kernels for AMX take.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from functools import lru_cache
from typing import Any


def outcome(base: str, adapter: str) -> dict[str, Any]:
    """Return what happens to an adapter on a base: whether the base is built at all, the error, and what is lost."""
    from vllm.lora.request import LoRARequest

    is_built = False
    try:
        built(base)
        is_built = True
        manager = lora_manager(base)
        number = len(manager.list_adapters()) + 1
        manager.add_adapter(LoRARequest(adapter, number, adapter))
    except Exception as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        return {"is_built": is_built, "error": f"{type(error).__name__}: {error} ({place})"}
    adapters = manager._adapter_manager
    loras = adapters.get_adapter(number).loras
    ignored = {*loras} - {*adapters.modules} | {name for name, lora in loras.items() if is_part_lost(lora)}
    return {"is_built": is_built, "error": None, "ignored": sorted(ignored)}


def is_part_lost(lora: Any) -> bool:
    """Return whether a part of a fused layer has one of its two matrices alone, of which a product is nothing."""
    if not isinstance(lora.lora_a, list):
        return False
    return any((a is None) != (b is None) for a, b in zip(lora.lora_a, lora.lora_b, strict=True))


@lru_cache(maxsize=1)
def built(base: str) -> Any:
    """Return a model that vLLM builds from the config in a folder, and vLLM's own config."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.model_executor.models.registry import ModelRegistry

    with open(f"{base}/config.json") as file:
        [architecture] = json.load(file)["architectures"]
    if architecture in ModelRegistry.models:  # else a process of its own looks at the class, for seconds
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    arguments = EngineArgs(
        model=base, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=1,
        max_num_batched_tokens=64, enable_lora=True, max_loras=1, max_cpu_loras=32, max_lora_rank=8,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        model = initialize_model(vllm_config=config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model, config


@lru_cache(maxsize=1)
def lora_manager(base: str) -> Any:
    """Return vLLM's manager of the adapters of a built model, of which it replaces layers."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    model, config = built(base)
    runner = LoRAModelRunnerMixin()
    with set_current_vllm_config(config):
        runner.load_lora_model(model, config, torch.device("cpu"))
    return runner.lora_manager


def start() -> None:
    """Begin the group of processes, of which this is the only one, that layers ask for their part."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with tempfile.NamedTemporaryFile() as file, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{file.name}.store", 0, "gloo")
        initialize_model_parallel(1, 1)


if __name__ == "__main__":
    start()
    words = iter(sys.argv[1:])
    for base, adapter in zip(words, words, strict=True):
        print("\n" + json.dumps({"name": adapter, **outcome(base, adapter)}), flush=True)
