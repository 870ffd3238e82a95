"""The base model as the loop uses it: hidden states, output layer, and what the model does to its logits.

Granite divides them (`logits_scaling`), Cohere and Falcon-H1 multiply them, Gemma caps them (`final_logit_softcapping`);
running the model shows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapterhub.training.layers import embeddings, varlen
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_PROBE_TOKENS = 4  # tokens whose logits are compared with those of the model
_PROBE_SPREAD = 20.0  # the standard deviation of these logits, large enough for a cap to show


@dataclass(frozen=True)
class Logits:
    """The logits computed from the output layer's `z`: `cap * tanh(scale * z / cap)`, or `scale * z` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, z: Tensor) -> Tensor:
        """Return the logits, float32."""
        scaled = z.float() * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


@dataclass(frozen=True, eq=False)
class Base:
    """A model with frozen linear layers and with LoRA on its targets, and its tokenizer; `notes` are for the user.

    With `by_documents`, its attention gets the starts of documents instead of a mask (`layers.varlen`).
    """

    model: nn.Module
    tokenizer: Any
    targets: tuple[str, ...]
    logits: Logits = field(default_factory=Logits)
    notes: tuple[str, ...] = ()
    by_documents: bool = False

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.head.device

    @property
    def head(self) -> Any:
        """The weight of the output layer, `(vocab, hidden)`."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Any:
        """The bias of the output layer, `(vocab,)`, or None."""
        return self.model.get_output_embeddings().bias

    @property
    def head_rows(self) -> embeddings.TokenRows | None:
        """The trained rows of the output layer, if it is tied to a table with trained rows."""
        rows = embeddings.token_rows(self.model)
        return rows if rows is not None and rows.weight is self.head else None

    def documents(self, positions: np.ndarray) -> varlen.Documents | None:
        """Return the documents of rows for `states`; None if the model infers them from the positions."""
        return varlen.documents_at(positions, self.device) if self.by_documents else None

    def states(self, ids: Tensor, positions: Tensor, documents: varlen.Documents | None = None) -> Tensor:
        """Return the last hidden states `(rows, tokens, hidden)` for int64 `(rows, tokens)`."""
        model, text_config = decoder(self.model), self.model.config.get_text_config()
        if "mrope_section" in (getattr(text_config, "rope_parameters", None) or {}):
            # The first are positions in the text, which separate documents; those in time, height and width are the same for
            # text.
            positions = positions.expand(4, *positions.shape)
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"position_ids": positions} if takes_positions else {}
        if documents is not None:
            # Unless it gets a mask, transformers makes one over all pairs of tokens from the positions.
            options |= {"attention_mask": varlen.empty_mask(ids.device), "documents": documents}
        return model(input_ids=ids, use_cache=False, **options).last_hidden_state


def decoder(model: nn.Module) -> Any:
    """Return the part of `model` from ids to hidden states; of a vision-language model, its text model."""
    return model.base_model if model.config.get_text_config() is model.config else model.get_decoder()


def remove_vision(model: nn.Module) -> tuple[str, ...]:
    """Remove the parts of a vision-language model that text does not pass through, and return their paths."""
    inner_model, text_model = model.base_model, decoder(model)
    unused_names = [
        name for name, child in inner_model.named_children() if not any(module is text_model for module in child.modules())
    ]
    if inner_model is text_model:
        return ()
    for name in unused_names:
        setattr(inner_model, name, None)
    return tuple(f"{model.base_model_prefix}.{name}" for name in unused_names)


# ---- Logits


def logits_of(model: nn.Module, location: str) -> Logits:
    """Return how `model`, whose weights are loaded, computes its logits.

    The model gets random hidden states from its decoder, and its logits have to equal those that the loss computes from them.

    Raises:
        RefusedError: It computes them in a way that the loss does not support.
    """
    head = model.get_output_embeddings()
    configured = _configured_logits(model.config.get_text_config())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, head.weight.shape[1], generator=generator).to(head.weight)
    # The states are scaled so that a cap would change the logits visibly.
    with torch.no_grad():
        z = torch.nn.functional.linear(hidden, head.weight)
        hidden *= _PROBE_SPREAD / (configured.scale * float(z.float().std()) or 1.0)
        z = torch.nn.functional.linear(hidden, head.weight, head.bias)
        with _decoder_returning(model, hidden):
            # The ids are ignored, but some models take the shape of the embeddings from them.
            actual = model(
                input_ids=torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=hidden.device), use_cache=False
            ).logits
    for logits in (configured, Logits()):
        expected = logits.apply(z)
        error = 8 * float(torch.finfo(head.weight.dtype).eps) * float(expected.abs().max())
        if expected.shape == actual.shape and float((expected - actual.float()).abs().max()) <= error:
            return logits
    raise RefusedError(location, f"{type(model).__name__} computes its logits in a way that the loss does not support")


def _configured_logits(config: Any) -> Logits:
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, key, None) or 1.0
    cap = next((value for key in _CAPS if (value := getattr(config, key, None))), None)
    return Logits(scale / (getattr(config, "logits_scaling", None) or 1.0), cap)


@contextmanager
def _decoder_returning(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within the block, make the decoder return `hidden` for any input."""
    from transformers.modeling_outputs import BaseModelOutput

    class Answer(BaseModelOutput):  # type: ignore[misc]
        def __getattr__(self, _: str) -> None:
            return None

    decoders = {id(module): module for module in (model.base_model, model.get_decoder())}  # OPT calls its decoder directly
    for module in decoders.values():
        module.forward = lambda *_, **__: Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        for module in decoders.values():
            del module.forward
