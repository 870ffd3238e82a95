"""Attention over tokens of several requests in one pass of the model, each with keys and values of its own.

A pass has one row: the tokens of its segments, one behind the other, with the positions that they have in their requests. All
other parts of a model treat tokens one by one, so that only attention has to know which belong together: it is registered with
transformers, and asks here. Segments are attended to one after the other, without padding: what a request computes does
not depend on the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_converters.errors import RefusedError

NAME = "adapterhub_segments"
BLOCK = 64
"""Queries that are attended to at a time. A segment starts at a multiple of it or is one token, so that the same token of a
prompt has the same products in whatever segments the prompt is read."""
_UNSUPPORTED = ("position_bias", "indices", "block_indices")
_now = threading.local()


Chunk = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of some tokens by layer, each `(kv_heads, tokens, head_dim)`."""


class KeysValues:
    """Keys `(kv_heads, tokens, head_dim)` and values of one request, by layer; room doubles when it is used up.

    Args:
        most: The number of tokens that there will be.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.layers: Chunk = {}

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return size_of(self.layers)

    @property
    def room(self) -> int:
        """The number of tokens that there is memory for."""
        return next((keys.shape[1] for keys, _ in self.layers.values()), 0)

    def written(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(kv_heads, count, head_dim)` from token `start` on; returns all up to there."""
        end = start + keys.shape[1]
        own = self.layers.get(layer)
        if own is None or end > own[0].shape[1]:
            room = max(end, min(max(2 * start, BLOCK), self.most))
            own = tuple(like.new_empty(like.shape[0], room, like.shape[2]) for like in (keys, values))
            for new, old in zip(own, self.layers.get(layer, ()), strict=False):
                new[:, :start] = old[:, :start]
            self.layers[layer] = own
        for all_of_them, some in zip(own, (keys, values), strict=True):
            all_of_them[:, start:end] = some
        return own[0][:, :end], own[1][:, :end]

    def copied(self, start: int, end: int) -> Chunk:
        """Return copies of those of some tokens."""
        return {layer: (k[:, start:end].clone(), v[:, start:end].clone()) for layer, (k, v) in self.layers.items()}

    def write(self, start: int, chunk: Chunk) -> None:
        """Write those that were copied from a request with the same beginning."""
        for layer, (keys, values) in chunk.items():
            self.written(layer, start, keys, values)


def size_of(chunk: Chunk) -> int:
    """Return bytes in memory."""
    return sum(part.numel() * part.element_size() for pair in list(chunk.values()) for part in pair)


@dataclass
class Segment:
    """Tokens of one request in a pass: `count` of them, behind the `start` whose keys and values are known."""

    keys_values: KeysValues
    start: int
    count: int


def register() -> str:
    """Register the attention with transformers, without a mask; returns its name for `set_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return NAME


@contextmanager
def passing(segments: Sequence[Segment]) -> Iterator[None]:
    """Have the attention of this thread use these segments within the block; further tokens of the row see nothing."""
    _now.segments = segments
    try:
        yield
    finally:
        del _now.segments


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend by transformers' contract: `(1, heads, tokens, head_dim)` in, `(1, tokens, heads, head_dim)` out."""
    more = next((name for name in _UNSUPPORTED if kwargs.get(name) is not None), None)
    if more:
        raise RefusedError(type(module).__name__, f"its attention needs {more}, which is not supported")
    layer = int(module.layer_idx)
    options = {
        "factor": kwargs.get("scaling") or query.shape[-1] ** -0.5,
        "window": kwargs.get("sliding_window"),
        "cap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }
    output = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    at = 0
    for segment in _now.segments:
        tokens = slice(at, at + segment.count)
        keys, values = segment.keys_values.written(layer, segment.start, key[0, :, tokens], value[0, :, tokens])
        for first in range(0, segment.count, BLOCK):
            some = slice(at + first, min(at + first + BLOCK, tokens.stop))
            end = segment.start + some.stop - at
            output[0, some] = _attended(query[0, :, some], keys[:, :end], values[:, :end], **options)
        at = tokens.stop
    return output, None


def _attended(
    query: Tensor, keys: Tensor, values: Tensor, *, factor: float, window: int | None, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend with the last tokens of a request.

    Args:
        query: `(heads, count, head_dim)`, of the last `count` of the tokens of `keys`.
        keys: `(kv_heads, tokens, head_dim)`; `values` likewise.
        window: The number of tokens that one sees at most, itself included.
        cap: Scores are bounded by it (Gemma 2).
        sinks: `(heads,)`, scores of a key without a value (gpt-oss).

    Returns:
        `(count, heads, head_dim)`.
    """
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    if window is not None and keys.shape[1] > window + count - 1:
        keys, values = keys[:, -(window + count - 1) :], values[:, -(window + count - 1) :]
    seen = keys.shape[1]
    # Heads that share keys are more queries of the same keys.
    grouped = query.reshape(1, keys.shape[0], groups * count, -1)
    mask = None if count == 1 else _mask(count, seen, window, query.device).repeat(groups, 1)
    if cap is None and sinks is None:
        output = nn.functional.scaled_dot_product_attention(
            grouped, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, scale=factor
        )
    else:
        output = _with_more(grouped, keys, values, mask, factor=factor, cap=cap, sinks=sinks)
    return output.view(heads, count, -1).transpose(0, 1)


def _mask(count: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of the keys each query sees; bool `(count, seen)`."""
    mask = torch.ones(count, seen, dtype=torch.bool, device=device).tril(seen - count)
    return mask if window is None else mask.triu(seen - count - window + 1)


def _with_more(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, factor: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend with bounded scores, or with sinks; `query` is `(1, kv_heads, queries, head_dim)`."""
    scores = torch.matmul(query, keys.transpose(-1, -2)) * factor
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        own = (
            sinks.to(scores.dtype)
            .view(1, keys.shape[0], -1, 1)
            .repeat_interleave(scores.shape[2] * keys.shape[0] // len(sinks), dim=2)
        )
        scores = torch.cat([scores, own], dim=-1)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares[..., : keys.shape[1]], values)
