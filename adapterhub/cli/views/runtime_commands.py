"""The command that runs what a conversion wrote, in the program that the format is for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# What vLLM takes as --max-lora-rank (config/lora.py); 16 is its default.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_UNKNOWN = "BASE"


def of_adapter(style: str, target: Path, base: BaseSpec | None) -> str | None:
    """The command for an adapter in the format `style`; None where the format is for no runtime with a command."""
    name = target.name.removesuffix(".gguf")
    match style:
        case "gguf":
            model = base.where if base and base.kind == "gguf" else f"{_UNKNOWN}.gguf"
            return shlex.join(["llama-server", "-m", model, "--lora", str(target)])
        case "ollama":
            return shlex.join(["ollama", "create", name, "-f", str(target / "Modelfile")])
        case "mlx":
            words = ["mlx_lm.generate", "--model", _folder(base), "--adapter-path", str(target), "--prompt", "Hello"]
            return shlex.join(words)
        case "peft":
            rank, recorded = _of_config(target / "adapter_config.json")
            served = next((one for one in _RANKS if one >= rank), None)
            if served is None:
                return None
            more = ["--max-lora-rank", str(served)] if served > 16 else []
            words = ["vllm", "serve", _folder(base, recorded), "--enable-lora", "--lora-modules", f"{name}={target}", *more]
            return shlex.join(words)
    return None


def of_model(style: str, target: Path) -> str:
    """The command for a whole model, as GGUF or as a Hugging Face folder."""
    return shlex.join(["llama-server", "-m", str(target)] if style == "gguf" else ["vllm", "serve", str(target)])


def _folder(base: BaseSpec | None, recorded: str | None = None) -> str:
    """The base as a Hugging Face model: its folder, its name, or the name that the adapter records."""
    if base is not None and base.folder is not None:
        return str(base.folder)
    return (base.repo if base else None) or recorded or _UNKNOWN


def _of_config(path: Path) -> tuple[int, str | None]:
    """The largest rank that an adapter_config.json has, and the base that it names."""
    try:
        config = json_file.read_object(path)
    except AdapterhubError:
        return 0, None
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    base = config.get("base_model_name_or_path")
    return max((rank for rank in ranks if isinstance(rank, int)), default=0), base if isinstance(base, str) and base else None
