"""Trainable parts of an embedding table: a low-rank delta, or complete single rows.

The delta is peft's (`tuners/lora/layer.py`, `Embedding`): A `(r, vocab)` starts at zero, B `(d, r)` from a normal distribution,
there is no dropout, and an output layer tied to the table keeps the base's weight. Trained rows (`tuners/trainable_tokens`) are
different: a tied output layer has them too. They are written into the frozen table before each use, to avoid a second table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training.train_config import LoRAConfig
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
        """The weight of the table itself."""
        return self.table.weight

    def reset(self, generator: torch.Generator) -> None:
        """Initialize A with zeros and B from a normal distribution, so that there is no delta yet."""
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.copy_(torch.empty(self.lora_B.shape).normal_(generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings `(…, d)` of int64 ids `(…)`."""
        output = self.table(ids)
        columns = nn.functional.embedding(ids, self.lora_A.t(), self.table.padding_idx).to(output.dtype)
        delta = columns @ self.lora_B.t().to(output.dtype) * self.scaling
        scale = getattr(self.table, "embed_scale", None)  # Gemma's tables multiply their output
        return output + (delta if scale is None else delta * scale.to(output.dtype))


class TokenRows(nn.Module):  # type: ignore[misc]
    """A frozen table of which some rows are trained: `rows` `(len(ids), d)`, float32."""

    def __init__(self, table: Any, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.table, self.ids = table, ids
        device = table.weight.device
        self.places = torch.tensor(ids).to(device)
        # slots maps every id to its row among the trained ones, -1 for all others.
        slots = torch.full((len(table.weight),), -1).index_put_((torch.tensor(ids),), torch.arange(len(ids)))
        self.slots = slots.to(device)
        self.initial = table.weight[self.places].float()
        self.rows = nn.Parameter(self.initial.clone())

    @property
    def weight(self) -> Any:
        """The table with the current rows."""
        self.write()
        return self.table.weight

    def write(self) -> None:
        """Copy the current rows into the table, and thereby into an output layer that is tied to it."""
        with torch.no_grad():
            self.table.weight.index_copy_(0, self.places, self.rows.to(self.table.weight.dtype))

    def reset(self, _: torch.Generator) -> None:
        """Restart from the base's rows."""
        with torch.no_grad():
            self.rows.copy_(self.initial)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings `(…, d)` of int64 ids `(…)`."""
        output = self.table(ids)
        slots = self.slots[ids]
        scale = getattr(self.table, "embed_scale", None)
        # Ids without a trained row read row 0, which is not used below.
        trained_rows = nn.functional.embedding(slots.clamp(min=0), self.rows).to(output.dtype)
        return torch.where(
            (slots >= 0).unsqueeze(-1), trained_rows if scale is None else trained_rows * scale.to(output.dtype), output
        )


def tables(model: nn.Module) -> dict[str, Any]:
    """Return the embedding tables that can be targets, by path: that of the input."""
    input_table = model.get_input_embeddings()
    return {path: module for path, module in model.named_modules() if module is input_table}


def adapt(model: nn.Module, targets: tuple[str, ...], sizes: Any, config: LoRAConfig, location: str) -> None:
    """Replace tables whose weights are loaded by trainable ones."""
    for path, table in tables(model).items():
        if path in targets:
            conflict = next((key for key in ("dora", "lora_bias", "trainable_token_indices") if getattr(config, key)), None)
            if conflict:
                raise RefusedError(f"{location}: [lora] {conflict}", f"cannot be combined with LoRA on {path} yet")
            adapted: Any = LoRAEmbedding(table, r=sizes.rank(path), alpha=sizes.alpha(path), rslora=config.rslora)
            replace_module(model, path, adapted)
        elif config.trainable_token_indices:
            ids = config.trainable_token_indices
            # A repeated id would have two trained rows, of which the table can hold only one.
            if len(set(ids)) < len(ids) or not all(0 <= token < len(table.weight) for token in ids):
                raise RefusedError(
                    f"{location}: [lora] trainable_token_indices",
                    f"must be distinct ids below {len(table.weight)}, the table's size",
                )
            replace_module(model, path, TokenRows(table, ids))


def token_rows(model: nn.Module) -> TokenRows | None:
    """Return the input's table if it has trained rows."""
    table = model.get_input_embeddings()
    return table if isinstance(table, TokenRows) else None
