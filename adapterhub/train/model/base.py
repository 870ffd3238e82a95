"""The base model, ready to be adapted: built empty by transformers, filled and quantized one tensor at a time.

The model's code comes from transformers, so that every architecture works; its weights never do: each is read from
its file (`weights`), quantized if it belongs to a linear layer, and let go; or read as it was quantized before (`kept`).
A parameter without a tensor, or a tensor without a parameter, is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterhub.train import distributed
from adapterhub.train.config import BaseConfig, LoRAConfig
from adapterhub.train.layers import dora, embeddings, experts, inits, lora, nf4, shards
from adapterhub.train.layers.targets import Sizes, block, resolve
from adapterhub_converters.adapter import scaling
from adapterhub_converters.errors import FormatError

from . import buffers, families, quantized_cache, weights
from .logits import Logits, logits_of
from .weights import Weights

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Base:
    """A model whose linear layers are frozen and whose targets carry LoRA, and its tokenizer."""

    model: Any
    tokenizer: Any
    targets: tuple[str, ...]
    logits: Logits = field(default_factory=Logits)
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> Any:
        """Where it computes."""
        return self.head.device

    @property
    def head(self) -> Any:
        """The output layer's weight, `(vocab, hidden)`."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Any:
        """The output layer's bias, `(vocab,)`, or None."""
        return self.model.get_output_embeddings().bias

    def states(self, ids: Any, positions: Any) -> Any:
        """The last hidden states `(rows, tokens, hidden)` of int64 `(rows, tokens)`."""
        words = {"position_ids": positions} if self.takes_positions else {}
        return self.model.base_model(input_ids=ids, use_cache=False, **words).last_hidden_state

    @property
    def takes_positions(self) -> bool:
        """Whether the model can be told where in its document each token is."""
        return "position_ids" in inspect.signature(self.model.base_model.forward).parameters

    @property
    def head_rows(self) -> embeddings.TokenRows | None:
        """Rows of the output layer that are trained, because it is tied to a table some of whose rows are."""
        rows = embeddings.token_rows(self.model)
        return rows if rows is not None and rows.weight is self.head else None


def load(
    path: Path,
    base: BaseConfig,
    adapter: LoRAConfig,
    *,
    where: str,
    progress: Callable[[int, int], None] | None = None,
    place: quantized_cache.Place | None = None,
    device: Any = _CPU,
) -> Base:
    """Build the model at `path`, quantized as `base` says, with `adapter`'s layers in it; `progress(done, all)`.

    `place`: Where the quantized base is kept; what isn't there yet is put there. Each tensor is quantized on the CPU and
    moved to `device` before the next is read.
    """

    def built(source: Weights) -> Base:
        return _built(path, source, base, adapter, where=where, progress=progress, device=device)

    notes: list[str] = []
    # A base that is changed before it is quantized (`inits`), or not quantized at all, is never kept.
    if place is None or base.quantize != "nf4" or adapter.init != "default":
        with weights.opened(path) as source:
            return built(source)
    if place.there:
        try:
            with quantized_cache.KeptWeights(place) as source:
                return built(source)
        except FormatError as error:
            notes.append(f"the quantized base that was kept is damaged, and is made anew ({error})")
            place.drop()
    with weights.opened(path) as source:
        keeps = not (source.quantized or base.shard) and distributed.first()
        source.made = {} if keeps else None
        made = built(source)
        if source.made and (failed := quantized_cache.write(place, path, source)):
            notes.append(failed)
    return replace(made, notes=(*made.notes, *notes))


def _built(
    path: Path,
    source: Weights,
    base: BaseConfig,
    adapter: LoRAConfig,
    *,
    where: str,
    progress: Callable[[int, int], None] | None,
    device: Any,
) -> Base:
    model, tokenizer = _empty(path, base, device)
    source.bind(model)
    linears, stacks = lora.linears(model), experts.stacks(model)
    targets = resolve(adapter, list(linears), list(embeddings.tables(model)), where, stacks=list(stacks))
    families.check_targets(model, targets, where)
    sizes = Sizes(adapter, where)
    done, total = 0, len(linears) + len(stacks)
    for path_of_block, names in _blocks([*linears, *stacks]).items():
        for name in names:
            if progress:
                progress(done, total)
            put = _replace_stack if name in stacks else _replace
            put(model, name, source, base, sizes if name in set(targets) else None, device=device)
            done += 1
        if base.shard and path_of_block:
            shards.divide(model.get_submodule(path_of_block), device)
    _fill(model, source, getattr(torch, base.dtype), device)
    source.check_all_used(model)
    buffers.compute(model, str(path))
    _move_buffers(model, device)
    embeddings.adapt(model, tuple(targets), sizes, adapter, where)
    if base.shard:
        shards.divide(model.base_model, device)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for _, parameter in lora.trained(model):
        parameter.requires_grad_()
    return Base(model.train(), tokenizer, tuple(targets), logits_of(model, str(path)), tuple(families.notes(model, targets)))


