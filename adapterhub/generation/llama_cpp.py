"""A GGUF model in llama.cpp, through the library in the wheel `llama-cpp-py-sync` and its cffi declarations.

The adapter is loaded and attached as `llama-cli --lora` does, on the CPU. Keys and values are float32, and flash attention is
off, because its float16 costs 1e-3 of a logit.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.prompts import chat_template
from adapterhub.training import machine
from adapterhub_converters.bases import base_prompts
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import FormatError, MissingExtraError, RefusedError
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import Prompt

_F32, _NO_FLASH = 0, 0  # a ggml_type, a llama_flash_attn_type
_TRIAL = Path(__file__).with_name("llama_cpp_trial.py")
_MAX_PROMPTS = 64  # whose ends are remembered: finding one renders a conversation
_TRIAL_LOG = 64 << 10  # bytes of the end of a child's log in which the reason is looked for
_MODULES = ("llama_cpp_py_sync", "jinja2")
_VAGUE_LINES = ("ret = ", "failed to load model")  # in lines of llama.cpp's log that follow the line with the reason


def check_extra() -> None:
    """Raise MissingExtraError if llama.cpp, or the library that renders chat templates, is not installed."""
    for name in _MODULES:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                "", f"running a GGUF needs {name}, which is not installed", "Run `pip install 'adapterhub[run]'`"
            )


def load_library() -> tuple[Any, Any]:
    """Return cffi's interface and the library. MissingExtraError if this machine cannot load it: it needs glibc 2.38."""
    bindings: Any = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    try:
        return bindings.get_ffi(), bindings.get_lib()
    except RuntimeError as error:
        reason = str(error.__cause__ or error).partition(".  ")[0]
        problem = f"is installed, but cannot be loaded ({reason})"
        raise MissingExtraError("llama_cpp_py_sync", problem, "Install a build of it for this machine") from error


@contextlib.contextmanager
def open_engine(
    adapter: Path | None, base: Path, *, location: str, prompt: TrainedPrompt = PROMPT_OF_BASE, threads: int | None = None
) -> Iterator[LlamaCppEngine]:
    """Load a GGUF base and a GGUF adapter called `location` in messages; by default, with a thread for each usable core.

    Args:
        prompt: The prompt that the adapter was trained with.

    Raises:
        FormatError: llama.cpp cannot load the base, or aborts as it loads the base or the adapter.
        MissingExtraError: The library cannot be loaded on this machine.
        RefusedError: It cannot load the adapter, or the base does not generate text.
    """
    ffi, lib = load_library()
    log: list[str] = []

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def record_log(_level: int, text: Any, _data: Any) -> None:
        log.append(ffi.string(text).decode(errors="replace"))
        # The last lines are enough to find the reason of a failure.
        del log[:-200]

    with GGUFFile(base) as file:
        metadata = file.header.metadata
    if metadata.get(f"{metadata.get('general.architecture')}.attention.causal") is False:
        raise RefusedError(
            str(base), "is an encoder, which computes embeddings and no text", "Name a model that generates text"
        )
    _try_in_child(base, adapter, location=str(base) if adapter is None else location)
    # The callback is valid until this function returns, which resets it first.
    lib.llama_log_set(record_log, ffi.NULL)
    lib.llama_backend_init()
    model_parameters = lib.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    # NULL until the model is loaded, so that a failure before that frees nothing.
    model = ffi.NULL
    try:
        model = lib.llama_model_load_from_file(str(base).encode(), model_parameters)
        if model == ffi.NULL:
            raise FormatError(str(base), f"llama.cpp cannot load it ({_failure_reason(log)})")
        engine = LlamaCppEngine((ffi, lib), model, base, metadata, log, threads=threads or machine.usable_cores())
        if adapter is not None:
            engine.adapter, engine.prompt = engine.load_tried_adapter(adapter, location), prompt
        yield engine
    finally:
        if model != ffi.NULL:
            lib.llama_model_free(model)
        lib.llama_log_set(ffi.NULL, ffi.NULL)


