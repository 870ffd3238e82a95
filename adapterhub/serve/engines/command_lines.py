"""The command lines of engines. `extra_words` come from the user; they are last, and override earlier options."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from adapterhub_converters import runtime_commands

VLLM_TEMPLATES = "--trust-request-chat-template"
"""The option with which vLLM takes chat templates in requests."""
_LOCAL_ADDRESS = ("--host", "127.0.0.1", "--port")


def llama_router(program: Path, preset: Path, port: int, *, extra_words: Sequence[str]) -> list[str]:
    """Return the command of llama.cpp's router, which starts a process for each section of a preset file."""
    return _words(program, "--models-preset", preset, "--models-max", 0, "--no-ui", *_LOCAL_ADDRESS, port, *extra_words)


def llama_server(
    program: Path,
    base: Path,
    port: int,
    *,
    context: int,
    slots: int,
    adapters: Sequence[str],
    template: Path | None = None,
    extra_words: Sequence[str],
) -> list[str]:
    """Return the command of llama.cpp's server with all adapters, with `context` tokens for each of its slots."""
    # Its prompt cache in RAM does not distinguish adapters (llama.cpp #26207).
    server_words = ("-c", context * slots, "-np", slots, "--no-kv-unified", "--cache-ram", 0, "--no-ui")
    lora = ("--lora", ",".join(adapters)) if adapters else ()
    own_template = _option("--chat-template-file", template)
    return _words(program, "-m", base, *_LOCAL_ADDRESS, port, *server_words, *lora, *own_template, *extra_words)


def llama_embeds(extra_words: Sequence[str]) -> bool:
    """Return whether llama.cpp's server is started for embeddings only, or for ranks, which it computes from them."""
    return bool({"--embedding", "--embeddings"} & {*extra_words}) or llama_reranks(extra_words)


def llama_reranks(extra_words: Sequence[str]) -> bool:
    """Return whether llama.cpp's server is started for ranks only."""
    return bool({"--rerank", "--reranking"} & {*extra_words})


def vllm(
    program: Sequence[str],
    base: Path,
    name: str,
    port: int,
    *,
    max_rank: int,
    max_adapters: int,
    context: int = 0,
    dtype: str = "",
    extra_words: Sequence[str],
) -> list[str]:
    """Return the command of vLLM's server, with a name for the base, for `max_adapters` of `max_rank` in a batch."""
    server_words: tuple[object, ...] = ("--model", base, "--served-model-name", name, *_LOCAL_ADDRESS, port)
    server_words += (*_option("--max-model-len", context), *_option("--dtype", dtype))
    lora: tuple[object, ...] = ("--enable-lora", "--max-loras", max_adapters, "--max-cpu-loras", 4 * max_adapters)
    lora += ("--max-lora-rank", vllm_max_rank(max_rank))
    # Without the first, it does not say how many tokens of a prompt were in its cache; without the second, it takes no template
    # for a version that was trained with one of its own.
    return _words(*program, *server_words, *lora, "--enable-prompt-tokens-details", VLLM_TEMPLATES, *extra_words)


def vllm_max_rank(rank: int, extra_words: Sequence[str] = ()) -> int:
    """Return the maximum rank that vLLM is started for, to load adapters of a rank; 0 if the user's words may change it."""
    if any(word.replace("_", "-").startswith(("--max-lora-rank", "--config")) for word in extra_words):
        return 0
    return runtime_commands.vllm_rank(rank) or runtime_commands.VLLM_RANKS[-1]


def vllm_has_priorities(extra_words: Sequence[str]) -> bool:
    """Return whether vLLM is started with `--scheduling-policy priority`."""
    words = " ".join(extra_words).replace("=", " ").replace("_", "-").split()
    return ("--scheduling-policy", "priority") in itertools.pairwise(words)


def sglang(
    program: Sequence[str],
    base: Path,
    name: str,
    port: int,
    *,
    max_rank: int,
    max_adapters: int,
    context: int = 0,
    dtype: str = "",
    extra_words: Sequence[str],
) -> list[str]:
    """Return the command of SGLang's server, with a name for the base, for `max_adapters` of `max_rank`."""
    server_words: tuple[object, ...] = ("--model-path", base, "--served-model-name", name, *_LOCAL_ADDRESS, port)
    server_words += (*_option("--context-length", context), *_option("--dtype", dtype))
    # Strict, because otherwise weights that match no module are skipped with a warning.
    lora = ("--enable-lora", "--lora-strict-loading", "--max-lora-rank", max_rank, "--lora-target-modules", "all")
    return _words(*program, *server_words, *lora, "--max-loaded-loras", max_adapters, *extra_words)


def mlx(program: Sequence[str], base: Path, port: int, *, extra_words: Sequence[str]) -> list[str]:
    """Return the command of mlx-lm's server."""
    return _words(*program, "--model", base, *_LOCAL_ADDRESS, port, *extra_words)


def _option(name: str, value: object) -> tuple[object, ...]:
    """Return an option with its value; nothing without a value."""
    return (name, value) if value else ()


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]
