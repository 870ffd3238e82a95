"""The base model, ready to be adapted: built empty by transformers, filled and quantised one tensor at a time.

The model's code comes from transformers, so that every architecture works; its weights never do: each is read from
its safetensors file, quantised if it belongs to a linear layer, and let go. A parameter without a tensor, or a
tensor without a parameter, is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adapterhub.train.config import BaseConfig, LoRAConfig
from adapterhub.train.layers import dora, experts, inits, lora, nf4, shards, tables
from adapterhub.train.layers.targets import Sizes, resolve
from adapterhub_converters.adapter import scaling
from adapterhub_converters.base.weights import ModelWeights
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

from . import buffers, families, stored
from .logits import Logits, logits_of


@dataclass(frozen=True, eq=False)
class Base:
    """A model whose linear layers are frozen and whose targets carry LoRA, and its tokenizer."""

    model: Any
    tokenizer: Any
    targets: tuple[str, ...]
    logits: Logits = field(default_factory=Logits)
    notes: tuple[str, ...] = ()

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
    def head_rows(self) -> tables.TokenRows | None:
        """Rows of the output layer that are trained, because it is tied to a table some of whose rows are."""
        rows = tables.token_rows(self.model)
        return rows if rows is not None and rows.weight is self.head else None


def load(
    folder: Path, base: BaseConfig, adapter: LoRAConfig, *, where: str, progress: Callable[[int, int], None] | None = None
) -> Base:
    """Build the model in `folder`, quantised as `base` says, with `adapter`'s layers in it; `progress(done, all)`."""
    model, tokenizer = _empty(folder, base)
    linears = lora.linears(model)
    stacks = experts.stacks(model)
    targets = resolve(adapter, list(linears), list(tables.tables(model)), where, stacks=list(stacks))
    families.check_targets(model, targets, where)
    sizes = Sizes(adapter, where)
    with _Weights(folder, model) as weights:
        for done, path in enumerate([*linears, *stacks]):
            if progress:
                progress(done, len(linears) + len(stacks))
            put = _replace_stack if path in stacks else _replace
            put(model, path, weights, base, sizes if path in set(targets) else None)
        _fill(model, weights, getattr(torch, base.dtype))
        weights.check_all_used(model)
    buffers.compute(model, str(folder))
    tables.adapt(model, tuple(targets), sizes, adapter, where)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for _, parameter in lora.trained(model):
        parameter.requires_grad_()
    return Base(model.train(), tokenizer, tuple(targets), logits_of(model, str(folder)), tuple(families.notes(model, targets)))


