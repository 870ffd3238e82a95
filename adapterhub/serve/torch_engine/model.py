"""The base as the host uses it: transformers' model, with slots in its linear layers and our own attention.

One pass reads tokens of one or several requests. In float32, a request can give the same numbers, bit for bit, whatever else is
in the pass: matrix products on most CPUs add up a row in the same order from FLOOR rows on, padded ranks do the same for
adapters, and attention works request by request. Whether this holds here is tested when the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.generation.hf_text import Text, stored_dtype
from adapterhub.training import compute_device
from adapterhub.training.layers.lora import Frozen
from adapterhub.training.model import quantized_cache
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.base_model import Base
from adapterhub.training.model.loading import Progress
from adapterhub.training.model.loading import load as load_base
from adapterhub.training.train_config import BaseConfig, LoRAConfig
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import segment_attention
from .segment_attention import BLOCK, KeysValues, Segment
from .slots import Slots, Use

FLOOR = 4
"""The smallest number of tokens in a pass; smaller passes are padded with tokens that nothing reads."""
CHUNK = 4 * BLOCK
"""Tokens of a prompt that are read in one pass."""
_RANK = 24  # of the adapters in the test: not a multiple of the padding
_STEPS = 2  # passes of the test in which each request adds a token
_SPREAD = 0.02  # standard deviation of the numbers of the adapters in the test
_OTHER_ENGINE_HINT = "Serve it with another engine"
_log = logging.getLogger(__name__)


@dataclass
class Span:
    """Tokens of one request in a pass: `ids`, after `start` tokens whose keys and values are known, with the slots in use.

    The logits after the last token are computed, or with `every` those after each token.
    """

    ids: list[int]
    keys_values: KeysValues
    start: int
    use: Use
    every: bool = False


class Model:
    """A base and its slots.

    Attributes:
        base: The model and its tokenizer.
        spec: The base, as its headers and config describe it.
        text: Its tokens as text.
        slots: The slots in its linear layers.
        longest: The largest number of tokens of a request; None if unknown.
        exact: Whether a request's numbers are the same, bit for bit, alone and in a batch.
        token_size: Bytes of the keys and values of one token.
    """

    def __init__(self, base: Base, spec: BaseSpec, text: Text, slots: int) -> None:
        self.base, self.spec, self.text = base, spec, text
        linears = {path: module for path, module in base.model.named_modules() if isinstance(module, Frozen)}
        dtype = base.head.dtype
        self.slots = Slots(base.model, linears, slots, dtype, compute_device.product_dtype(dtype, base.device))
        self.longest = _shortest([text.max_context, _steady_positions(base.model.config.get_text_config())])
        self.exact, self.token_size = False, 0

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def run(self, spans: Sequence[Span]) -> Tensor:
        """Read tokens, and return the logits after the last one of each span, or after every one, float32 `(rows, vocab)`."""
        ids = [token for span in spans for token in span.ids]
        positions = [span.start + at for span in spans for at in range(len(span.ids))]
        uses = [span.use for span in spans for _ in (span.ids if len(spans) > 1 else "1")]
        padding = [0] * (FLOOR - len(ids))
        inputs = torch.tensor([[ids + padding], [positions + padding]], device=self.base.device)
        segments = [Segment(span.keys_values, span.start, len(span.ids)) for span in spans]
        with segment_attention.segments_in_use(segments), self.slots.using(uses, inputs.shape[-1]):
            states = self.base.states(inputs[0], inputs[1])[0]
        rows = torch.tensor([row for span in spans for row in ([True] * len(span.ids) if span.every else _last(span.ids))])
        wanted = states[: len(rows)][rows.to(states.device)]
        padded = nn.functional.pad(wanted, (0, 0, 0, max(0, FLOOR - len(wanted))))
        return self.base.logits.apply(nn.functional.linear(padded, self.base.head, self.base.head_bias))[: len(wanted)]


def _last(ids: Sequence[int]) -> list[bool]:
    """Return the mask of the last token."""
    return [False] * (len(ids) - 1) + [True]


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
    """Load a base, and test what it promises with batches of `rows`; the other arguments are those of `open_host`.

    Raises:
        RefusedError: The model's layers do not keep the tokens of requests apart, or cannot use another attention.
    """
    with BaseFiles(path, cache) as files:
        document = json_file.parse_object(files.config_text, f"{path}: config.json")
        kind: Any = dtype or stored_dtype(document)
        config = BaseConfig(str(path), quantize="nf4" if quantize else "none", dtype=kind)
        entry = quantized_cache.entry_of(files, config, LoRAConfig())
        location, torch_device = str(path), compute_device.select(device)
        base = load_base(files, config, None, location=location, progress=progress, entry=entry, device=torch_device)
        spec = files.spec
    # No dropout.
    base.model.eval()
    if not type(base.model)._supports_attention_backend:
        problem = f"{type(base.model).__name__} cannot use the attention that keeps the requests of a batch apart"
        raise RefusedError(location, problem, _OTHER_ENGINE_HINT)
    base.model.set_attn_implementation(segment_attention.register())
    model = Model(base, spec, Text(base, path), slots)
    _test_batches(model, rows, location)
    for note in compute_device.dtype_notes(kind, torch_device, "answers come sooner in float32"):
        _log.warning("%s: %s", location, note)
    precision = "NF4" if quantize else kind
    if model.exact:
        _log.info("%s in %s: answers alone and in a batch are the same, bit for bit", location, precision)
    else:
        _log.info("%s in %s: answers alone and in a batch may differ by rounding", location, precision)
    return model


def _steady_positions(config: Any) -> int | None:
    """Return the number of positions from which LongRoPE rotates all tokens of a pass, of any request, by other angles."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(parameters for parameters in rope.values() if isinstance(parameters, Mapping))]
    return _shortest(
        [
            parameters.get("original_max_position_embeddings")
            for parameters in kinds
            if parameters.get("rope_type") == "longrope"
        ]
    )


