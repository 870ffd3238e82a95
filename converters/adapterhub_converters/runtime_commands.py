"""The commands that run an adapter or a model in the program that its format is for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# The values that vLLM accepts as --max-lora-rank (config/lora.py); 16 is its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_UNKNOWN_BASE = "BASE"


def vllm_rank(rank: int) -> int | None:
    """Return the smallest maximum rank that vLLM accepts for a rank; None above all of them."""
    return next((maximum for maximum in VLLM_RANKS if maximum >= rank), None)


def vllm_rank_hint(rank: int) -> str:
    """Return what to do about an adapter whose rank is above the maximum of a running vLLM."""
    maximum = vllm_rank(rank)
    return f"Start vLLM with --max-lora-rank {maximum}" if maximum else f"Lower its rank; vLLM takes {VLLM_RANKS[-1]} at most"


def flags(runtime: str, name: str, adapter: str, *, rank: int, modules: Sequence[str] = (), base: str = "") -> tuple[str, ...]:
    """Return the options with which a runtime's server loads an adapter under a name.

    Args:
        runtime: One of the runtimes that have verdicts.
        name: The name of the adapter in requests.
        adapter: Its folder or file.
        rank: The largest rank of its modules.
        modules: The last parts of the names of its modules.
        base: The base model; empty if unknown.
    """
    match runtime:
        case "vllm":
            lora_module = {"name": name, "path": adapter, **({"base_model_name": base} if base else {})}
            return ("--enable-lora", "--max-lora-rank", str(vllm_rank(rank) or rank), "--lora-modules", json.dumps(lora_module))
        case "sglang":
            # Strict loading: otherwise weights that match no module are left out with a warning.
            lora_module = {"lora_name": name, "lora_path": adapter}
            options = ("--enable-lora", "--lora-strict-loading", "--max-lora-rank", str(rank))
            return (*options, "--lora-target-modules", *modules, "--lora-paths", json.dumps(lora_module))
        case "llama.cpp":
            # Its cache of prompts in RAM does not tell adapters apart (llama.cpp #26207).
            return ("--lora", adapter, "--cache-ram", "0")
        case "mlx":
            return ("--adapter-path", adapter)
    return ()


def vllm(name: str, adapter: str, base: str, *, rank: int) -> str | None:
    """Return the command to serve an adapter by vLLM under a name; None for a rank above those that vLLM accepts."""
    max_rank = vllm_rank(rank)
    if max_rank is None:
        return None
    rank_options = ["--max-lora-rank", str(max_rank)] if max_rank > 16 else []
    return shlex.join(
        ["vllm", "serve", base or _UNKNOWN_BASE, "--enable-lora", "--lora-modules", f"{name}={adapter}", *rank_options]
    )


def llama_server(model: str, adapter: str) -> str:
    """Return the command to serve an adapter in GGUF by llama.cpp, on a base in GGUF."""
    return shlex.join(["llama-server", "-m", model or f"{_UNKNOWN_BASE}.gguf", "--lora", adapter])


def mlx(base: str, adapter: str) -> str:
    """Return the command to generate text by mlx-lm."""
    return shlex.join(["mlx_lm.generate", "--model", base or _UNKNOWN_BASE, "--adapter-path", adapter, "--prompt", "Hello"])


def ollama(name: str, folder: str) -> str:
    """Return the command to add a folder with a Modelfile to Ollama."""
    return shlex.join(["ollama", "create", name, "-f", f"{folder}/Modelfile"])


def adapter_command(style: str, target: Path, base: BaseSpec | None) -> str | None:
    """Return the command for an adapter in the format `style`.

    None if no runtime with a command reads the format, or the base is unknown: the command could only be completed by hand.
    """
    name = target.name.removesuffix(".gguf")
    match style:
        case "gguf":
            return _llama_server_on(base, str(target)) if base else None
        case "ollama":
            return ollama(name, str(target))
        case "mlx":
            model = _folder(base, _recorded_base(target / "adapter_config.json", "model"))
            return mlx(model, str(target)) if model else None
        case "peft":
            rank, recorded = _rank_and_base(target / "adapter_config.json")
            model = _folder(base, recorded)
            return vllm(name, str(target), model, rank=rank) if model else None
    return None


def model_command(style: str, target: Path) -> str:
    """Return the command for a whole model, as GGUF or as a Hugging Face folder."""
    return shlex.join(["llama-server", "-m", str(target)] if style == "gguf" else ["vllm", "serve", str(target)])


def _folder(base: BaseSpec | None, recorded: str | None = None) -> str:
    """Return the base as a Hugging Face model: its folder, its name, or the name that the adapter records; empty if unknown."""
    if base is not None and base.folder is not None:
        return str(base.folder)
    return (base.repo if base else None) or recorded or ""


def _llama_server_on(base: BaseSpec, adapter: str) -> str | None:
    """Return the command for an adapter in GGUF, after those that make its base a GGUF file here, unless there is one.

    None if nobody knows where the base is from.
    """
    if base.kind == "gguf":
        return llama_server(str(base.source), adapter)
    name = Path(base.repo or str(base.folder or "")).name
    if not name:
        return None
    commands, file = [llama_server(f"{name}.gguf", adapter)], Path(f"{name}.gguf")
    if not file.exists():
        folder = str(base.folder or name)
        commands.insert(0, shlex.join(["adapterhub", "convert", folder, str(file)]))
        if base.folder is None:
            commands.insert(0, shlex.join(["hf", "download", str(base.repo), "--local-dir", name]))
    return " && ".join(commands)


def _recorded_base(path: Path, key: str) -> str | None:
    """Return the base that a config names by a key."""
    try:
        base = json_file.read_object(path).get(key)
    except AdapterhubError:
        return None
    return base if isinstance(base, str) and base else None


def _rank_and_base(path: Path) -> tuple[int, str | None]:
    """Return the largest rank that an adapter_config.json has, and the base that it names."""
    try:
        config = json_file.read_object(path)
    except AdapterhubError:
        return 0, None
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0), _recorded_base(path, "base_model_name_or_path")
