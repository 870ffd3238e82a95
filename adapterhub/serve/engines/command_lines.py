"""The command lines of engines. `more` are the user's own words, which come last and win."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterhub import runtime_commands

_HERE = ("--host", "127.0.0.1", "--port")


def llama_router(program: Path, preset: Path, port: int, *, more: Sequence[str]) -> list[str]:
    """llama.cpp's server that starts a process for each section of a preset file."""
    return _words(program, "--models-preset", preset, "--models-max", 0, "--no-ui", *_HERE, port, *more)


def llama_server(
    program: Path, base: Path, port: int, *, context: int, slots: int, adapters: Sequence[str], more: Sequence[str]
) -> list[str]:
    """llama.cpp's server with all adapters; `context` tokens for each of its slots."""
    # Its cache of prompts in RAM does not tell adapters apart (llama.cpp #26207).
    own = ("-c", context * slots, "-np", slots, "--no-kv-unified", "--cache-ram", 0, "--no-ui")
    lora = ("--lora", ",".join(adapters)) if adapters else ()
    return _words(program, "-m", base, *_HERE, port, *own, *lora, *more)


def llama_embeds(more: Sequence[str]) -> bool:
    """Whether llama.cpp's server is started for embeddings, and for nothing else."""
    return bool({"--embedding", "--embeddings"} & {*more})


def vllm(program: Sequence[str], base: Path, name: str, port: int, *, rank: int, most: int, more: Sequence[str]) -> list[str]:
    """vLLM's server, whose base has a name; for so many adapters in a batch, of this rank at most."""
    own = ("--model", base, "--served-model-name", name, *_HERE, port)
    largest = runtime_commands.vllm_rank(rank) or runtime_commands.VLLM_RANKS[-1]
    lora = ("--enable-lora", "--max-loras", most, "--max-cpu-loras", 4 * most, "--max-lora-rank", largest)
    return _words(*program, *own, *lora, *more)


def sglang(program: Sequence[str], base: Path, name: str, port: int, *, rank: int, most: int, more: Sequence[str]) -> list[str]:
    """SGLang's server, whose base has a name; for so many adapters, of this rank at most."""
    own = ("--model-path", base, "--served-model-name", name, *_HERE, port)
    # Strict: else weights that match no module are left out with a warning.
    lora = ("--enable-lora", "--lora-strict-loading", "--max-lora-rank", rank, "--lora-target-modules", "all")
    return _words(*program, *own, *lora, "--max-loaded-loras", most, *more)


def mlx(program: Sequence[str], base: Path, port: int, *, more: Sequence[str]) -> list[str]:
    """mlx-lm's server."""
    return _words(*program, "--model", base, *_HERE, port, *more)


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]
