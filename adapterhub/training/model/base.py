"""The base model as the loop uses it: its hidden states, its output layer, and two properties that only its code tells.

What a model does to its logits: Granite divides them (`logits_scaling`), Cohere and Falcon-H1 multiply them, Gemma bounds them
(`final_logit_softcapping`). And whether it separates the documents of a row: positions that restart tell most attention where
a document begins, but recurrent layers, convolutions over tokens, and models without positions read on, so that part of what
they learn from one document would come from another. Both are found by running the model on inputs made for the purpose.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adapterhub.training.data.dataset import IGNORED, Rows
from adapterhub.training.layers import embeddings
from adapterhub_converters.errors import RefusedError

Tensor = Any
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_PROBED = 4  # tokens whose logits are compared
_SPREAD = 20.0  # of these logits: far enough for a bound to show
_FIRST, _SECOND, _PAIRS = 7, 9, 3  # tokens of the two documents that are compared, and how many pairs of them


@dataclass(frozen=True)
class Logits:
    """Logits computed as `cap * tanh(scale * z / cap)` from the output layer's `z`; as `scale * z` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, z: Tensor) -> Tensor:
        """Return the logits, float32."""
        scaled = z.float() * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


@dataclass(frozen=True, eq=False)
class Base:
    """A model with frozen linear layers and with LoRA on its targets, and its tokenizer; `notes` are for the user."""

    model: Any
    tokenizer: Any
    targets: tuple[str, ...]
    logits: Logits = field(default_factory=Logits)
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> Any:
        """The device that it computes on."""
        return self.head.device

    @property
    def head(self) -> Any:
        """The output layer's weight, `(vocab, hidden)`."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Any:
        """The output layer's bias, `(vocab,)`, or None."""
        return self.model.get_output_embeddings().bias

    @property
    def head_rows(self) -> embeddings.TokenRows | None:
        """The trained rows of the output layer, where it is tied to a table with trained rows."""
        rows = embeddings.token_rows(self.model)
        return rows if rows is not None and rows.weight is self.head else None

    def states(self, ids: Any, positions: Any) -> Any:
        """Return the last hidden states `(rows, tokens, hidden)` of int64 `(rows, tokens)`."""
        takes_positions = "position_ids" in inspect.signature(self.model.base_model.forward).parameters
        options = {"position_ids": positions} if takes_positions else {}
        return self.model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state


# ---- Logits


def logits_of(model: Any, where: str) -> Logits:
    """Return how `model`, with its weights loaded, computes its logits.

    It gets hidden states in place of its decoder's, and its logits have to be what the loss would compute from them.

    Raises:
        RefusedError: It computes them in a way that the loss does not support.
    """
    head = model.get_output_embeddings()
    configured = _configured(model.config.get_text_config())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBED, head.weight.shape[1], generator=generator).to(head.weight)
    with torch.no_grad():
        z = torch.nn.functional.linear(hidden, head.weight)
        hidden *= _SPREAD / (configured.scale * float(z.float().std()) or 1.0)
        z = torch.nn.functional.linear(hidden, head.weight, head.bias)
        with _decoder_returning(model, hidden):
            # Some models take the shape of the embeddings from their ids.
            actual = model(input_ids=torch.zeros(1, _PROBED, dtype=torch.long, device=hidden.device), use_cache=False).logits
    for logits in (configured, Logits()):
        own = logits.of(z)
        error = 8 * float(torch.finfo(head.weight.dtype).eps) * float(own.abs().max())
        if own.shape == actual.shape and float((own - actual.float()).abs().max()) <= error:
            return logits
    raise RefusedError(where, f"{type(model).__name__} computes its logits in a way that the loss does not support")


def _configured(config: Any) -> Logits:
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, key, None) or 1.0
    cap = next((value for key in _CAPS if (value := getattr(config, key, None))), None)
    return Logits(scale / (getattr(config, "logits_scaling", None) or 1.0), cap)


@contextmanager
def _decoder_returning(model: Any, hidden: Tensor) -> Iterator[None]:
    """Make the decoder return `hidden`, for any input, within the block."""
    from transformers.modeling_outputs import BaseModelOutput

    class Answer(BaseModelOutput):  # type: ignore[misc]
        def __getattr__(self, _: str) -> None:
            return None

    decoders = {id(module): module for module in (model.base_model, model.get_decoder())}  # OPT calls the second directly
    for module in decoders.values():
        module.forward = lambda *_, **__: Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        for module in decoders.values():
            del module.forward


# ---- Documents that share a row


def check_isolation(base: Base, data: Iterable[Rows | None], where: str) -> None:
    """Refuse rows of several documents for a model that does not separate them."""
    if any(rows is not None and share_rows(rows) for rows in data) and not isolates_documents(base):
        what = f"{type(base.model).__name__} does not separate the documents that share a row"
        raise RefusedError(f"{where}: [data] pack", what, "Set pack = false")


def share_rows(rows: Rows) -> bool:
    """Return whether any row has labels in a document behind the first."""
    behind = np.logical_or.accumulate((rows.positions == 0) & (np.arange(rows.positions.shape[1]) > 0), axis=1)
    return bool((behind & (rows.labels != IGNORED)).any())


def isolates_documents(base: Base) -> bool:
    """Return whether a document's first state is the same behind another document as at the start of a row."""
    generator = torch.Generator().manual_seed(0)
    length = _FIRST + _SECOND
    behind = torch.randint(0, len(base.head), (_PAIRS, length), generator=generator)
    alone = torch.cat([behind[:, _FIRST:], behind[:, :_FIRST]], dim=1)
    first, second = torch.arange(_FIRST), torch.arange(_SECOND)
    positions = torch.stack([torch.cat([first, second])] * _PAIRS + [torch.cat([second, first])] * _PAIRS)
    base.model.eval()
    with torch.no_grad():
        device = base.head.device
        states = base.states(torch.cat([behind, alone]).to(device), positions.to(device)).float()
    base.model.train()
    behind_another, at_start = states[:_PAIRS, _FIRST], states[_PAIRS:, 0]
    # The median: rounding may send one of the tokens to another expert.
    error = float(((behind_another - at_start).norm(dim=1) / at_start.norm(dim=1).clamp(min=1e-30)).median())
    return error <= 16 * math.pow(torch.finfo(base.head.dtype).eps, 0.75)
