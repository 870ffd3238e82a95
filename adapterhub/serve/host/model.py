"""The base as the host uses it: transformers' model, with slots in its linear layers and an attention of its own.

One pass reads tokens of one or several requests. In float32 the numbers of a request can be the same, bit for bit, whatever
else is in the pass: matrix products on most CPUs add up a row in the same order as soon as there are FLOOR rows, padded ranks
do the same for adapters, and attention works request by request. Whether it is so here is tested when the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.generation.hf_text import Text, stored_dtype
from adapterhub.training import devices
from adapterhub.training.config import BaseConfig, LoRAConfig
from adapterhub.training.layers.lora import Frozen
from adapterhub.training.model import quantized_cache
from adapterhub.training.model.base import Base
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.loading import Progress
from adapterhub.training.model.loading import load as load_base
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError

from . import attention
from .attention import BLOCK, KeysValues, Segment
from .slots import Slots, Use

FLOOR = 4
"""The fewest tokens of a pass; others are added that nobody reads."""
CHUNK = 4 * BLOCK
"""Tokens of a prompt that are read in one pass."""
_RANK = 24  # of the adapters in the test: with padding
_STEPS = 2  # passes of the test in which each request adds a token
_SPREAD = 0.02  # of the numbers of the adapters in the test
_ELSEWHERE = "Serve it with another engine"
_log = logging.getLogger(__name__)


@dataclass
class Span:
    """Tokens of one request in a pass: `ids`, behind the `start` whose keys and values are known, with the slots it uses."""

    ids: list[int]
    keys_values: KeysValues
    start: int
    use: Use


class Model:
    """A base and its slots.

    Attributes:
        base: The model and its tokenizer.
        spec: As its headers and config describe it.
        text: Its tokens as text.
        slots: In its linear layers.
        longest: The number of tokens that a request may have; None if unknown.
        exact: Whether a request's numbers are the same, bit for bit, alone and in a batch.
        token_size: Bytes of the keys and values of one token.
    """

    def __init__(self, base: Base, spec: BaseSpec, text: Text, slots: int) -> None:
        self.base, self.spec, self.text = base, spec, text
        linears = {path: module for path, module in base.model.named_modules() if isinstance(module, Frozen)}
        self.slots = Slots(base.model, linears, slots, base.head.dtype)
        self.longest = _shortest([text.longest, _steady_positions(base.model.config.get_text_config())])
        self.exact, self.token_size = False, 0

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def run(self, spans: Sequence[Span]) -> Tensor:
        """Read tokens; returns the logits behind the last of each span, float32 `(spans, vocab)`."""
        ids = [token for span in spans for token in span.ids]
        positions = [span.start + at for span in spans for at in range(len(span.ids))]
        uses = [span.use for span in spans for _ in (span.ids if len(spans) > 1 else "1")]
        padding = [0] * (FLOOR - len(ids))
        given = torch.tensor([[ids + padding], [positions + padding]], device=self.base.device)
        segments = [Segment(span.keys_values, span.start, len(span.ids)) for span in spans]
        with attention.passing(segments), self.slots.using(uses, given.shape[-1]):
            states = self.base.states(given[0], given[1])[0]
        ends = torch.tensor([len(span.ids) for span in spans]).cumsum(0) - 1
        last = nn.functional.pad(states[ends.to(states.device)], (0, 0, 0, max(0, FLOOR - len(spans))))
        return self.base.logits.of(nn.functional.linear(last, self.base.head, self.base.head_bias))[: len(spans)]


def load(
    path: Path,
    *,
    slots: int,
    rows: int,
    dtype: str | None = None,
    quantize: bool = False,
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a base, and test what it promises with batches of `rows`; the other arguments are those of `host.opened`.

    Raises:
        RefusedError: The model's layers do not keep the tokens of requests apart, or cannot use another attention.
    """
    with BaseFiles(path, cache) as files:
        document = json_file.parse_object(files.config_text, f"{path}: config.json")
        kind: Any = dtype or stored_dtype(document)
        config = BaseConfig(str(path), quantize="nf4" if quantize else "none", dtype=kind)
        entry = quantized_cache.entry_of(files, config, LoRAConfig())
        where, on = str(path), devices.chosen(device)
        base = load_base(files, config, None, where=where, progress=progress, entry=entry, device=on)
        spec = files.spec
    base.model.eval()
    if not type(base.model)._supports_attention_backend:
        what = f"{type(base.model).__name__} cannot use the attention that keeps the requests of a batch apart"
        raise RefusedError(where, what, _ELSEWHERE)
    base.model.set_attn_implementation(attention.register())
    model = Model(base, spec, Text(base, path), slots)
    _test(model, rows, where)
    what = "NF4" if quantize else kind
    if model.exact:
        _log.info("%s in %s: answers alone and in a batch are the same, bit for bit", where, what)
    else:
        _log.info("%s in %s: answers alone and in a batch may differ by rounding", where, what)
    return model


