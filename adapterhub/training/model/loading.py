"""Load a base model: built empty by transformers, then filled and quantized one tensor at a time.

The model's code comes from transformers, so that every architecture works; its weights never do: each is read from its file
(`weights`), quantized if it belongs to a linear layer, and released; or read as it was quantized before (`quantized_cache`).
A parameter without a tensor, or a tensor without a parameter, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adapterhub.training import distributed
from adapterhub.training.config import BaseConfig, LoRAConfig
from adapterhub.training.layers import embeddings, experts, lora, nf4, variants, varlen
from adapterhub.training.layers.targets import Sizes, block, resolve
from adapterhub_converters.adapter import scaling
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

from . import families, library, quantized_cache
from .base import Base, by_documents, logits_of, remove_vision
from .base_files import BaseFiles
from .weights import Weights

_CPU = torch.device("cpu")
Progress = Callable[[int, int], None]
"""Called with the linear layers that are loaded, and with how many there are."""


def load(
    files: BaseFiles,
    base: BaseConfig,
    adapter: LoRAConfig | None,
    *,
    where: str,
    progress: Progress | None = None,
    entry: quantized_cache.Entry | None = None,
    device: Any = _CPU,
) -> Base:
    """Build the model, quantized as `base` describes, with `adapter`'s layers.

    Args:
        adapter: The layers to adapt and how; None for a base whose linear layers are all frozen.
        where: The config, in messages.
        entry: The quantized base in the cache, read if it exists, else written.
        device: The device of the result. Each tensor is quantized on the CPU and moved before the next is read.
    """
    build = partial(_build, files, base=base, adapter=adapter, where=where, progress=progress, device=device)
    if entry is None:
        with files.weights() as weights:
            return build(weights)
    # Of several processes the first quantizes, and the others read what it wrote. Parts of a base are made by all at once.
    missing = distributed.total(float(not entry.exists)) > 0
    with distributed.in_turn(when=missing and not base.shard):
        return _cached(build, files, base, entry)


def _cached(build: Callable[[Weights], Base], files: BaseFiles, base: BaseConfig, entry: quantized_cache.Entry) -> Base:
    """Build the model from the entry of the cache, which is written where it does not exist or is damaged."""
    notes: list[str] = []
    if entry.exists:
        try:
            with quantized_cache.CachedWeights(entry) as weights:
                return build(weights)
        except FormatError as error:
            notes.append(f"the cached quantized base is damaged and is written again ({error})")
            entry.remove()
    with files.weights() as weights:
        weights.fresh = None if weights.quantized or base.shard or not distributed.first() else {}
        built = build(weights)
        if weights.fresh and (failure := quantized_cache.write(entry, files, weights)):
            notes.append(failure)
    return replace(built, notes=(*built.notes, *notes))


def _build(
    files: BaseFiles,
    weights: Weights,
    *,
    base: BaseConfig,
    adapter: LoRAConfig | None,
    where: str,
    progress: Progress | None,
    device: torch.device,
) -> Base:
    model, tokenizer = _empty(files, base)
    weights.bind(model, without=remove_vision(model))
    linears, stacks = lora.linears(model), experts.stacks(model)
    targets = resolve(adapter, list(linears), list(embeddings.tables(model)), where, stacks=list(stacks)) if adapter else []
    families.check_targets(model, targets, where)
    sizes = Sizes(adapter or LoRAConfig(), where)
    done, total = 0, len(linears) + len(stacks)
    for path_of_block, names in _by_block([*linears, *stacks]).items():
        for name in names:
            if progress:
                progress(done, total)
            replace_layer = _replace_stack if name in stacks else _replace_linear
            replace_layer(model, name, weights, base, sizes if name in set(targets) else None, device=device)
            done += 1
        if base.shard and path_of_block:
            nf4.shard(model.get_submodule(path_of_block), device)
    _fill(model, weights, getattr(torch, base.dtype), device)
    weights.check_all_used(model)
    families.compute_buffers(model, str(files.path))
    for module in model.modules():
        module._buffers.update({name: None if own is None else own.to(device) for name, own in module._buffers.items()})
    embeddings.adapt(model, tuple(targets), sizes, sizes.config, where)
    if base.shard:
        nf4.shard(model.base_model, device)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for _, parameter in lora.trained_parameters(model):
        parameter.requires_grad_()
    notes = tuple(families.notes(model, targets))
    made = Base(model.train(), tokenizer, tuple(targets), logits_of(model, str(files.path)), notes)
    return by_documents(made) if varlen.supported(device, getattr(torch, base.dtype)) else made


def _empty(files: BaseFiles, base: BaseConfig) -> tuple[Any, Any]:
    """Build model and tokenizer with transformers."""
    where = str(files.path)
    document = json_file.parse_object(files.config_text, f"{where}: config.json")
    config, tokenizer = library.config_and_tokenizer(files.folder, document, where=where)
    model = library.empty(config, getattr(torch, base.dtype), where=where)
    families.check(model, where)
    return model, tokenizer


def _by_block(paths: Iterable[str]) -> dict[str | None, list[str]]:
    """Group paths by the layer of the model that contains them, in the model's order."""
    blocks: dict[str | None, list[str]] = {}
    for path in paths:
        blocks.setdefault(block(path), []).append(path)
    return blocks


