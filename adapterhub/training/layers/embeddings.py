"""Trainable parts of an embedding table: a low-rank delta, or single rows as a whole.

The delta is peft's (`tuners/lora/layer.py`, `Embedding`): A `(r, vocab)` starts at zero, B `(d, r)` normal, there is no
dropout, and an output layer tied to the table keeps the base's weight. Rows (`tuners/trainable_tokens`) are different: a
tied output layer has them too. They are written into the frozen table before each use, so that no second table exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training.config import LoRAConfig
from adapterhub_converters.adapter import scaling
from adapterhub_converters.errors import RefusedError

from .lora import replace_module


class LoRAEmbedding(nn.Module):  # type: ignore[misc]
    """A frozen table with a trainable low-rank delta."""

    def __init__(self, table: Any, *, r: int, alpha: float, rslora: bool) -> None:
        super().__init__()
        vocabulary, size = table.weight.shape
        self.table = table
        self.alpha, self.rslora = alpha, rslora
        self.scaling = scaling(alpha, r, rslora=rslora)
        self.lora_A = nn.Parameter(torch.zeros(r, vocabulary, device=table.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(size, r, device=table.weight.device))

    @property
    def weight(self) -> Any:
        """The table's own weight."""
        return self.table.weight

    def reset(self, generator: torch.Generator) -> None:
        """Initialize A with zeros and B from a normal distribution: no delta yet."""
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.copy_(torch.empty(self.lora_B.shape).normal_(generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 `(…)` to `(…, d)`."""
        found = self.table(ids)
        picked = nn.functional.embedding(ids, self.lora_A.t(), self.table.padding_idx).to(found.dtype)
        delta = picked @ self.lora_B.t().to(found.dtype) * self.scaling
        scale = getattr(self.table, "embed_scale", None)  # Gemma's tables multiply their output
        return found + (delta if scale is None else delta * scale.to(found.dtype))


class TokenRows(nn.Module):  # type: ignore[misc]
    """A frozen table with some trained rows: `rows` `(len(ids), d)`, float32."""

    def __init__(self, table: Any, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.table, self.ids = table, ids
        device = table.weight.device
        self.places = torch.tensor(ids).to(device)
        slots = torch.full((len(table.weight),), -1).index_put_((torch.tensor(ids),), torch.arange(len(ids)))
        self.slots = slots.to(device)
        self.initial = table.weight[self.places].float()
        self.rows = nn.Parameter(self.initial.clone())

    @property
    def weight(self) -> Any:
        """The table, with the current rows."""
        self.write()
        return self.table.weight

    def write(self) -> None:
        """Copy the current rows into the table, and so into an output layer that is tied to it."""
        with torch.no_grad():
            self.table.weight.index_copy_(0, self.places, self.rows.to(self.table.weight.dtype))

    def reset(self, _: torch.Generator) -> None:
        """Start from the base's rows."""
        with torch.no_grad():
            self.rows.copy_(self.initial)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 `(…)` to `(…, d)`."""
        found = self.table(ids)
        slots = self.slots[ids]
        scale = getattr(self.table, "embed_scale", None)
        own = nn.functional.embedding(slots.clamp(min=0), self.rows).to(found.dtype)
        return torch.where((slots >= 0).unsqueeze(-1), own if scale is None else own * scale.to(found.dtype), found)


def tables(model: nn.Module) -> dict[str, Any]:
    """Return path to module of the embedding tables that can be targets: the input's."""
    own = model.get_input_embeddings()
    return {path: module for path, module in model.named_modules() if module is own}


def adapt(model: nn.Module, targets: tuple[str, ...], sizes: Any, config: LoRAConfig, where: str) -> None:
    """Replace tables by trained ones; their weights are loaded already."""
    for path, table in tables(model).items():
        if path in targets:
            other = next((key for key in ("dora", "lora_bias", "trainable_token_indices") if getattr(config, key)), None)
            if other:
                raise RefusedError(f"{where}: [lora] {other}", f"cannot be combined with LoRA on {path} yet")
            new: Any = LoRAEmbedding(table, r=sizes.rank(path), alpha=sizes.alpha(path), rslora=config.rslora)
            replace_module(model, path, new)
        elif config.trainable_token_indices:
            ids = config.trainable_token_indices
            if len(set(ids)) < len(ids) or not all(0 <= token < len(table.weight) for token in ids):
                raise RefusedError(
                    f"{where}: [lora] trainable_token_indices",
                    f"must be distinct ids below {len(table.weight)}, the table's size",
                )
            replace_module(model, path, TokenRows(table, ids))


def token_rows(model: nn.Module) -> TokenRows | None:
    """Return the input's table if it has trained rows."""
    table = model.get_input_embeddings()
    return table if isinstance(table, TokenRows) else None
