"""A Hugging Face folder in torch: the model of transformers with the layers of `adapterhub.training`, without code of the base.

The base is loaded in the float dtype that it is stored in, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapterhub.prompts import chat_template
from adapterhub.training import compute_device
from adapterhub.training.events import InitialAdapter
from adapterhub.training.model import adapter_transfer
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.base_model import Base
from adapterhub.training.model.loading import load
from adapterhub.training.train_config import BaseConfig
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.trained_prompt import TrainedPrompt

from . import Prompt, hf_text


@contextlib.contextmanager
def open_engine(
    adapter: InitialAdapter | None, base: Path, *, progress: Callable[[int, int], None] | None = None, cache: Path | None = None
) -> Iterator[TorchEngine]:
    """Load a base with an adapter, or alone.

    Raises:
        RefusedError: The adapter is for another base, or has parts that the layers cannot represent.
    """
    with BaseFiles(base, cache) as files:
        factors = _read_factors(adapter, files) if adapter is not None else None
        document = json_file.parse_object(files.config_text, f"{base}: config.json")
        config = BaseConfig(str(base), quantize="none", dtype=hf_text.stored_dtype(document))
        device = compute_device.select("auto")
        layers, location = (factors.config, factors.location) if factors is not None else (None, str(base))
        model = load(files, config, layers, location=location, progress=progress, device=device)
    if adapter is not None and factors is not None:
        adapter_transfer.copy_into_model(model, factors)
        chat_template.apply(model.tokenizer, TrainedPrompt.read(adapter.path))
    model.model.eval()
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        yield TorchEngine(model, factors, base, stack)


def _read_factors(adapter: InitialAdapter, files: BaseFiles) -> adapter_transfer.Factors:
    """Read the factors of an adapter for a base."""
    factors = adapter_transfer.read(adapter, files.spec)
    if not factors.pairs:
        raise RefusedError(factors.location, "has no low-rank factors, and no other kind of adapter can be run")
    adapter_transfer.check_base(factors, files.spec, None)
    return factors


class TorchEngine:
    """An `Engine` for a Hugging Face folder."""

    name = "torch"

    def __init__(self, base: Base, factors: adapter_transfer.Factors | None, path: Path, stack: contextlib.ExitStack) -> None:
        self._text = hf_text.Text(base, path)
        self._ends = self._text.ends
        self.location, self.max_context = self._text.location, self._text.max_context
        self._base, self._adapter, self._has_adapter = base, stack, factors is not None
        if factors is not None:
            # Modules that the adapter replaces stay in use until the adapter is turned off.
            self._adapter.enter_context(adapter_transfer.with_replaced_modules(base, factors))

    def text_of(self, prompt: Prompt) -> str:
        """Render the chat template in its own limited process; a model without one continues the text."""
        is_raw = prompt.raw or not self._text.has_template
        self._ends = self._text.ends if is_raw else self._text.chat_ends
        return prompt.plain_text(self.location) if is_raw else self._text.conversation(prompt.messages)

    def tokens(self, text: str, *, raw: bool) -> list[int]:
        """Return the ids; a template writes the special tokens itself."""
        return self._text.tokens(text, special=raw or not self._text.has_template)

    @contextlib.contextmanager
    def start_decoding(self, *, adapted: bool, room: int) -> Iterator[Callable[[list[int]], Any]]:
        """Decode with keys and values that are kept from call to call."""
        if not adapted and self._has_adapter:
            self._adapter.close()
            adapter_transfer.remove(self._base)
        model, cache, token_count = self._base.model, None, 0
        parameters = inspect.signature(model.forward).parameters
        # The logits of a long prompt are large, and only those of its last token are needed.
        last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24

        def logits_after(ids: list[int]) -> Any:
            nonlocal cache, token_count
            input_ids = torch.tensor([ids], device=self._base.device)
            mask = torch.ones(1, token_count + len(ids), dtype=torch.long, device=input_ids.device)
            output = model(input_ids=input_ids, attention_mask=mask, use_cache=True, **{cache_name: cache}, **last_logits_only)
            cache, token_count = getattr(output, cache_name), token_count + len(ids)
            return np.asarray(output.logits[0, -1].float().cpu())

        yield logits_after

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the answer to the last prompt."""
        return token in self._ends

    def pieces(self) -> Callable[[int], str]:
        """Return a function that decodes one token after another."""
        return self._text.pieces()
