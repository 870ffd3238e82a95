"""The base model, ready to be adapted: built empty by transformers, filled and quantised one tensor at a time.

The model's code comes from transformers, so that every architecture works; its weights never do: each is read from
its file (`weights`), quantised if it belongs to a linear layer, and let go; or read as it was quantised before (`kept`).
A parameter without a tensor, or a tensor without a parameter, is refused by name.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterhub.train import ranks
from adapterhub.train.config import BaseConfig, LoRAConfig
from adapterhub.train.layers import attention, dora, inits, lora, nf4, shards, tables
from adapterhub.train.layers.targets import Sizes, block, resolve
from adapterhub_converters.adapter import scaling
from adapterhub_converters.errors import FormatError, RefusedError

from . import kept, weights
from .weights import Weights

# Configs that change the logits after the output layer, which the loss here computes itself.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Base:
    """A model whose linear layers are frozen and whose targets carry LoRA, and its tokenizer."""

    model: Any
    tokenizer: Any
    targets: tuple[str, ...]
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
    def head_rows(self) -> tables.TokenRows | None:
        """Rows of the output layer that are trained, because it is tied to a table some of whose rows are."""
        rows = tables.token_rows(self.model)
        return rows if rows is not None and rows.weight is self.head else None


def load(
    path: Path,
    base: BaseConfig,
    adapter: LoRAConfig,
    *,
    where: str,
    progress: Callable[[int, int], None] | None = None,
    place: kept.Place | None = None,
    device: Any = _CPU,
) -> Base:
    """Build the model at `path`, quantised as `base` says, with `adapter`'s layers in it; `progress(done, all)`.

    `place`: Where the quantised base is kept; what isn't there yet is put there. Each tensor is quantised on the CPU and
    moved to `device` before the next is read.
    """

    def built(source: Weights) -> Base:
        return _built(path, source, base, adapter, where=where, progress=progress, device=device)

    notes: list[str] = []
    # A base that is changed before it is quantised (`inits`), or not quantised at all, is never kept.
    if place is None or base.quantise != "nf4" or adapter.init != "default":
        with weights.opened(path) as source:
            return built(source)
    if place.there:
        try:
            with kept.KeptWeights(place) as source:
                return built(source)
        except FormatError as error:
            notes.append(f"the quantised base that was kept is damaged, and is made anew ({error})")
            place.drop()
    with weights.opened(path) as source:
        keeps = not (source.quantised or base.shard) and ranks.first()
        source.made = {} if keeps else None
        made = built(source)
        if keeps and (failed := kept.write(place, path, source)):
            notes.append(failed)
    return replace(made, notes=tuple(notes))


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
    linears = lora.linears(model)
    targets = resolve(adapter, list(linears), list(tables.tables(model)), where)
    sizes = Sizes(adapter, where)
    numbers = {name: done for done, name in enumerate(linears)}
    for path_of_block, names in itertools.groupby(linears, block):
        for name in names:
            if progress:
                progress(numbers[name], len(linears))
            _replace(model, name, source, base, sizes if name in set(targets) else None, device=device)
        if base.shard and path_of_block:
            shards.divide(model.get_submodule(path_of_block), device)
    _fill(model, source, getattr(torch, base.dtype), device)
    source.check_all_used(model)
    _rebuild_buffers(model, str(path), device)
    tables.adapt(model, tuple(targets), sizes, adapter, where)
    if base.shard:
        shards.divide(model.base_model, device)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for _, parameter in lora.trained(model):
        parameter.requires_grad_()
    return Base(model.train(), tokenizer, tuple(targets))


def _empty(path: Path, base: BaseConfig, device: Any = _CPU) -> tuple[Any, Any]:
    import transformers

    with weights.beside(path) as folder:
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            with torch.device("meta"):
                # The attention for short rows is one for CPUs.
                own = attention.register() if device.type == "cpu" else "sdpa"
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, base.dtype), attn_implementation=own
                )
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise FormatError(str(path), f"transformers cannot build it ({str(error).splitlines()[0][:200]})") from error
    text = config.get_text_config()
    for key in _LOGIT_CHANGES:
        if getattr(text, key, None) not in (None, 0, 1, 1.0):
            raise RefusedError(f"{path}/config.json", f"{key} changes the logits and isn't trained through yet")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and ".experts." in f".{name}":
            raise RefusedError(f"{path}: {name}", "all experts lie in one stacked parameter, which isn't trained through yet")
    return model, tokenizer


def _replace(model: Any, path: str, source: Weights, base: BaseConfig, sizes: Sizes | None, *, device: Any) -> None:
    """Put a frozen layer, with LoRA if it is a target, in the place of an empty `nn.Linear`."""
    old = model.get_submodule(path)
    dtype = getattr(torch, base.dtype)
    bias = None if old.bias is None else source.take(f"{path}.bias", tuple(old.bias.shape)).to(device, dtype)
    where, shape = f"{path}.weight", tuple(old.weight.shape)
    if sizes is None:
        new: Any = lora.FrozenLinear(_frozen(source, where, shape, base).to(device), bias)
    else:
        adapter, r, alpha = sizes.config, sizes.rank(path), sizes.alpha(path)
        initial = None
        if adapter.init == "default":
            weight = _frozen(source, where, shape, base)
        else:
            scale = scaling(alpha, r, rslora=adapter.rslora)
            quantised, dense = base.quantise == "nf4", source.take(where, shape)
            dense = dense if quantised else dense.to(dtype)
            weight, initial = inits.begin(dense, adapter, r=r, scaling=scale, quantised=quantised, where=where)
            initial = None if initial is None else (initial[0].to(device), initial[1].to(device))
        kind = dora.DoRALinear if adapter.dora else lora.LoRALinear
        new = kind(weight.to(device), bias, r=r, alpha=alpha, rslora=adapter.rslora, dropout=adapter.dropout, initial=initial)
    if base.shard:
        new.base = shards.part(new.base)
    lora.replace(model, path, new)


def _frozen(source: Weights, name: str, shape: tuple[int, ...], base: BaseConfig) -> Any:
    """A weight as it is held: NF4, or a tensor in the dtype computed in."""
    dtype = getattr(torch, base.dtype)
    held = source.nf4(name, shape) if base.quantise == "nf4" else source.take(name, shape)
    return held if isinstance(held, nf4.NF4) else held.to(dtype)


def _fill(model: Any, source: Weights, dtype: Any, device: Any) -> None:
    """Give every parameter that is still empty its tensor; parameters that are one stay one."""
    filled: dict[int, Any] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            if id(parameter) not in filled:
                tensor = source.take(name, tuple(parameter.shape)).to(device, dtype)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, filled[id(parameter)])
    model.tie_weights()


def _rebuild_buffers(model: Any, where: str, device: Any) -> None:
    """Compute buffers that no file holds (rotary frequencies) by building their small modules again."""
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            try:
                lora.replace(model, path, type(module)(module.config).to(device))
            except (AttributeError, TypeError) as error:
                raise RefusedError(where, f"{path}: no way is known to compute its buffers without its checkpoint") from error
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise RefusedError(where, f"{name}: no value is known for it")


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
