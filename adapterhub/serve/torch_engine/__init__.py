"""The reference host: one base model in torch that answers each request with its own adapter, none, or a blend of several.

It is written to be read. `slots` has the arithmetic: the factors of the active adapters in one stack, so that a batch whose
rows use different adapters needs only two more matrix products than the base. `segment_attention` gives each request its own
keys and values. `model` puts both into transformers' model and tests what it promises; `loaded_adapters` keeps versions in
memory, `prefixes` the keys and values of prompt beginnings, `schedule` decides which request is next, `answer` turns logits
into text, with `penalties` and a `grammar` if a request has them, `streams` carries it to the clients, and `host_loop` is the
loop over all of this. `openai_request` reads documents of OpenAI's API, with its plain `request_fields`, its `conversations`,
the `answer_form` of JSON schemas and tools, and how models write `tool_calls`; `openai` writes the answers. Another host, for
GGUF files and without torch, is `engines/libllama.py`: a context of llama.cpp for each request. Importing this package does
not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import training

from .values import Blend, Limits, Piece, Request

if TYPE_CHECKING:
    from .host_loop import Host

__all__ = ["Blend", "Limits", "Piece", "Request", "open_host"]


@contextmanager
def open_host(
    base: Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    device: str = "auto",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **limits: Any,
) -> Iterator[Host]:
    """Load a base model and answer requests in a separate thread within the block.

    Args:
        base: A Hugging Face folder or a GGUF file.
        dtype: `float32`, `bfloat16` or `float16`; None for the base's own.
        quantize: Hold the linear layers in NF4.
        device: `auto`, `cpu` or `cuda`.
        cache: The folder of quantized bases; None for none.
        progress: Called with the number of loaded linear layers and their total number.
        limits: Fields of `Limits`.

    Raises:
        MissingExtraError: torch or another library is not installed.
        RefusedError: The model's layers do not keep the tokens of requests apart.
    """
    training.check_extra("serving with torch")
    from . import host_loop

    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "device": device, "cache": cache, "progress": progress}
    with host_loop.open_host(base, Limits(**limits), **options) as loaded_host:
        yield loaded_host
