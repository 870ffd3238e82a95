"""The largest rank that a vLLM has memory for: what exceeds it is refused with the option to raise, before vLLM fails."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from adapterhub_converters import runtime_commands
from adapterhub_converters.errors import RefusedError

ABOVE = "rank-above-max"
"""The code of the error."""


def check(location: str, rank: int, maximum: int) -> None:
    """Raise RefusedError for a rank above the maximum of a vLLM; 0 for a maximum that is not known."""
    if maximum and rank > maximum:
        raise RefusedError(
            location, f"has rank {rank}, and vLLM was started for {maximum}", runtime_commands.vllm_rank_hint(rank), code=ABOVE
        )


def maximum_of_caller() -> int:
    """Return the maximum of the vLLM that is calling, as its resolvers are called; 0 if it is not found.

    vLLM gives its configuration to no plugin, and freezes its objects, so that the garbage collector lists none of them.
    """
    frame = sys._getframe().f_back
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        with suppress(AttributeError):
            return int(caller.engine_client.vllm_config.lora_config.max_lora_rank)
        frame = frame.f_back
    return 0
