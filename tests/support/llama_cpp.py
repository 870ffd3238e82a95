"""The real llama.cpp as an oracle: logits with or without a LoRA adapter, in the engine of `adapterhub run`, on one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from adapterhub.generation import llama_cpp
from adapterhub.generation.llama_cpp import LlamaCppEngine


@contextlib.contextmanager
def opened(model: Path, adapter: Path | None = None) -> Iterator[LlamaCppEngine]:
    """Load a model and, if given, an adapter; threads wait for each other in a spin, so there is only one."""
    with llama_cpp.open_engine(adapter, model, location=str(adapter), threads=1) as engine:
        yield engine


def gated_logits(model: Path, tokens: Sequence[int], adapter: Path) -> np.ndarray:
    """The same of an aLoRA, which our engine refuses, as llama-server applies it: from the last occurrence of its tokens on."""
    with opened(model) as engine:
        lib, ffi = engine._lib, engine._ffi
        delta = lib.llama_adapter_lora_init(engine._model, str(adapter).encode())
        assert delta != ffi.NULL
        count = lib.llama_adapter_get_alora_n_invocation_tokens(delta)
        expected = list(ffi.unpack(lib.llama_adapter_get_alora_invocation_tokens(delta), count))
        start = next(i for i in reversed(range(len(tokens))) if list(tokens[i : i + count]) == expected)
        settings = lib.llama_context_default_params()
        settings.type_k = settings.type_v = llama_cpp._F32
        settings.flash_attn_type = llama_cpp._NO_FLASH
        settings.n_threads = settings.n_threads_batch = 1
        context = lib.llama_init_from_model(engine._model, settings)
        try:
            earlier_logits = [np.array(engine._decode(context, [token], i)) for i, token in enumerate(tokens[:start])]
            lib.llama_set_adapters_lora(
                context, ffi.new("struct llama_adapter_lora *[]", [delta]), 1, ffi.new("float[]", [1.0])
            )
            later = list(tokens)[start:]
            return np.stack(
                [*earlier_logits, *(np.array(engine._decode(context, [t], start + i)) for i, t in enumerate(later))]
            )
        finally:
            lib.llama_free(context)


def logits(model: Path, tokens: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """Logits `(len(tokens), n_vocab)` after each token, float32."""
    with opened(model, adapter) as engine, engine.start_decoding(adapted=adapter is not None, room=len(tokens)) as logits_after:
        return np.stack([logits_after([token]) for token in tokens])