def _blocks(paths: Iterable[str]) -> dict[str | None, list[str]]:
    """The paths of each layer of the model, in its order."""
    found: dict[str | None, list[str]] = {}
    for path in paths:
        found.setdefault(block(path), []).append(path)
    return found


def _empty(path: Path, base: BaseConfig, device: Any = _CPU) -> tuple[Any, Any]:
    import transformers

    with weights.beside(path) as folder:
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model = families.empty(config, getattr(torch, base.dtype), device)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise FormatError(str(path), f"transformers cannot build it ({str(error).splitlines()[0][:200]})") from error
    families.check(model, str(path))
    return model, tokenizer


def _replace(model: Any, path: str, source: Weights, base: BaseConfig, sizes: Sizes | None, *, device: Any) -> None:
    """Put a frozen layer, with LoRA if it is a target, in the place of an empty `nn.Linear` or Conv1D."""
    old = model.get_submodule(path)
    dtype, quantized = getattr(torch, base.dtype), base.quantize == "nf4"
    transposed = not isinstance(old, nn.Linear)  # Conv1D: `(in, out)`
    bias = None if old.bias is None else source.take(f"{path}.bias", tuple(old.bias.shape)).to(device, dtype)
    where, shape = f"{path}.weight", tuple(old.weight.shape)

    def dense() -> Any:
        whole = source.take(where, shape)
        whole = whole.t().contiguous() if transposed else whole
        return whole if quantized else whole.to(dtype)

    def frozen() -> Any:
        held = source.nf4(where, shape, transposed=transposed) if quantized else dense()
        return (held if isinstance(held, nf4.NF4) else held.to(dtype)).to(device)

    if sizes is None:
        new: Any = lora.FrozenLinear(frozen(), bias)
    else:
        adapter, r, alpha = sizes.config, sizes.rank(path), sizes.alpha(path)
        weight, initial = None, None
        if adapter.init != "default":
            scale = scaling(alpha, r, rslora=adapter.rslora)
            weight, initial = inits.begin(dense(), adapter, r=r, scaling=scale, quantized=quantized, where=where)
            weight = weight.to(device)
            initial = None if initial is None else (initial[0].to(device), initial[1].to(device))
        kind = dora.DoRALinear if adapter.dora else lora.LoRALinear
        words: dict[str, Any] = {"r": r, "alpha": alpha, "rslora": adapter.rslora, "dropout": adapter.dropout}
        new = kind(frozen() if weight is None else weight, bias, initial=initial, biased=adapter.lora_bias, **words)
    new.transposed = transposed
    if base.shard:
        new.base = shards.part(new.base)
    lora.replace(model, path, new)


def _replace_stack(model: Any, path: str, source: Weights, base: BaseConfig, sizes: Sizes | None, *, device: Any) -> None:
    """Put a stack of experts' matrices, with LoRA if it is a target, in the place of an empty parameter."""
    source.made = None  # kept in floats, a base with experts would take more of the disk than it saves
    parent, _, name = path.rpartition(".")
    module, dtype = model.get_submodule(parent), getattr(torch, base.dtype)
    whole = source.take(path, tuple(getattr(module, name).shape))
    matrices = experts.held(whole, partial(nf4.quantize, where=path)) if base.quantize == "nf4" else whole.to(dtype).unbind(0)
    matrices = [matrix.to(device) for matrix in matrices]
    if base.shard:
        matrices = [shards.part(matrix) for matrix in matrices]
    if sizes is None:
        new: Any = experts.Stack(matrices, transposed=module.is_transposed)
    else:
        experts.check(sizes.config, path)
        r, alpha, rslora = sizes.rank(path), sizes.alpha(path), sizes.config.rslora
        new = experts.LoRAStack(matrices, transposed=module.is_transposed, r=r, alpha=alpha, rslora=rslora)
    delattr(module, name)
    setattr(module, name, new)


def _fill(model: Any, source: Weights, dtype: Any, device: Any) -> None:
    """Give every parameter that is still empty its tensor; parameters that are one stay one."""
    filled: dict[int, Any] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta or name in source:
            if id(parameter) not in filled:
                tensor = source.take(name, tuple(parameter.shape)).to(device, dtype)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, filled[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name in source:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = source.take(name, tuple(buffer.shape)).to(device, buffer.dtype)
    model.tie_weights()


def _move_buffers(model: Any, device: Any) -> None:
    for module in model.modules():
        module._buffers.update(
            {name: buffer if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()}
        )


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """So many threads for torch within the block; None leaves them. Yields how many there are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