def _empty(folder: Path, base: BaseConfig) -> tuple[Any, Any]:
    import transformers

    if not (folder / "config.json").is_file():
        raise NotFoundError(str(folder), "no base model: there is no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = families.empty(config, getattr(torch, base.dtype))
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise FormatError(str(folder), f"transformers cannot build it ({str(error).splitlines()[0][:200]})") from error
    families.check(model, str(folder))
    return model, tokenizer


def _replace(model: Any, path: str, weights: _Weights, base: BaseConfig, sizes: Sizes | None) -> None:
    """Put a frozen layer, with LoRA if it is a target, in the place of an empty `nn.Linear`."""
    old = model.get_submodule(path)
    dtype = getattr(torch, base.dtype)
    dense = weights.take(f"{path}.weight", tuple(old.weight.shape))
    transposed = not isinstance(old, nn.Linear)
    if transposed:  # Conv1D: `(in, out)`
        dense = dense.t().contiguous()
    dense = dense if base.quantise == "nf4" else dense.to(dtype)
    bias = None if old.bias is None else weights.take(f"{path}.bias", tuple(old.bias.shape)).to(dtype)
    where, quantised = f"{path}.weight", base.quantise == "nf4"
    if sizes is None:
        new: Any = lora.FrozenLinear(nf4.quantise(dense, where) if quantised else dense, bias)
    else:
        adapter, r, alpha = sizes.config, sizes.rank(path), sizes.alpha(path)
        scale = scaling(alpha, r, rslora=adapter.rslora)
        weight, initial = inits.begin(dense, adapter, r=r, scaling=scale, quantised=quantised, where=where)
        kind = dora.DoRALinear if adapter.dora else lora.LoRALinear
        words: dict[str, Any] = {
            "r": r,
            "alpha": alpha,
            "rslora": adapter.rslora,
            "dropout": adapter.dropout,
            "biased": adapter.lora_bias,
        }
        new = kind(weight, bias, initial=initial, **words)
    new.transposed = transposed
    if base.shard:
        new.base = shards.part(new.base)
    lora.replace(model, path, new)


def _replace_stack(model: Any, path: str, weights: _Weights, base: BaseConfig, sizes: Sizes | None) -> None:
    """Put a stack of experts' matrices, with LoRA if it is a target, in the place of an empty parameter."""
    parent, _, name = path.rpartition(".")
    module, dtype = model.get_submodule(parent), getattr(torch, base.dtype)
    whole = weights.take(path, tuple(getattr(module, name).shape))
    matrices = experts.held(whole, partial(nf4.quantise, where=path)) if base.quantise == "nf4" else whole.to(dtype).unbind(0)
    if base.shard:
        matrices = [shards.part(matrix) for matrix in matrices]
    new: Any = experts.Stack(matrices, transposed=module.is_transposed)
    if sizes is not None:
        experts.check(sizes.config, path)
        r, alpha, rslora = sizes.rank(path), sizes.alpha(path), sizes.config.rslora
        new = experts.LoRAStack(matrices, transposed=module.is_transposed, r=r, alpha=alpha, rslora=rslora)
    delattr(module, name)
    setattr(module, name, new)


def _fill(model: Any, weights: _Weights, dtype: Any) -> None:
    """Give every parameter that is still empty its tensor; parameters that are one stay one."""
    filled: dict[int, Any] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta or name in weights:
            if id(parameter) not in filled:
                tensor = weights.take(name, tuple(parameter.shape)).to(dtype)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, filled[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name in weights:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = weights.take(name, tuple(buffer.shape)).to(buffer.dtype)
    model.tie_weights()


class _Weights(ModelWeights):
    """The tensors of a model folder, each read when taken."""

    def __init__(self, folder: Path, model: Any) -> None:
        super().__init__(folder)
        if not self.names:
            raise NotFoundError(self.where, "no weights: there is no model.safetensors")
        self._model, self._taken = model, set[str]()
        self._recipes = stored.recipes(model, self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        """The parameter, in the dtype that its tensors are stored in, which must be a float."""
        if name not in self:
            raise RefusedError(self.where, f"the model has a parameter {name!r}, its files have no such tensor")
        made = self._recipes[name].made(name, self._read, self._model)
        if tuple(made.shape) != shape:
            raise RefusedError(self.where, f"{name}: {tuple(made.shape)} isn't of the model's shape {shape}")
        return made

    def _read(self, name: str) -> Any:
        info = self.info(name)
        if info.dtype not in ("BF16", "F16", "F32"):
            raise RefusedError(self.where, f"{name}: {info.dtype} {info.shape} isn't a float tensor")
        self._taken.add(name)
        return as_torch(self.stored(name))

    def check_all_used(self, model: Any) -> None:
        """Refuse a tensor that no parameter took: the model would not be the one in the files."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        left = sorted(
            name for name in self.names - self._taken - tied if not name.endswith(("rotary_emb.inv_freq", ".attn.bias"))
        )
        if left:
            raise RefusedError(self.where, f"tensor {left[0]!r} belongs to no parameter of the model")


def as_torch(array: np.ndarray) -> Any:
    """The same memory as a tensor; bfloat16 goes by its bits, since neither library knows the other's."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_numpy(tensor: Any) -> np.ndarray:
    """A float32 copy in C order, for the writers."""
    return np.array(tensor.detach().to(torch.float32).numpy(), order="C")


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
