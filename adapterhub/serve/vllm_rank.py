"""The largest rank that a vLLM has memory for: what exceeds it is refused with the option to raise, before vLLM fails."""

from __future__ import annotations

import gc

from adapterhub_converters import runtime_commands
from adapterhub_converters.errors import RefusedError

ABOVE = "rank-above-max"
"""The code of the error."""


def check(location: str, rank: int, maximum: int) -> None:
    """Raise RefusedError for a rank above the maximum of a vLLM; 0 for a maximum that is not known."""
    if maximum and rank > maximum:
        raise RefusedError(location, f"has rank {rank}, and vLLM was started for {maximum}", raise_hint(rank), code=ABOVE)


def raise_hint(rank: int) -> str:
    """Return what to do about an adapter of such a rank."""
    wanted = runtime_commands.vllm_rank(rank)
    most = runtime_commands.VLLM_RANKS[-1]
    return f"Start vLLM with --max-lora-rank {wanted}" if wanted else f"Lower its rank; vLLM takes {most} at most"


def maximum_here() -> int:
    """Return the maximum of the vLLM in this process; 0 if it has none yet.

    vLLM gives its configuration to no plugin, so it is found among the objects of the process.
    """
    from vllm.config import LoRAConfig

    return max((config.max_lora_rank for config in gc.get_objects() if type(config) is LoRAConfig), default=0)
