"""The base model as the loop uses it: its hidden states, its output layer, and two properties that only its code tells.

What a model does to its logits: Granite divides them (`logits_scaling`), Cohere and Falcon-H1 multiply them, Gemma bounds them
(`final_logit_softcapping`). And whether it separates the documents of a row: positions that restart tell most attention where
a document begins, but recurrent layers, convolutions over tokens, and models without positions read on, so that part of what
they learn from one document would come from another. Both are found by running the model on inputs made for the purpose.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapterhub.training.data.rows import IGNORED, Packed, Rows
from adapterhub.training.layers import embeddings, varlen
from adapterhub_converters.errors import RefusedError

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_PROBED = 4  # tokens whose logits are compared
_SPREAD = 20.0  # of these logits: far enough for a bound to show
_FIRST, _SECOND = 7, 9  # tokens of the two documents that are made up
_ROUNDING = 0.05  # of the norm of all states: what 16 bits and many layers leave equal


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
    """A model with frozen linear layers and with LoRA on its targets, and its tokenizer; `notes` are for the user.

    `by_documents`: its attention gets where documents begin, in place of a mask (`layers.varlen`).
    """

    model: nn.Module
    tokenizer: Any
    targets: tuple[str, ...]
    logits: Logits = field(default_factory=Logits)
    notes: tuple[str, ...] = ()
    by_documents: bool = False

    @property
    def device(self) -> torch.device:
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

    def documents(self, positions: np.ndarray) -> varlen.Documents | None:
        """Return the documents of rows for `states`; None where the model reads them from the positions."""
        return varlen.documents_at(positions, self.device) if self.by_documents else None

    def states(self, ids: Tensor, positions: Tensor, documents: varlen.Documents | None = None) -> Tensor:
        """Return the last hidden states `(rows, tokens, hidden)` of int64 `(rows, tokens)`."""
        model, numbers = decoder(self.model), self.model.config.get_text_config()
        if "mrope_section" in (getattr(numbers, "rope_parameters", None) or {}):
            # Of the text, by which documents are told apart, and of time, height and width, which are the same for text.
            positions = positions.expand(4, *positions.shape)
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"position_ids": positions} if takes_positions else {}
        if documents is not None:
            # transformers makes masks from positions, all pairs of tokens, unless it gets one.
            options |= {"attention_mask": varlen.empty_mask(ids.device), "documents": documents}
        return model(input_ids=ids, use_cache=False, **options).last_hidden_state


def decoder(model: nn.Module) -> Any:
    """Return the part of `model` from ids to hidden states; of a vision-language model its text model."""
    return model.base_model if model.config.get_text_config() is model.config else model.get_decoder()


def remove_vision(model: nn.Module) -> tuple[str, ...]:
    """Remove the parts of a vision-language model that text does not pass; returns their paths."""
    inner, text = model.base_model, decoder(model)
    unused = [name for name, part in inner.named_children() if not any(module is text for module in part.modules())]
    if inner is text:
        return ()
    for name in unused:
        setattr(inner, name, None)
    return tuple(f"{model.base_model_prefix}.{name}" for name in unused)


# ---- Logits


def logits_of(model: nn.Module, where: str) -> Logits:
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
def _decoder_returning(model: nn.Module, hidden: Tensor) -> Iterator[None]:
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


def check_isolation(base: Base, data: Iterable[Rows | Packed], where: str, hint: str = "Set pack = false") -> None:
    """Refuse rows of several documents for a model that does not separate them."""
    if any(map(share_rows, data)) and not isolates_documents(base):
        what = f"{type(base.model).__name__} does not separate the documents that share a row"
        raise RefusedError(f"{where}: [data] pack", what, hint)


def share_rows(rows: Rows | Packed) -> bool:
    """Return whether any row has labels in a document behind the first."""
    for part in rows.parts():
        behind = np.logical_or.accumulate((part.positions == 0) & (np.arange(part.positions.shape[1]) > 0), axis=1)
        if (behind & (part.labels != IGNORED)).any():
            return True
    return False


def isolates_documents(base: Base) -> bool:
    """Return whether the states of a document depend on no token of the document before it in the row.

    The gradient of the second document's states toward the embeddings of the first has to be zero, each number of it: what a
    mask hides has weight 0, and so has its gradient, in every dtype. Comparing states would need a tolerance, since experts
    round differently with other tokens beside them, and in 16 bits one that hides the leak of most recurrent layers.
    """
    ids, positions = _two_documents(base)
    documents = base.documents(positions.numpy())
    embedded: list[Tensor] = []

    def watch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # some models scale their embeddings in place

    handle = base.model.get_input_embeddings().register_forward_hook(watch)
    base.model.eval()
    try:
        states = base.states(ids, positions.to(base.device), documents)[:, _FIRST:]
        upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
        (gradient,) = torch.autograd.grad(states, embedded, upstream)
    finally:
        handle.remove()
        base.model.train()
    return bool(gradient[:, _FIRST:].any()) and not gradient[:, :_FIRST].any()


def _two_documents(base: Base) -> tuple[Tensor, Tensor]:
    """Return random ids on the model's device, and positions on the CPU, of two documents in a row."""
    ids = torch.randint(0, len(base.head), (1, _FIRST + _SECOND), generator=torch.Generator().manual_seed(0))
    return ids.to(base.device), torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)])[None]


def by_documents(base: Base) -> Base:
    """Return the base with attention by documents where its model computes the same with it as with masks; else `base`.

    transformers marks models whose attention is right without a mask, for flash attention. Whether this one passes on what its
    attention needs, and needs no more, is found by running it on two documents.
    """
    if not getattr(base.model, "_supports_flash_attn", False):
        return base
    ids, positions = _two_documents(base)
    changed = replace(base, by_documents=True)
    documents, on_device = changed.documents(positions.numpy()), positions.to(base.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            base.model.train()
            changed.states(ids, on_device, documents)  # with dropout, which it would refuse
            base.model.eval()
            own, masked = changed.states(ids, on_device, documents).float(), base.states(ids, on_device).float()
        same = bool((own - masked).norm() <= _ROUNDING * masked.norm()) and isolates_documents(changed)
    except (RefusedError, RuntimeError, TypeError, ValueError):
        return base
    finally:
        base.model.train()
    return changed if same else base