def _try_in_child(base: Path, adapter: Path | None, *, location: str) -> None:
    """Raise FormatError if llama.cpp ends its process as it loads a model, or an adapter on it, and computes a token.

    `location`: The name in messages of what is tried.
    """
    # -P keeps the script's folder off the import path: a file there would shadow a library.
    command = [sys.executable, "-P", str(_TRIAL), str(base), *([] if adapter is None else [str(adapter)])]
    with tempfile.TemporaryFile() as log:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
        if status < 0:
            log.seek(max(log.tell() - _TRIAL_LOG, 0))
            reason = _failure_reason(log.read().decode(errors="replace").splitlines(keepends=True))
            name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
            raise FormatError(location, f"llama.cpp ends by {name} when it loads it ({reason})")


def _failure_reason(log: Sequence[str]) -> str:
    lines = [line.strip() for line in "".join(log).splitlines() if line.strip()]
    # The last line about a failure tells most, except for general ones.
    reasons = (
        line for line in reversed(lines) if ("fail" in line or "error" in line) and not any(v in line for v in _VAGUE_LINES)
    )
    reason = next(reasons, "no reason given")
    return reason[:200]


class LlamaCppEngine:
    """An `Engine` for a GGUF file.

    Attributes:
        adapter: The adapter that `start_decoding` applies; None for none.
        prompt: The prompt of that adapter.
        size: The number of tokens in the vocabulary.
    """

    name = "llama.cpp"
    prompt = PROMPT_OF_BASE

    def __init__(
        self,
        library: tuple[Any, Any],
        model: Any,
        base: Path,
        metadata: Mapping[str, Any],
        log: Sequence[str],
        *,
        threads: int,
    ) -> None:
        self.location, self._base, self._threads, self._log = str(base), base, threads, log
        self._ffi, self._lib = library
        self._model, self.adapter = model, None
        self._vocab = self._lib.llama_model_get_vocab(model)
        self.size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self._metadata = metadata
        self._template = metadata.get("tokenizer.chat_template")
        self.max_context: int | None = int(self._lib.llama_model_n_ctx_train(model)) or None
        self._end: int | None = None  # of the answer to the last prompt, besides the ends of the vocabulary
        self.end_of = lru_cache(_MAX_PROMPTS)(self._find_end)

    def template_of(self, prompt: TrainedPrompt) -> str | None:
        """Return the chat template of a prompt: its own, or the model's; None if there is none."""
        if prompt.template is not None:
            return prompt.template
        return self._template if isinstance(self._template, str) else None

    def load_adapter(self, adapter: Path, location: str) -> Any:
        """Load an adapter for `context`; `location` is its name in messages.

        Raises:
            FormatError: llama.cpp aborts as it loads it.
            RefusedError: llama.cpp cannot load it on the base.
        """
        _try_in_child(self._base, adapter, location=location)
        return self.load_tried_adapter(adapter, location)

    def load_tried_adapter(self, adapter: Path, location: str) -> Any:
        """Load an adapter that a child has loaded before; arguments and errors are those of `load_adapter`."""
        handle = self._lib.llama_adapter_lora_init(self._model, str(adapter).encode())
        if handle == self._ffi.NULL:
            raise RefusedError(location, f"llama.cpp cannot load it on {self.location} ({_failure_reason(self._log)})")
        if self._lib.llama_adapter_get_alora_n_invocation_tokens(handle):
            self.free(handle)
            raise RefusedError(location, "acts only after certain tokens (aLoRA), and here it would on all of them")
        return handle

    def free(self, adapter: Any) -> None:
        """Free an adapter that no context uses."""
        self._lib.llama_adapter_lora_free(adapter)

    def text_of(self, prompt: Prompt) -> str:
        """Render the chat template in its own limited process; without one, continue the text."""
        is_raw = prompt.raw or self.template_of(self.prompt) is None
        self._end = None if is_raw else self.end_of(self.prompt)
        return prompt.plain_text(self.location) if is_raw else self.conversation(prompt.messages, prompt=self.prompt)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None = None,
        *,
        prompt: TrainedPrompt = PROMPT_OF_BASE,
    ) -> str:
        """Render the template of a prompt, up to the beginning of the answer, in its own limited process."""
        conversation = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        variables = {**self._special_tokens, **prompt.variables, **conversation}
        return chat_template.render_variables(str(self.template_of(prompt)), variables, location=self.location)

    def _find_end(self, prompt: TrainedPrompt) -> int | None:
        """Return the token with which an adapter's template ends answers; None if the vocabulary ends them by itself."""
        if prompt.template is None:
            return None
        special, ends = base_prompts.end_tokens_of_gguf(self._metadata)
        variables = {**self._special_tokens, **prompt.variables}
        return chat_template.end_token(prompt.template, variables, special, ends, location=self.location)

    @property
    def _special_tokens(self) -> dict[str, str]:
        return {f"{name}_token": self._special(name) for name in ("bos", "eos")}

    def _special(self, name: str) -> str:
        tokens, number = self._metadata.get("tokenizer.ggml.tokens"), self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return str(tokens[number]) if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens) else ""

    def tokens(self, text: str, *, raw: bool) -> list[int]:
        """Return the ids; a template writes the special tokens itself."""
        return self.encode(text, special=raw or self.template_of(self.prompt) is None)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the ids, with `special` those that the model expects at a start; `<|im_start|>` and others are recognized.

        Raises:
            RefusedError: The file has no tokenizer.
        """
        if self._lib.llama_vocab_type(self._vocab) == self._lib.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp would abort the process
            raise RefusedError(
                self.location, "contains no tokenizer", "Convert the model again, from a folder with tokenizer.json"
            )
        encoded = text.encode()
        count = -len(encoded) - 8
        while (
            count < 0
        ):  # a negative count is the room needed: SentencePiece's space has three bytes, which may be three tokens
            room = -count
            ids = self._ffi.new("llama_token[]", room)
            count = self._lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, room, special, True)
        return [int(ids[i]) for i in range(count)]

    def start_decoding(self, *, adapted: bool, room: int) -> contextlib.AbstractContextManager[Callable[[list[int]], Any]]:
        """Decode in a new context, which shares no keys and values with others."""
        return self.context([(self.adapter, 1.0)] if adapted else [], room=room)

    @contextlib.contextmanager
    def context(
        self, adapters: Sequence[tuple[Any, float]], *, room: int, batch_size: int | None = None
    ) -> Iterator[Callable[[list[int]], Any]]:
        """Decode as `start_decoding` with adapters and their weights, at most `batch_size` tokens at once; None for all."""
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = max(room, 64)
        settings.n_batch = settings.n_ubatch = min(settings.n_ctx, batch_size or settings.n_ctx)
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = _NO_FLASH
        context = self._lib.llama_init_from_model(self._model, settings)
        if context == self._ffi.NULL:
            problem = f"llama.cpp cannot make a context of {room:,} tokens ({_failure_reason(self._log)})"
            raise RefusedError(self.location, problem, "Ask for fewer tokens")
        try:
            if adapters:
                pointers = self._ffi.new("struct llama_adapter_lora *[]", [handle for handle, _ in adapters])
                weights = self._ffi.new("float[]", [weight for _, weight in adapters])
                self._lib.llama_set_adapters_lora(context, pointers, len(adapters), weights)
            token_count = 0

            def logits_after(ids: list[int]) -> Any:
                nonlocal token_count
                token_count += len(ids)
                return self._decode(context, ids, token_count - len(ids))

            yield logits_after
        finally:
            self._lib.llama_free(context)

    def _decode(self, context: Any, ids: list[int], position: int) -> Any:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
                batch.seq_id[i][0] = 0
                # Only the logits of the last token are needed.
                batch.logits[i] = i == len(ids) - 1
            if self._lib.llama_decode(context, batch):
                raise RefusedError(self.location, f"llama.cpp cannot compute the next token ({_failure_reason(self._log)})")
            pointer = self._lib.llama_get_logits_ith(context, len(ids) - 1)
            return np.frombuffer(self._ffi.buffer(pointer, 4 * self.size), np.float32).copy()
        finally:
            self._lib.llama_batch_free(batch)

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the answer to the last prompt: by its adapter's template, or by the vocabulary."""
        return token == self._end or bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def pieces(self) -> Callable[[int], str]:
        """Return a function that decodes the bytes of tokens as UTF-8, which tokens may split anywhere."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.bytes_of(token, special=False))

    def token_text(self, token: int) -> str:
        """Return the text of a single token, or the name of a special one."""
        return self.bytes_of(token, special=True).decode(errors="replace")

    def bytes_of(self, token: int, *, special: bool) -> bytes:
        """Return the bytes of a token in text; with `special`, also the name of a token that has no text."""
        buffer = self._ffi.new("char[]", 256)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, 256, 0, special)
        return bytes(self._ffi.buffer(buffer, max(count, 0)))