def _replace_linear(
    model: nn.Module, path: str, weights: Weights, base: BaseConfig, sizes: Sizes | None, *, device: torch.device
) -> None:
    """Replace an empty `nn.Linear` or Conv1D by a frozen layer, with LoRA if it is a target."""
    old = model.get_submodule(path)
    dtype, quantized = getattr(torch, base.dtype), base.quantize == "nf4"
    transposed = not isinstance(old, nn.Linear)  # Conv1D: `(in, out)`
    bias = None if old.bias is None else weights.take(f"{path}.bias", tuple(old.bias.shape)).to(device, dtype)
    where, shape = f"{path}.weight", tuple(old.weight.shape)

    def dense() -> Any:
        whole = weights.take(where, shape)
        whole = whole.t().contiguous() if transposed else whole
        return whole if quantized else whole.to(dtype)

    def frozen() -> Any:
        matrix = weights.nf4(where, shape, transposed=transposed) if quantized else dense()
        return (matrix if isinstance(matrix, nf4.NF4) else matrix.to(dtype)).to(device)

    if sizes is None:
        new: Any = lora.FrozenLinear(frozen(), bias)
    else:
        adapter, r, alpha = sizes.config, sizes.rank(path), sizes.alpha(path)
        weight, initial = None, None
        if adapter.init != "default":
            scale = scaling(alpha, r, rslora=adapter.rslora)
            weight, initial = variants.initial_factors(dense(), adapter, r=r, scaling=scale, quantized=quantized, where=where)
            weight = weight.to(device)
            initial = None if initial is None else (initial[0].to(device), initial[1].to(device))
        kind = variants.DoRALinear if adapter.dora else lora.LoRALinear
        options: dict[str, Any] = {"r": r, "alpha": alpha, "rslora": adapter.rslora, "dropout": adapter.dropout}
        new = kind(frozen() if weight is None else weight, bias, initial=initial, biased=adapter.lora_bias, **options)
    new.transposed, new.dtype = transposed, dtype
    if base.shard:
        new.base = nf4.sharded(new.base)
    lora.replace_module(model, path, new)


def _replace_stack(
    model: nn.Module, path: str, weights: Weights, base: BaseConfig, sizes: Sizes | None, *, device: torch.device
) -> None:
    """Replace an empty parameter of stacked experts by their matrices, with LoRA if it is a target."""
    weights.fresh = None  # in floats, the experts of a cached base would take more of the disk than they save
    parent, _, name = path.rpartition(".")
    module, dtype = model.get_submodule(parent), getattr(torch, base.dtype)
    whole = weights.take(path, tuple(getattr(module, name).shape))
    if base.quantize == "nf4":
        matrices = [nf4.quantize(matrix.contiguous(), path).to(device) for matrix in whole.unbind(0)]
    else:
        matrices = [matrix.to(device) for matrix in whole.to(dtype).unbind(0)]
    if base.shard:
        matrices = [nf4.sharded(matrix) for matrix in matrices]
    if sizes is None:
        new: Any = experts.Stack(matrices, transposed=module.is_transposed)
    else:
        experts.check(sizes.config, path)
        r, alpha, rslora = sizes.rank(path), sizes.alpha(path), sizes.config.rslora
        new = experts.LoRAStack(matrices, transposed=module.is_transposed, r=r, alpha=alpha, rslora=rslora)
    delattr(module, name)
    setattr(module, name, new)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each matrix in NF4 by the weights that it stands for, as each step would."""
    for module in model.modules():
        if isinstance(module, lora.Frozen):
            module.base = nf4.dense(module.base, dtype)
        elif isinstance(module, experts.Stack):
            module.matrices = tuple(nf4.dense(matrix, dtype) for matrix in module.matrices)


def _fill(model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Read every parameter that is still empty, and buffers that the files contain; tied parameters stay tied."""
    filled: dict[int, Any] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta or name in weights:
            if id(parameter) not in filled:
                tensor = weights.take(name, tuple(parameter.shape)).to(device, dtype)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, filled[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name in weights:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = weights.take(name, tuple(buffer.shape)).to(device, buffer.dtype)
    model.tie_weights()
