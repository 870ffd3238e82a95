"""Attention over documents that follow each other; since the start of each is known, no mask over pairs of tokens is needed.

On CUDA this is torch's flash attention for sequences of varying lengths, which multiplies only visible pairs and takes memory
that grows with the tokens, not with their square. Elsewhere the same function is computed one document at a time with the
products of `row_attention`: the reference, which tests compare with masked attention.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from adapterhub_converters.lazy_dataclass import dataclass

_DTYPES = (torch.bfloat16, torch.float16)  # that flash attention supports
_FIRST_CAPABILITY = (8, 0)  # the lowest compute capability that it runs on (Ampere)


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch, whose rows follow each other.

    Attributes:
        edges: The start of each document among all tokens, followed by the number of tokens.
        bounds: The same, int32, on the model's device.
        longest: The number of tokens of the longest document.
    """

    edges: tuple[int, ...]
    bounds: Tensor
    longest: int


def documents_at(positions: np.ndarray, device: torch.device) -> Documents:
    """Return the documents of rows with these positions, `(rows, tokens)`, which start at 0; padding counts as a document."""
    edges = np.append(np.flatnonzero(positions.reshape(-1) == 0), positions.size)
    bounds = torch.from_numpy(edges.astype(np.int32)).to(device, non_blocking=True)
    return Documents(tuple(edges.tolist()), bounds, int(np.diff(edges).max(initial=0)))


def is_supported(device_type: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Return whether a device attends to documents without a mask; a CPU does not: its rows keep their probabilities.

    Args:
        capability: The compute capability of a CUDA device.
    """
    if device_type == "cpu":
        return False
    if device_type != "cuda":
        return True
    has_kernel = importlib.util.find_spec("torch.nn.attention.varlen") is not None  # since torch 2.10
    return has_kernel and dtype in _DTYPES and capability is not None and capability >= _FIRST_CAPABILITY


def empty_mask(device: torch.device) -> Tensor:
    """Return a placeholder mask: transformers then makes no mask of its own, and code that uses it as a mask fails."""
    return torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=device)


def is_empty(mask: Tensor | None) -> bool:
    """Return whether `mask` is the placeholder of `empty_mask`."""
    return mask is not None and mask.shape[-1] == 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    window: int | None,
    factor: float,
    reference: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor],
) -> Tensor:
    """Return causal attention within each document, `(rows, tokens, heads, head_dim)`.

    Args:
        query: `(rows, heads, tokens, head_dim)`; the heads of `key` and `value` are a divisor of the number of heads.
        window: The number of tokens that each token attends to, including itself; None for all before it.
        factor: The factor of the scores.
        reference: Computes one document if there is no kernel, from q, k, v `(1, heads, tokens, head_dim)`, a bool mask or
            None, and the factor.
    """
    rows, heads, tokens, _ = query.shape
    if query.is_cuda:
        return attend_with_flash(query, key, value, documents, window=window, factor=factor)
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value))
    outputs = []
    for start, end in zip(documents.edges, documents.edges[1:], strict=False):
        document = slice(start, end)
        outputs.append(
            reference(
                q[:, :, document], k[:, :, document], v[:, :, document], _window_mask(end - start, window, q.device), factor
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).reshape(rows, tokens, heads, value.shape[-1])


def attend_with_flash(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, window: int | None, factor: float
) -> Tensor:
    """Return the same with torch's kernel; arguments are those of `attend`."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    bounds, longest = documents.bounds, documents.longest
    # Tokens before and after each that it attends to: with itself, `window` or all before it; none after it.
    window_size = (-1 if window is None else window - 1, 0)
    output: Tensor = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=factor, window_size=window_size, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.view(*query.transpose(1, 2).shape)


def _window_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the mask of a sliding window, or None if the window covers all tokens."""
    if window is None or window >= tokens:
        return None
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    return causal & ~causal.tril(-window)
