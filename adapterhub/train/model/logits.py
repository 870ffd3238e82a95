"""What a model makes of the numbers of its output layer, so that the loss can do the same without ever holding them all.

Granite divides them (`logits_scaling`), Cohere and Falcon-H1 multiply them, Gemma bounds them (`final_logit_softcapping`).
Which of these keys a model heeds is in its code alone, so the model is asked: it gets hidden states of ours in the place of its
decoder's, and what comes out has to be what the loss would compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_converters.errors import RefusedError

Tensor = Any
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_PROBED = 4  # tokens whose logits are compared
_SPREAD = 20.0  # of these logits: far enough for a bound to show


@dataclass(frozen=True)
class Logits:
    """`cap * tanh(scale * z / cap)` of the output layer's `z`; `scale * z` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, z: Tensor) -> Tensor:
        """The logits, float32."""
        scaled = z.float() * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


def logits_of(model: Any, where: str) -> Logits:
    """How `model`, whose weights are there, changes its logits; RefusedError if in no way that is known."""
    head = model.get_output_embeddings()
    said = _said(model.config.get_text_config())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBED, head.weight.shape[1], generator=generator).to(head.weight)
    with torch.no_grad():
        z = torch.nn.functional.linear(hidden, head.weight)
        hidden *= _SPREAD / (said.scale * float(z.float().std()) or 1.0)
        z = torch.nn.functional.linear(hidden, head.weight, head.bias)
        with _answering(model, hidden):
            # Some models have the shape of the embeddings from their ids.
            given = model(input_ids=torch.zeros(1, _PROBED, dtype=torch.long, device=hidden.device), use_cache=False).logits
    for logits in (said, Logits()):
        own = logits.of(z)
        if own.shape == given.shape and float((own - given.float()).abs().max()) <= _error(head.weight.dtype, own):
            return logits
    raise RefusedError(where, f"{type(model).__name__} changes its logits in a way that the loss here does not know")


def _error(dtype: Any, logits: Tensor) -> float:
    return 8 * float(torch.finfo(dtype).eps) * float(logits.abs().max())


def _said(config: Any) -> Logits:
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, key, None) or 1.0
    cap = next((value for key in _CAPS if (value := getattr(config, key, None))), None)
    return Logits(scale / (getattr(config, "logits_scaling", None) or 1.0), cap)


@contextmanager
def _answering(model: Any, hidden: Tensor) -> Iterator[None]:
    """Within the block the decoder gives `hidden`, whatever it is asked, and nothing else."""
    from transformers.modeling_outputs import BaseModelOutput

    class Answer(BaseModelOutput):  # type: ignore[misc]
        def __getattr__(self, _: str) -> None:
            return None

    asked = {id(module): module for module in (model.base_model, model.get_decoder())}  # OPT goes past the first
    for module in asked.values():
        module.forward = lambda *_, **__: Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        for module in asked.values():
            del module.forward
