"""The real llama.cpp from Python: greedy text and logits, with or without a LoRA adapter.

Uses the library that comes with the wheel `llama-cpp-py-sync` through its cffi declarations; nothing is compiled.
The adapter is loaded and attached exactly as `llama-cli --lora` does. Wrong adapters fail at load.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

F32_CACHE = 0  # ggml_type of keys and values; the default, float16, costs 1e-3 of a logit
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))  # they wait for each other in a spin: not more than cores are free
NO_FLASH = 0  # flash attention computes in float16


@dataclass
class Session:
    """A model, perhaps an adapter, and a context to run them in."""

    ffi: Any
    lib: Any
    model: Any
    context: Any
    keep: list[Any]

    @property
    def n_vocab(self) -> int:
        """Length of a row of logits."""
        return int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model)))

    def tokens(self, text: str) -> list[int]:
        """`text` as token ids; special tokens such as `<|im_start|>` are recognized."""
        vocab, raw = self.lib.llama_model_get_vocab(self.model), text.encode()
        room = len(raw) + 8
        ids = self.ffi.new("llama_token[]", room)
        n = self.lib.llama_tokenize(vocab, raw, len(raw), ids, room, True, True)
        if n < 0:
            raise RuntimeError("llama.cpp could not tokenize the prompt")
        return [int(ids[i]) for i in range(n)]

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""
        vocab, buffer = self.lib.llama_model_get_vocab(self.model), self.ffi.new("char[]", 256)
        n = self.lib.llama_token_to_piece(vocab, token, buffer, 256, 0, False)
        return bytes(self.ffi.buffer(buffer, max(n, 0)))

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer."""
        return bool(self.lib.llama_vocab_is_eog(self.lib.llama_model_get_vocab(self.model), token))

    def decode(self, tokens: Sequence[int], *, start: int = 0, every: bool = False) -> np.ndarray:
        """Feed `tokens` at position `start`; logits `(len(tokens) if every else 1, n_vocab)`, float32."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every or i == len(tokens) - 1
            if self.lib.llama_decode(self.context, batch):
                raise RuntimeError("llama.cpp could not decode the batch")
            rows = range(len(tokens)) if every else [len(tokens) - 1]
            return np.stack([self._row(i) for i in rows])
        finally:
            self.lib.llama_batch_free(batch)

    def _row(self, i: int) -> np.ndarray:
        pointer = self.lib.llama_get_logits_ith(self.context, i)
        return np.frombuffer(self.ffi.buffer(pointer, 4 * self.n_vocab), np.float32).copy()


@contextlib.contextmanager
def session(model_path: Path, adapter_path: Path | None = None, *, n_context: int = 512) -> Iterator[Session]:
    """Load a model, attach an adapter at scale 1, and free both at the end; on the CPU, `THREADS` threads."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    log: list[str] = []

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def record(level: int, text: Any, _: Any) -> None:
        log.append(ffi.string(text).decode(errors="replace"))

    lib.llama_log_set(record, ffi.NULL)
    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(model_path).encode(), parameters)
    if model == ffi.NULL:
        raise RuntimeError(f"llama.cpp did not load {model_path}: {_reason(log)}")
    context = adapter = ffi.NULL
    try:
        if adapter_path is not None:
            adapter = lib.llama_adapter_lora_init(model, str(adapter_path).encode())
            if adapter == ffi.NULL:
                raise RuntimeError(f"llama.cpp did not load {adapter_path}: {_reason(log)}")
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_context
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.type_k = settings.type_v = F32_CACHE
        settings.flash_attn_type = NO_FLASH
        context = lib.llama_init_from_model(model, settings)
        if context == ffi.NULL:
            raise RuntimeError(f"llama.cpp made no context: {_reason(log)}")
        if adapter_path is not None:
            lib.llama_set_adapters_lora(
                context, ffi.new("struct llama_adapter_lora *[]", [adapter]), 1, ffi.new("float[]", [1.0])
            )
        yield Session(ffi, lib, model, context, [record])
    finally:
        if context != ffi.NULL:
            lib.llama_free(context)
        lib.llama_model_free(model)
        lib.llama_log_set(ffi.NULL, ffi.NULL)


def _reason(log: Sequence[str]) -> str:
    lines = [line.strip() for line in "".join(log).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "fail" in line or "error" in line or "hint" in line), "no reason given")


def logits(model_path: Path, tokens: Sequence[int], adapter_path: Path | None = None) -> np.ndarray:
    """Logits `(len(tokens), n_vocab)` after each token, float32."""
    with session(model_path, adapter_path, n_context=max(len(tokens), 64)) as run:
        return run.decode(tokens, every=True)


def generate(model_path: Path, prompt: str, adapter_path: Path | None = None, n_tokens: int = 64) -> str:
    """The most likely continuation of `prompt`, at most `n_tokens` tokens, to the first end-of-answer token."""
    with session(model_path, adapter_path, n_context=2048) as run:
        tokens = run.tokens(prompt)
        answer = b""
        position, row = len(tokens), run.decode(tokens)[0]
        for _ in range(n_tokens):
            token = int(row.argmax())
            if run.is_end(token):
                break
            answer += run.piece(token)
            row = run.decode([token], start=position)[0]
            position += 1
        return answer.decode(errors="replace")
