"""The reference host: one base model in torch, and for every request an adapter of its own, none, or a blend of several.

Written to be read. `slots` is the arithmetic: the factors of the active adapters in one stack, so that a batch whose rows use
different adapters needs two more matrix products than the base. `attention` gives each request its own keys and values.
`model` puts both into transformers' model and tests what it promises; `adapters` keeps versions in memory, `prefixes` what was
computed for the beginnings of prompts, `schedule` decides who is next, `answer` turns logits into text, `streams` carries it to
those who asked, `host` is the loop over all of it. `openai_request` reads documents of OpenAI's API, and `openai` writes the
answers. `libllama` is another loop, without torch and for GGUF files: a context of llama.cpp for each request. Importing this
package imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import training

from .values import Blend, Limits, Piece, Request

if TYPE_CHECKING:
    from .host import Host

__all__ = ["Blend", "Limits", "Piece", "Request", "opened"]


@contextmanager
def opened(
    base: Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    device: str = "auto",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **limits: Any,
) -> Iterator[Host]:
    """Load a base model and answer requests from a thread of its own within the block.

    Args:
        base: A Hugging Face folder or a GGUF file.
        dtype: `float32`, `bfloat16` or `float16`; None for that of the base.
        quantize: Hold the linear layers in NF4.
        device: `auto`, `cpu` or `cuda`.
        cache: The folder of quantized bases; None for none.
        progress: Called with the linear layers that are loaded, and with how many there are.
        limits: Fields of `Limits`.

    Raises:
        MissingExtraError: torch or another library is not installed.
        RefusedError: The model's layers do not keep the tokens of requests apart.
    """
    training.check_extra("serving with torch")
    from . import host

    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "device": device, "cache": cache, "progress": progress}
    with host.opened(base, Limits(**limits), **options) as made:
        yield made
