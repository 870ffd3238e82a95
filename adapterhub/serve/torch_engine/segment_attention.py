"""Attention over tokens of several requests in one pass of the model, each with its own keys and values.

A pass has one row: the tokens of its segments one after another, with the positions that they have in their requests. All other
parts of a model treat tokens one by one, so only attention must know which belong together: it is registered with transformers,
and asks here. Segments are processed one after another, without padding: what a request computes does not depend on the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

NAME = "adapterhub_segments"
BLOCK = 64
"""Queries that are processed at a time. A segment starts at a multiple of it or is one token, so that a token of a prompt has
the same products no matter how the prompt is split into segments."""
_UNSUPPORTED = ("position_bias", "indices", "block_indices")
_current = threading.local()


Chunk = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of some tokens by layer, each `(kv_heads, tokens, head_dim)`."""


class KeysValues:
    """Keys `(kv_heads, tokens, head_dim)` and values of one request, by layer; their memory doubles when it is used up.

    Args:
        max_tokens: The final number of tokens.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.layers: Chunk = {}

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return chunk_size(self.layers)

    @property
    def room(self) -> int:
        """The number of tokens that there is memory for."""
        return next((keys.shape[1] for keys, _ in self.layers.values()), 0)

    def extend(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(kv_heads, count, head_dim)` from token `start` on, and return all keys and values up to there."""
        end = start + keys.shape[1]
        buffers = self.layers.get(layer)
        if buffers is None or end > buffers[0].shape[1]:
            room = max(end, min(max(2 * start, BLOCK), self.max_tokens))
            buffers = tuple(like.new_empty(like.shape[0], room, like.shape[2]) for like in (keys, values))
            for new, old in zip(buffers, self.layers.get(layer, ()), strict=False):
                new[:, :start] = old[:, :start]
            self.layers[layer] = buffers
        for buffer, added in zip(buffers, (keys, values), strict=True):
            buffer[:, start:end] = added
        return buffers[0][:, :end], buffers[1][:, :end]

    def copy(self, start: int, end: int) -> Chunk:
        """Return copies of the keys and values of some tokens."""
        return {layer: (k[:, start:end].clone(), v[:, start:end].clone()) for layer, (k, v) in self.layers.items()}

    def write(self, start: int, chunk: Chunk) -> None:
        """Write keys and values that were copied from a request with the same beginning."""
        for layer, (keys, values) in chunk.items():
            self.extend(layer, start, keys, values)


def chunk_size(chunk: Chunk) -> int:
    """Return the bytes in memory."""
    return sum(part.numel() * part.element_size() for pair in list(chunk.values()) for part in pair)


@dataclass
class Segment:
    """Tokens of one request in a pass: `count` tokens, after `start` ones whose keys and values are known."""

    keys_values: KeysValues
    start: int
    count: int


def register() -> str:
    """Register the attention with transformers, without a mask, and return its name for `set_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return NAME


@contextmanager
def segments_in_use(segments: Sequence[Segment]) -> Iterator[None]:
    """Let the attention of this thread use these segments within the block; further tokens of the row attend to nothing."""
    _current.segments = segments
    try:
        yield
    finally:
        del _current.segments


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend by transformers' contract: `(1, heads, tokens, head_dim)` in, `(1, tokens, heads, head_dim)` out."""
    unsupported = next((name for name in _UNSUPPORTED if kwargs.get(name) is not None), None)
    if unsupported:
        raise RefusedError(type(module).__name__, f"its attention needs {unsupported}, which is not supported")
    layer = int(module.layer_idx)
    options = {
        "factor": kwargs.get("scaling") or query.shape[-1] ** -0.5,
        "window": kwargs.get("sliding_window"),
        "cap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }
    output = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    offset = 0
    for segment in _current.segments:
        tokens = slice(offset, offset + segment.count)
        keys, values = segment.keys_values.extend(layer, segment.start, key[0, :, tokens], value[0, :, tokens])
        for first in range(0, segment.count, BLOCK):
            block = slice(offset + first, min(offset + first + BLOCK, tokens.stop))
            end = segment.start + block.stop - offset
            output[0, block] = _attend(query[0, :, block], keys[:, :end], values[:, :end], **options)
        offset = tokens.stop
    return output, None


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, *, factor: float, window: int | None, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend with the last tokens of a request.

    Args:
        query: `(heads, count, head_dim)`, of the last `count` tokens in `keys`.
        keys: `(kv_heads, tokens, head_dim)`; `values` likewise.
        window: The largest number of tokens that one attends to, including itself.
        cap: A bound on the scores (Gemma 2).
        sinks: `(heads,)`, scores of a key without a value (gpt-oss).

    Returns:
        `(count, heads, head_dim)`.
    """
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    # No query attends to anything before this, so the products would be wasted.
    if window is not None and keys.shape[1] > window + count - 1:
        keys, values = keys[:, -(window + count - 1) :], values[:, -(window + count - 1) :]
    key_count = keys.shape[1]
    # Heads that share keys are treated as more queries on the same keys.
    grouped = query.reshape(1, keys.shape[0], groups * count, -1)
    mask = None if count == 1 else _mask(count, key_count, window, query.device).repeat(groups, 1)
    if cap is None and sinks is None:
        output = nn.functional.scaled_dot_product_attention(
            grouped, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, scale=factor
        )
    else:
        output = _attend_explicitly(grouped, keys, values, mask, factor=factor, cap=cap, sinks=sinks)
    return output.view(heads, count, -1).transpose(0, 1)


def _mask(count: int, key_count: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query attends to; bool `(count, key_count)`."""
    mask = torch.ones(count, key_count, dtype=torch.bool, device=device).tril(key_count - count)
    return mask if window is None else mask.triu(key_count - count - window + 1)


def _attend_explicitly(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, factor: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend with bounded scores, or with sinks; `query` is `(1, kv_heads, queries, head_dim)`."""
    scores = torch.matmul(query, keys.transpose(-1, -2)) * factor
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink_scores = (
            sinks.to(scores.dtype)
            .view(1, keys.shape[0], -1, 1)
            .repeat_interleave(scores.shape[2] * keys.shape[0] // len(sinks), dim=2)
        )
        scores = torch.cat([scores, sink_scores], dim=-1)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares[..., : keys.shape[1]], values)
