"""A Hugging Face folder in torch: the model of transformers with the layers of `adapterhub.training`, no code of the base.

The base is loaded in the type of floats that it is stored in, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapterhub.training import devices
from adapterhub.training.config import BaseConfig
from adapterhub.training.data import chat_template
from adapterhub.training.events import InitialAdapter
from adapterhub.training.model import adapters
from adapterhub.training.model.base import Base
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.loading import load
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError

from . import Prompt

_DTYPES = ("bfloat16", "float16", "float32")
_GENERATION = "generation_config.json"
_UNFINISHED = "\ufffd"  # what an incomplete character decodes to


@contextlib.contextmanager
def opened(
    adapter: InitialAdapter, base: Path, *, progress: Callable[[int, int], None] | None = None, cache: Path | None = None
) -> Iterator[TorchEngine]:
    """Load a base with an adapter.

    Raises:
        RefusedError: The adapter is for another base, or has parts that the layers cannot represent.
    """
    found = adapters.read(adapter)
    if not found.pairs:
        raise RefusedError(found.where, "has no low-rank delta, and others cannot be run")
    with BaseFiles(base, cache) as files:
        adapters.check_base(found, files.spec, None)
        document = json_file.parse_object(files.config_text, f"{base}: config.json")
        config = BaseConfig(str(base), quantize="none", dtype=_dtype(document))
        device = devices.chosen("auto")
        model = load(files, config, found.config, where=found.where, progress=progress, device=device)
    adapters.put(model, found)
    model.model.eval()
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        yield TorchEngine(model, found, base, stack)


def _dtype(config: Mapping[str, Any]) -> Any:
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in _DTYPES else "bfloat16"


class TorchEngine:
    """See `Engine`."""

    name = "torch"

    def __init__(self, base: Base, found: adapters.Factors, path: Path, stack: contextlib.ExitStack) -> None:
        self.where = str(path)
        self._base, self._tokenizer, self._adapter = base, base.tokenizer, stack
        self._adapter.enter_context(adapters.replaced(base, found))
        config = base.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        self.longest = longest if isinstance(longest, int) else None
        self._ends = _ends(path / _GENERATION, config, self._tokenizer)

    def text_of(self, prompt: Prompt) -> str:
        """Render the chat template in its own bounded process; a model without one continues the text."""
        if prompt.raw or not self._tokenizer.chat_template:
            return prompt.text
        return chat_template.render(self._tokenizer, prompt.messages, where=self.where, prompt=True)

    def tokens(self, text: str, *, raw: bool) -> list[int]:
        """Return the ids; a template writes the special tokens itself."""
        special = raw or not self._tokenizer.chat_template
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    @contextlib.contextmanager
    def started(self, *, adapted: bool, room: int) -> Iterator[Callable[[list[int]], Any]]:
        """Keys and values are kept from call to call."""
        if not adapted:
            self._adapter.close()
            adapters.remove(self._base)
        model, past, seen = self._base.model, None, 0
        parameters = inspect.signature(model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        kept = "cache" if "cache" in parameters else "past_key_values"  # the name before transformers 5.24

        def logits_after(ids: list[int]) -> Any:
            nonlocal past, seen
            given = torch.tensor([ids], device=self._base.device)
            mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=given.device)
            done = model(input_ids=given, attention_mask=mask, use_cache=True, **{kept: past}, **last)
            past, seen = done.past_key_values, seen + len(ids)
            return np.asarray(done.logits[0, -1].float().cpu())

        yield logits_after

    def is_end(self, token: int) -> bool:
        """By the model's generation config, its config and its tokenizer."""
        return token in self._ends

    def pieces(self) -> Callable[[int], str]:
        """Decode each token behind the last ones, because what it means may depend on them."""
        ids: list[int] = []
        start = done = 0

        def piece(token: int) -> str:
            nonlocal start, done
            ids.append(token)
            before = self._tokenizer.decode(ids[start:done], skip_special_tokens=True)
            now = self._tokenizer.decode(ids[start:], skip_special_tokens=True)
            if now.endswith(_UNFINISHED):
                return ""
            start, done = done, len(ids)
            return str(now[len(before) :])

        return piece


def _ends(path: Path, config: Any, tokenizer: Any) -> set[int]:
    own = json_file.read_object(path).get("eos_token_id") if path.is_file() else None
    found: set[int] = set()
    for value in (own, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update(item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, int))
    return found