def _shortest(lengths: Iterable[int | None]) -> int | None:
    """Return the smallest known length; None if none is known."""
    return min((length for length in lengths if length is not None), default=None)


# ---- The test


def _test_batches(model: Model, rows: int, location: str) -> None:
    """Find out whether requests in one pass compute what they compute alone; RefusedError if they are not even similar."""
    generator = torch.Generator().manual_seed(0)
    first, second, last = 0, min(1, model.slots.count - 1), model.slots.count - 1
    for slot in sorted({first, second, last}):
        model.slots.fill(slot, _random_factors(model.slots.shapes, generator))
    # Different blends and lengths, among them one beyond a block, so that every path of attention and slots is used.
    uses: list[Use] = [(), ((first, 1.0),), ((second, 1.0),), ((first, 0.75), (last, -0.5)), ((last, 1.0),)]
    lengths = [_shortest([n, model.longest and model.longest - _STEPS]) or n for n in (5, BLOCK + 3, 2, 7, 3)]
    prompts = [torch.randint(len(model.base.head), (n,), generator=generator).tolist() for n in lengths]
    alone = [_generate_alone(model, prompt, use) for prompt, use in zip(prompts, uses, strict=True)]
    pairs, spans = [], []
    for prompt, use, (_, expected) in zip(prompts, uses, alone, strict=True):
        keys_values = KeysValues(len(prompt) + _STEPS)
        for start in range(0, len(prompt), BLOCK):
            logits = model.run([Span(prompt[start : start + BLOCK], keys_values, start, use)])[0]
        pairs.append((logits, expected[0]))
        spans.append(Span([], keys_values, len(prompt), use))
    for step in range(1, 1 + _STEPS):
        for span, (tokens, _) in zip(spans, alone, strict=True):
            span.ids = [tokens[span.start]]
        for count in (len(spans), max(rows, len(spans))):
            batch = [row % len(spans) for row in range(count)]
            logits = model.run([spans[row] for row in batch])
            pairs += [(batched, alone[row][1][step]) for batched, row in zip(logits, batch, strict=True)]
        for span in spans:
            span.start += 1
    model.slots.clear()
    model.token_size = spans[0].keys_values.size // spans[0].keys_values.room
    model.exact = all(torch.equal(batched, expected) for batched, expected in pairs)
    errors = torch.tensor(
        [float((batched - expected).norm() / expected.norm().clamp(min=1e-30)) for batched, expected in pairs]
    )
    # A layer with its own way of keeping keys and values would mix the requests.
    every_layer = len(spans[0].keys_values.layers) == model.base.model.config.get_text_config().num_hidden_layers
    if not (every_layer and float(errors.median()) <= 4 * torch.finfo(model.base.head.dtype).eps ** 0.75):
        problem = f"{type(model.base.model).__name__} does not keep the tokens of several requests apart"
        raise RefusedError(location, problem, _OTHER_ENGINE_HINT)


def _generate_alone(model: Model, prompt: list[int], use: Use) -> tuple[list[int], list[Tensor]]:
    """Extend a prompt by its likeliest tokens, alone in each pass; return the tokens, and the logits of each step."""
    keys_values, tokens, logits, start = KeysValues(len(prompt) + _STEPS), list(prompt), [], 0
    for _ in range(1 + _STEPS):
        logits.append(model.run([Span(tokens[start:], keys_values, start, use)])[0])
        start = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


def _random_factors(shapes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random factors for an adapter on every layer."""

    def numbers(features: int) -> Tensor:
        return _SPREAD * torch.randn(_RANK, features, generator=generator)

    return {path: (numbers(into), numbers(out)) for path, (out, into) in shapes.items()}
