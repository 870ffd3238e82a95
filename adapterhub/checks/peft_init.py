"""The values of `init_lora_weights` with which peft fails, which it compares with or without case by the kind of module.

peft 0.21.2: `tuners/lora/layer.py`, `update_layer` of the layers and `reset_lora_parameters`; `tuners/lora/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .peft_base import CONVOLUTION, EMBEDDING
from .peft_targets import RefusalError

_ITERATIONS = "pissa_niter_"


def check_init(config: Mapping[str, Any], kind: str, r: int) -> None:
    """Raise for an initialization with which peft cannot build a layer of a kind and a rank, though it loads its factors."""
    init = config.get("init_lora_weights", True)
    if config.get("lora_bias") and not isinstance(init, bool):
        raise RefusalError(f"lora_bias=True is only supported with init_lora_weights=True or False, got {str(init)[:40]!r}")
    if not init or not isinstance(init, str):
        return
    if init == "loftq" and (kind == EMBEDDING or not config.get("loftq_config")):
        raise RefusalError("`loftq_config` must be specified, and LoftQ has no embeddings")
    if kind == EMBEDDING or init in ("loftq", "lora_ga") or init.lower() == "gaussian":
        return
    if kind != CONVOLUTION:
        _check_linear(init, r)
        return
    raise _unknown(init)


def _check_linear(init: str, r: int) -> None:
    if init.startswith("corda"):
        raise RefusalError("`eigens` attribute not found for layer, please run `preprocess_corda` first.")
    if init == "orthogonal" and r % 2:
        raise RefusalError(f"Orthogonal initialization requires the LoRA rank to be even, got {r}")
    is_pissa = init == "pissa" or (init.startswith(_ITERATIONS) and init.removeprefix(_ITERATIONS).isdecimal())
    if not is_pissa and init not in ("eva", "orthogonal") and init.lower() not in ("olora", "mica"):
        raise _unknown(init)


def _unknown(init: str) -> RefusalError:
    return RefusalError(f"Unknown initialization init_lora_weights={init[:40]!r}")
