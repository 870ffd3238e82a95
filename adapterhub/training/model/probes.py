"""What a loaded base does with its attention, found by running it before the first step.

Whether it separates the documents of a row: positions that restart tell most attention layers where a document begins, but
recurrent layers, convolutions over tokens, and models without positions read on, so that part of what they learn from one
document would come from another. And whether it computes here what its family's own eager attention computes: code of a family
that depends on the name of the attention, or an argument that is read differently, would train another model without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapterhub.training.data.packed_rows import IGNORED, PackedRows, Rows
from adapterhub.training.layers import row_attention
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import RefusedError

from .base_model import Base, decoder

_FIRST_LENGTH, _SECOND_LENGTH = 7, 9  # tokens of the two random documents
_TOLERANCE = 0.05  # of the norm of all states: differences that 16 bits and many layers can cause
# Numbers of a config beyond which attention no longer reaches every earlier token.
_LIMIT = safe_regex.Pattern(r"(?:.*_)?(?:window|window_size|chunk_size|topk|block_size)")
_BEYOND = 1.25  # the length of the compared row, relative to the largest limit
_EPSILONS = 4  # of the dtype, the difference of two computations of the same attention, relative to its norm
_MIN_TOLERANCE = 1e-4  # in float32, where sums in another order differ by more than its epsilon
_MAX_LAYERS = 12  # that are compared, from the first on
_BYTES_PER_SCORE = 12  # of eager attention: scores, their softmax in float32, and the mask


def check_isolation(base: Base, data: Iterable[Rows | PackedRows], location: str, hint: str = "Set pack = false") -> None:
    """Refuse rows of several documents for a model that does not separate them."""
    if any(map(share_rows, data)) and not isolates_documents(base):
        problem = f"{type(base.model).__name__} does not separate the documents that share a row"
        raise RefusedError(f"{location}: [data] pack", problem, hint)


def share_rows(rows: Rows | PackedRows) -> bool:
    """Return whether any row has labels in a document after its first one."""
    for batch in rows.parts():
        after_first = np.logical_or.accumulate((batch.positions == 0) & (np.arange(batch.positions.shape[1]) > 0), axis=1)
        if (after_first & (batch.labels != IGNORED)).any():
            return True
    return False


def isolates_documents(base: Base) -> bool:
    """Return whether the states of a document are independent of the document before it in the row.

    Every number of the gradient of the second document's states toward the embeddings of the first has to be zero: masked
    scores have weight 0, and so have their gradients, in every dtype. Comparing states would need a tolerance, because experts
    round differently next to other tokens; in 16 bits, that tolerance would hide the leak of most recurrent layers.
    """
    ids, positions = _two_documents(base)
    first = positions[0].tolist().index(0, 1)
    documents = base.documents(positions.numpy())
    embedded_tokens: list[Tensor] = []

    def detach_embeddings(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded_tokens.append(output.detach().requires_grad_())
        return embedded_tokens[0].clone()  # a clone, because some models scale their embeddings in place

    handle = base.model.get_input_embeddings().register_forward_hook(detach_embeddings)
    base.model.eval()
    try:
        states = base.states(ids, positions.to(base.device), documents)[:, first:]
        upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
        (gradient,) = torch.autograd.grad(states, embedded_tokens, upstream)
    finally:
        handle.remove()
        base.model.train()
    return bool(gradient[:, first:].any()) and not gradient[:, :first].any()


def _two_documents(base: Base) -> tuple[Tensor, Tensor]:
    """Return random ids on the model's device, and positions on the CPU, of two documents in a row.

    Each is longer than the spans of tokens that a model compresses into one key (DeepSeek-V4): a document without a whole span
    sees none of these keys.
    """
    spans = getattr(base.model.config.get_text_config(), "compress_rates", None) or {}
    lengths = [length + max(spans.values(), default=0) for length in (_FIRST_LENGTH, _SECOND_LENGTH)]
    ids = torch.randint(0, len(base.head), (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return ids.to(base.device), torch.cat([torch.arange(length) for length in lengths])[None]


def with_documents_if_equivalent(base: Base) -> Base:
    """Return the base with attention by documents if its model then computes the same as with masks; otherwise `base`.

    transformers marks models whose attention is right without a mask, for flash attention. Whether this model passes on what
    its attention needs, and needs nothing else, is found by running it on two documents.
    """
    if not getattr(base.model, "_supports_flash_attn", False):
        return base
    ids, positions = _two_documents(base)
    without_masks = replace(base, by_documents=True)
    documents, on_device = without_masks.documents(positions.numpy()), positions.to(base.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            base.model.train()
            without_masks.states(ids, on_device, documents)  # with dropout, which attention without a mask refuses
            base.model.eval()
            unmasked, masked = without_masks.states(ids, on_device, documents).float(), base.states(ids, on_device).float()
        is_equivalent = bool((unmasked - masked).norm() <= _TOLERANCE * masked.norm()) and isolates_documents(without_masks)
    except (RefusedError, RuntimeError, TypeError, ValueError):
        return base
    finally:
        base.model.train()
    return without_masks if is_equivalent else base


# ---- Attention against that of the family


def check_attention(base: Base, longest: int, free: int | None, location: str, *, packed: bool = True) -> list[str]:
    """Refuse a model whose attention differs from its family's own eager attention by more than rounding; return notes.

    The first layers, up to the first of each kind, run on a random row that is longer than each window, chunk and choice of
    keys that matters in rows of `longest` tokens. Each attention module then runs again, on the same input, with its own eager
    attention.

    Args:
        free: The free bytes, half of which the scores of eager attention may take; None for no limit.
        packed: Whether documents share rows: the row has two then.
    """
    if not row_attention.suits(type(base.model)) or base.model.config._attn_implementation != row_attention.NAME:
        return []
    config = base.model.config.get_text_config()
    length, limit = _compared_length(config, longest), _largest_limit(config, longest)
    heads = getattr(config, "num_attention_heads", 1)
    while free is not None and length > _FIRST_LENGTH + _SECOND_LENGTH and heads * length**2 * _BYTES_PER_SCORE > free // 2:
        length //= 2
    one_document = torch.arange(length)[None]
    two_documents = torch.cat([torch.arange(_FIRST_LENGTH), torch.arange(length - _FIRST_LENGTH)])[None]
    tolerance = max(_EPSILONS * torch.finfo(base.head.dtype).eps, _MIN_TOLERANCE)
    path, difference = _largest_difference(base, two_documents if packed else one_document)
    # A difference that is not a number is refused, too.
    if packed and not difference <= tolerance and _largest_difference(base, one_document)[1] <= tolerance:
        problem = f"{type(base.model).__name__} does not attend correctly in rows that documents share ({path})"
        raise RefusedError(f"{location}: [data] pack", problem, "Set pack = false")
    if not difference <= tolerance:
        problem = f"{path}: its attention differs by {difference:.2g} from that of transformers, in a row of {length} tokens"
        raise RefusedError(f"{location}: {type(base.model).__name__}", problem, "Use a base of another family, and report it")
    if length <= limit:
        return [f"attention was compared with transformers' own in rows of {length} tokens only: memory is short for {limit}"]
    return []


def _limits(config: Any, longest: int) -> list[int]:
    """Return the numbers of tokens beyond which attention is cut, if rows can be longer."""
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int}
    limits = [value for name, value in numbers.items() if _LIMIT.fullmatch(name)]
    limits.append(numbers.get("index_block_size", 0) * numbers.get("index_topk_blocks", 0))
    return [limit for limit in limits if 0 < limit < longest]


def _largest_limit(config: Any, longest: int) -> int:
    # Rows of more than MAX_LENGTH tokens are computed in another way.
    return max([*_limits(config, longest), row_attention.MAX_LENGTH if longest > row_attention.MAX_LENGTH else 0])


def _compared_length(config: Any, longest: int) -> int:
    shortest = _FIRST_LENGTH + _SECOND_LENGTH
    return max(min(longest, _FIRST_LENGTH + int(_BEYOND * _largest_limit(config, longest))), shortest)


def _largest_difference(base: Base, positions: Tensor) -> tuple[str, float]:
    """Return the path of the attention module with the largest difference, relative to the norm of what it returns."""
    ids = torch.randint(0, len(base.head), positions.shape, generator=torch.Generator().manual_seed(0)).to(base.device)
    base.model.eval()
    documents = base.documents(positions.numpy())
    on_device = positions.to(base.device)
    paths = {module: path for path, module in base.model.named_modules()}
    with torch.no_grad(), _first_layers(base):
        modules = _attention_modules(base, ids[:, :2], on_device[:, :2])
        with _recorded(modules) as ours:
            _run(base, ids, on_device, documents)
        base.model.set_attn_implementation("eager")
        try:
            with _recorded(modules, inputs=[entry[1] for entry in ours]) as eager:
                _run(base, ids, on_device, None)
        finally:
            base.model.set_attn_implementation(row_attention.NAME)
            base.model.train()
    largest = ("", 0.0)
    for (module, _, output), (_, _, expected) in zip(ours, eager, strict=True):
        for tokens in (slice(None), slice(-(output.shape[1] // 5) or None, None)):
            norm = float(expected[:, tokens].float().norm()) or 1.0
            difference = float((output[:, tokens].float() - expected[:, tokens].float()).norm()) / norm
            if not difference <= largest[1]:
                largest = (paths[module], difference)
    return largest


class _EnoughLayersError(Exception):
    """Enough layers were run; no failure."""


def _run(base: Base, ids: Tensor, positions: Tensor, documents: Any) -> None:
    with suppress(_EnoughLayersError):
        base.states(ids, positions, documents)


@contextmanager
def _first_layers(base: Base) -> Iterator[None]:
    """Within the block, stop each run of the model behind the first layer of each kind."""
    stacks = [child for child in decoder(base.model).children() if isinstance(child, nn.ModuleList)]
    if not stacks:
        yield
        return
    layers = max(stacks, key=len)
    kinds = [_kind(layer) for layer in layers]
    count = min(max(kinds.index(kind) for kind in kinds) + 1, _MAX_LAYERS)
    if count == len(layers):
        yield
        return

    def stop(*_: Any) -> None:
        raise _EnoughLayersError

    handle = layers[count].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _kind(layer: nn.Module) -> Any:
    """Return what distinguishes the attention of a layer: classes and settings of its modules, without its number."""
    return [
        (type(module).__name__, sorted((name, repr(value)) for name, value in vars(module).items() if _is_setting(name, value)))
        for path, module in layer.named_modules()
        if "attn" in path or "attention" in path or not path
    ]


def _is_setting(name: str, value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) and "layer_id" not in name and not name.startswith("_")


def _attention_modules(base: Base, ids: Tensor, positions: Tensor) -> list[nn.Module]:
    """Return the modules that call the attention of `row_attention`."""
    from transformers import AttentionInterface

    modules: dict[nn.Module, None] = {}

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modules[module] = None
        return row_attention.attention(module, *args, **kwargs)

    AttentionInterface.register(row_attention.NAME, attention)
    try:
        _run(base, ids, positions, None)
    finally:
        row_attention.register()
    return list(modules)


@contextmanager
def _recorded(
    modules: Iterable[nn.Module], inputs: list[Tensor] | None = None
) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Within the block, record module, input and output of each call of `modules`, whose inputs `inputs` replace if given."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    latest: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        latest[:] = [states if inputs is None else inputs[len(calls)]]
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": latest[0]}
        return (latest[0], *args[1:]), kwargs

    def after(module: nn.Module, _: Any, output: Any) -> None:
        calls.append((module, latest[0], output[0] if isinstance(output, tuple) else output))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield calls