def _steady_positions(config: Any) -> int | None:
    """Return the number of positions at which LongRoPE starts to turn all tokens of a pass, of any request, by other angles."""
    found: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(one for one in found.values() if isinstance(one, Mapping))]
    return _shortest([one.get("original_max_position_embeddings") for one in kinds if one.get("rope_type") == "longrope"])


def _shortest(lengths: Iterable[int | None]) -> int | None:
    return min((length for length in lengths if length is not None), default=None)


# ---- The test


def _test(model: Model, rows: int, where: str) -> None:
    """Find out whether requests in one pass compute what they compute alone; RefusedError where they are not even similar."""
    generator = torch.Generator().manual_seed(0)
    first, second, last = 0, min(1, model.slots.count - 1), model.slots.count - 1
    for slot in sorted({first, second, last}):
        model.slots.fill(slot, _random_factors(model.slots.shapes, generator))
    uses: list[Use] = [(), ((first, 1.0),), ((second, 1.0),), ((first, 0.75), (last, -0.5)), ((last, 1.0),)]
    lengths = [_shortest([n, model.longest and model.longest - _STEPS]) or n for n in (5, BLOCK + 3, 2, 7, 3)]
    prompts = [torch.randint(len(model.base.head), (n,), generator=generator).tolist() for n in lengths]
    alone = [_alone(model, prompt, use) for prompt, use in zip(prompts, uses, strict=True)]
    pairs, spans = [], []
    for prompt, use, (_, right) in zip(prompts, uses, alone, strict=True):
        keys_values = KeysValues(len(prompt) + _STEPS)
        for start in range(0, len(prompt), BLOCK):
            logits = model.run([Span(prompt[start : start + BLOCK], keys_values, start, use)])[0]
        pairs.append((logits, right[0]))
        spans.append(Span([], keys_values, len(prompt), use))
    for step in range(1, 1 + _STEPS):
        for span, (tokens, _) in zip(spans, alone, strict=True):
            span.ids = [tokens[span.start]]
        for count in (len(spans), max(rows, len(spans))):
            batch = [row % len(spans) for row in range(count)]
            logits = model.run([spans[row] for row in batch])
            pairs += [(own, alone[row][1][step]) for own, row in zip(logits, batch, strict=True)]
        for span in spans:
            span.start += 1
    model.slots.clear()
    model.token_size = spans[0].keys_values.size // spans[0].keys_values.room
    model.exact = all(torch.equal(own, right) for own, right in pairs)
    errors = torch.tensor([float((own - right).norm() / right.norm().clamp(min=1e-30)) for own, right in pairs])
    every_layer = len(spans[0].keys_values.layers) == model.base.model.config.get_text_config().num_hidden_layers
    if not (every_layer and float(errors.median()) <= 4 * torch.finfo(model.base.head.dtype).eps ** 0.75):
        what = f"{type(model.base.model).__name__} does not keep the tokens of several requests apart"
        raise RefusedError(where, what, _ELSEWHERE)


def _alone(model: Model, prompt: list[int], use: Use) -> tuple[list[int], list[Tensor]]:
    """Return a prompt with the likeliest tokens behind it, and the logits of each."""
    keys_values, tokens, found, start = KeysValues(len(prompt) + _STEPS), list(prompt), [], 0
    for _ in range(1 + _STEPS):
        found.append(model.run([Span(tokens[start:], keys_values, start, use)])[0])
        start = len(tokens)
        tokens.append(int(found[-1].argmax()))
    return tokens, found


def _random_factors(shapes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    def numbers(features: int) -> Tensor:
        return _SPREAD * torch.randn(_RANK, features, generator=generator)

    return {path: (numbers(into), numbers(out)) for path, (out, into) in shapes.items()}
