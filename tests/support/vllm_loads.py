"""What vLLM does with adapters, by vLLM itself: its Python runs this with triples of name, base and adapter.

For each it prints a line of JSON: the error at load, or the modules of the adapter that it has no place for, and the tokens
with and without it.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

PROMPT, COUNT = [*range(1, 9)], 6


def loaded(base: str, adapter: str) -> dict[str, Any]:
    """Return what happens to an adapter on a base."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    engine: Any = None
    try:
        engine = LLM(
            model=base, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1,
            max_num_batched_tokens=64, enable_lora=True, max_loras=1, max_lora_rank=8, enable_prefix_caching=False,
        )  # fmt: skip
        options = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, detokenize=False)
        prompt: Any = {"prompt_token_ids": PROMPT}

        worker = engine.llm_engine.model_executor.driver_worker.worker
        manager = worker.model_runner.lora_manager._adapter_manager
        plain = _tokens(engine.generate(prompt, options, use_tqdm=False))
        adapted = _tokens(engine.generate(prompt, options, use_tqdm=False, lora_request=LoRARequest("a", 1, adapter)))
        ignored = sorted({*manager._registered_adapters.cache[1].loras} - {*manager.modules})
        return {"error": "", "ignored": ignored, "base": plain, "adapted": adapted}
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"}
    finally:
        del engine
        cleanup_dist_env_and_memory()


def _tokens(outputs: Any) -> list[int]:
    return list(outputs[0].outputs[0].token_ids)


if __name__ == "__main__":
    words = iter(sys.argv[1:])
    for name, base, adapter in zip(words, words, words, strict=True):
        print("\n" + json.dumps({"name": name, **loaded(base, adapter)}), flush=True)
