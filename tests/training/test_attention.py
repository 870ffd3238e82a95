"""Attention over long rows is torch's, forward and backward, whatever is seen."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from adapterhub.training.layers import row_attention  # noqa: E402

TOKENS = 2 * row_attention.BLOCK + 37


def causal() -> object:
    return torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()


def documents() -> object:
    """Two rows, of documents that end in different places."""
    numbers = torch.stack([torch.arange(TOKENS) // 50, torch.arange(TOKENS) // 200])
    return causal() & (numbers[:, None, :, None] == numbers[:, None, None, :])


def window() -> object:
    return causal() & ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-30)


@pytest.mark.parametrize("kind", ["none", "causal", "documents", "window"])
def test_output_and_gradients_are_torchs(kind: str) -> None:
    torch.manual_seed(0)
    mask = None if kind == "none" else {"causal": causal, "documents": documents, "window": window}[kind]()
    q, k, v = (torch.randn(2, 3, TOKENS, 16, requires_grad=True) for _ in range(3))
    upstream = torch.randn(2, 3, TOKENS, 16)
    ours = row_attention.attend_blockwise(q, k, v, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for our_gradient, their_gradient in zip(
        *(torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_documents_that_a_block_does_not_see_are_not_multiplied() -> None:
    ranges = list(row_attention._visible_ranges(documents()[:1], TOKENS))
    assert [(keys.start, keys.stop) for _, keys in ranges] == [(0, 128), (100, 256), (250, TOKENS)]
