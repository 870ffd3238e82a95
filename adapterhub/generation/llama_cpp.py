"""A GGUF model in llama.cpp, by the library in the wheel `llama-cpp-py-sync` and its cffi declarations.

The adapter is loaded and attached as `llama-cli --lora` does, on the CPU. Keys and values are float32 and flash attention is
off, whose float16 costs 1e-3 of a logit.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.training.data import chat_template
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import FormatError, MissingExtraError, RefusedError

from . import Prompt

_F32, _NO_FLASH = 0, 0  # a ggml_type, a llama_flash_attn_type
_MODULES = ("llama_cpp_py_sync", "jinja2")


def check_extra() -> None:
    """MissingExtraError where llama.cpp or what renders chat templates is not installed."""
    for name in _MODULES:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("", f"running a GGUF needs {name}, which is not installed", 'pip install "adapterhub[run]"')


@contextlib.contextmanager
def opened(adapter: Path, base: Path, *, where: str) -> Iterator[LlamaCppEngine]:
    """Load a GGUF base and a GGUF adapter, which `where` names in messages.

    Raises:
        FormatError: llama.cpp does not load the base.
        RefusedError: It does not load the adapter.
    """
    bindings: Any = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    log: list[str] = []

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def record(_level: int, text: Any, _data: Any) -> None:
        log.append(ffi.string(text).decode(errors="replace"))
        del log[:-200]

    with GGUFFile(base) as file:
        metadata = file.header.metadata
    lib.llama_log_set(record, ffi.NULL)
    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = ffi.NULL
    try:
        model = lib.llama_model_load_from_file(str(base).encode(), parameters)
        if model == ffi.NULL:
            raise FormatError(str(base), f"llama.cpp does not load it ({_reason(log)})")
        delta = lib.llama_adapter_lora_init(model, str(adapter).encode())
        if delta == ffi.NULL:
            raise RefusedError(where, f"llama.cpp does not load it on {base} ({_reason(log)})")
        yield LlamaCppEngine((ffi, lib), model, delta, metadata, where=str(base))
    finally:
        if model != ffi.NULL:
            lib.llama_model_free(model)
        lib.llama_log_set(ffi.NULL, ffi.NULL)


def _reason(log: Sequence[str]) -> str:
    lines = [line.strip() for line in "".join(log).splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if "fail" in line or "error" in line), "no reason given")
    return found[:200]


class LlamaCppEngine:
    """See `Engine`."""

    name = "llama.cpp"

    def __init__(self, library: tuple[Any, Any], model: Any, adapter: Any, metadata: Mapping[str, Any], *, where: str) -> None:
        self.where = where
        self._ffi, self._lib = library
        self._model, self._adapter = model, adapter
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self._metadata = metadata
        self._template = metadata.get("tokenizer.chat_template")
        self.longest: int | None = int(self._lib.llama_model_n_ctx_train(model)) or None

    def text_of(self, prompt: Prompt) -> str:
        """Render the model's own template in its own bounded process; a model without one continues the text."""
        if prompt.raw or not isinstance(self._template, str):
            return prompt.text
        special = {f"{name}_token": self._special(name) for name in ("bos", "eos")}
        rest = {"messages": prompt.messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return chat_template.rendered(self._template, {**special, **rest}, where=self.where)

    def _special(self, name: str) -> str:
        tokens, number = self._metadata.get("tokenizer.ggml.tokens"), self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return str(tokens[number]) if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens) else ""

    def tokens(self, text: str, *, raw: bool) -> list[int]:
        """Return the ids; special tokens such as `<|im_start|>` are recognized, and a template writes them itself."""
        encoded = text.encode()
        room = len(encoded) + 8
        ids = self._ffi.new("llama_token[]", room)
        special = raw or not isinstance(self._template, str)
        count = self._lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, room, special, True)
        if count < 0:
            raise FormatError(self.where, "llama.cpp does not tokenize the prompt")
        return [int(ids[i]) for i in range(count)]

    @contextlib.contextmanager
    def started(self, *, adapted: bool, room: int) -> Iterator[Callable[[list[int]], Any]]:
        """A context of its own, whose keys and values no other has."""
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(room, 64)
        settings.n_threads = settings.n_threads_batch = _threads()
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = _NO_FLASH
        context = self._lib.llama_init_from_model(self._model, settings)
        if context == self._ffi.NULL:
            raise RefusedError(self.where, f"llama.cpp makes no context of {room} tokens")
        try:
            if adapted:
                one = self._ffi.new("struct llama_adapter_lora *[]", [self._adapter])
                self._lib.llama_set_adapters_lora(context, one, 1, self._ffi.new("float[]", [1.0]))
            seen = 0

            def logits_after(ids: list[int]) -> Any:
                nonlocal seen
                seen += len(ids)
                return self._decoded(context, ids, seen - len(ids))

            yield logits_after
        finally:
            self._lib.llama_free(context)

    def _decoded(self, context: Any, ids: list[int], start: int) -> Any:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i == len(ids) - 1
            if self._lib.llama_decode(context, batch):
                raise RefusedError(self.where, "llama.cpp does not decode the prompt")
            pointer = self._lib.llama_get_logits_ith(context, len(ids) - 1)
            return np.frombuffer(self._ffi.buffer(pointer, 4 * self._size), np.float32).copy()
        finally:
            self._lib.llama_batch_free(batch)

    def is_end(self, token: int) -> bool:
        """By the vocabulary."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def pieces(self) -> Callable[[int], str]:
        """Decode the bytes of tokens as UTF-8, which may be cut anywhere."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        buffer = self._ffi.new("char[]", 256)

        def piece(token: int) -> str:
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
            return decoder.decode(bytes(self._ffi.buffer(buffer, max(count, 0))))

        return piece


def _threads() -> int:
    """The cores that this process may use: threads wait for each other in a spin."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1
