"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of a training step, `alpha / sqrt(tokens * size)` at most."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def noisy(model: Any, alpha: float) -> Iterator[None]:
    """Within the block the input's embeddings are disturbed while the model is in training; not at all for 0."""
    if not alpha:
        yield
        return

    def disturb(module: Any, _: Any, output: Any) -> Any:
        # As transformers draws it (`integrations/neftune.py`), so that the same state of torch's generator gives the same.
        largest = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.zeros_like(output).uniform_(-largest, largest) if module.training else output

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
