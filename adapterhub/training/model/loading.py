"""The loading of a base model: transformers builds it empty, then it is filled and quantized one tensor at a time.

The model's code comes from transformers, so that every architecture works; its weights never do. Each is read from its file
(`base_tensors`), quantized if it belongs to a linear layer, and released, or read as it was quantized before
(`quantized_cache`). A parameter without a tensor, or a tensor without a parameter, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adapterhub.training import compute_device, distributed
from adapterhub.training.layers import embeddings, expert_stacks, lora, nf4_matrix, rms_norm, variants, varlen
from adapterhub.training.layers.targets import Sizes, resolve
from adapterhub.training.train_config import BaseConfig, LoRAConfig
from adapterhub_converters.adapter import scaling
from adapterhub_converters.errors import FormatError

from . import families, quantized_cache, transformers_api
from .base_files import BaseFiles
from .base_model import Base, logits_of, remove_vision
from .base_tensors import Weights
from .probes import with_documents_if_equivalent

_CPU = torch.device("cpu")
Progress = Callable[[int, int], None]
"""Called with the number of linear layers loaded so far, and the total."""


def load(
    files: BaseFiles,
    base: BaseConfig,
    adapter: LoRAConfig | None,
    *,
    location: str,
    progress: Progress | None = None,
    entry: quantized_cache.Entry | None = None,
    device: Any = _CPU,
) -> Base:
    """Build the model, quantized as `base` describes, with `adapter`'s layers.

    Args:
        adapter: The layers to adapt and how; None for a base whose linear layers are all frozen.
        location: The config, in messages.
        entry: The quantized base in the cache, which is read if it exists and otherwise written.
        device: The device of the result. Each tensor is quantized on the CPU and moved before the next is read.
    """
    build = partial(_build, files, base=base, adapter=adapter, location=location, progress=progress, device=device)
    if entry is None:
        with files.weights() as weights:
            return build(weights)
    # The first process quantizes, and the others read what it wrote; what is in the cache already, all read at once.
    must_quantize = distributed.total(float(not entry.exists)) > 0
    with distributed.in_turn(enabled=must_quantize):
        return _load_with_cache(build, files, entry)


def _load_with_cache(build: Callable[[Weights], Base], files: BaseFiles, entry: quantized_cache.Entry) -> Base:
    """Build the model from the cache entry, which is written if it does not exist or is damaged."""
    notes: list[str] = []
    if entry.exists:
        try:
            with quantized_cache.CachedWeights(entry) as weights:
                return build(weights)
        except FormatError as error:
            notes.append(f"the cached quantized base is damaged and is written again ({error})")
            entry.remove()
    with files.weights() as weights:
        # Matrices are collected for the cache only by the process that writes it, and only if it quantizes them.
        weights.fresh = None if weights.quantized or not distributed.first() else {}
        loaded_base = build(weights)
        if weights.fresh and (failure := quantized_cache.write(entry, files, weights)):
            notes.append(failure)
    return replace(loaded_base, notes=(*loaded_base.notes, *notes))


def _build(
    files: BaseFiles,
    weights: Weights,
    *,
    base: BaseConfig,
    adapter: LoRAConfig | None,
    location: str,
    progress: Progress | None,
    device: torch.device,
) -> Base:
    config, tokenizer = files.config_and_tokenizer()
    model = transformers_api.empty_model(config, getattr(torch, base.dtype), location=str(files.path))
    families.check(model, str(files.path))
    weights.bind(model, removed_paths=remove_vision(model))
    linears, stacks = lora.linears(model), expert_stacks.stacks(model)
    targets = resolve(adapter, list(linears), list(embeddings.tables(model)), location, stacks=list(stacks)) if adapter else []
    families.check_targets(model, targets, location)
    sizes = Sizes(adapter or LoRAConfig(), location)
    if stacks:
        weights.fresh = None  # experts would be cached in floats, which takes more of the disk than it saves
    paths, adapted = [*linears, *stacks], set(targets)
    for loaded, path in enumerate(paths):
        if progress:
            progress(loaded, len(paths))
        replace_layer = _replace_stack if path in stacks else _replace_linear
        replace_layer(model, path, weights, base, sizes if path in adapted else None, device=device)
    _fill_parameters(model, weights, getattr(torch, base.dtype), device)
    weights.check_all_used(model)
    families.compute_buffers(model, str(files.path))
    for module in model.modules():
        module._buffers.update(
            {name: None if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()}
        )
    embeddings.adapt(model, tuple(targets), sizes, sizes.config, location)
    # Everything is frozen first; only the adapter's own parameters are trained.
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for _, parameter in lora.trained_parameters(model):
        parameter.requires_grad_()
    rms_norm.replace_frozen(model)
    notes = tuple(families.notes(model, targets))
    result = Base(model.train(), tokenizer, tuple(targets), logits_of(model, str(files.path)), notes)
    without_mask = varlen.is_supported(device.type, getattr(torch, base.dtype), compute_device.capability(device))
    return with_documents_if_equivalent(result) if without_mask else result


def _replace_linear(
    model: nn.Module, path: str, weights: Weights, base: BaseConfig, sizes: Sizes | None, *, device: torch.device
) -> None:
    """Replace an empty `nn.Linear` or Conv1D by a frozen layer, with LoRA if it is a target."""
    empty_layer = model.get_submodule(path)
    dtype, is_nf4 = getattr(torch, base.dtype), base.quantize == "nf4"
    transposed = not isinstance(empty_layer, nn.Linear)  # Conv1D stores `(in, out)`
    bias = None if empty_layer.bias is None else weights.take(f"{path}.bias", tuple(empty_layer.bias.shape)).to(device, dtype)
    weight_name, shape = f"{path}.weight", tuple(empty_layer.weight.shape)

    def dense() -> Any:
        matrix = weights.take(weight_name, shape)
        matrix = matrix.t().contiguous() if transposed else matrix
        return matrix if is_nf4 else matrix.to(dtype)

    def frozen() -> Any:
        matrix = weights.nf4(weight_name, shape, transposed=transposed) if is_nf4 else dense()
        return (matrix if isinstance(matrix, nf4_matrix.NF4) else matrix.to(dtype)).to(device)

    if sizes is None:
        layer: Any = lora.FrozenLinear(frozen(), bias)
    else:
        adapter, r, alpha = sizes.config, sizes.rank(path), sizes.alpha(path)
        weight, initial = None, None
        if adapter.init == "pissa":
            scale = scaling(alpha, r, rslora=adapter.rslora)
            weight, initial = variants.initial_factors(dense(), r=r, scaling=scale, quantized=is_nf4, location=weight_name)
            weight, initial = weight.to(device), (initial[0].to(device), initial[1].to(device))
        layer_class = variants.DoRALinear if adapter.dora else lora.LoRALinear
        options: dict[str, Any] = {"r": r, "alpha": alpha, "rslora": adapter.rslora, "dropout": adapter.dropout}
        layer = layer_class(frozen() if weight is None else weight, bias, initial=initial, biased=adapter.lora_bias, **options)
    layer.transposed, layer.dtype = transposed, dtype
    lora.replace_module(model, path, layer)


def _replace_stack(
    model: nn.Module, path: str, weights: Weights, base: BaseConfig, sizes: Sizes | None, *, device: torch.device
) -> None:
    """Replace an empty parameter of stacked experts by their matrices, with LoRA if it is a target."""
    parent, _, name = path.rpartition(".")
    module, dtype = model.get_submodule(parent), getattr(torch, base.dtype)
    stacked = weights.take(path, tuple(getattr(module, name).shape))
    if base.quantize == "nf4":
        matrices = [nf4_matrix.quantize(matrix.contiguous(), path).to(device) for matrix in stacked.unbind(0)]
    else:
        matrices = [matrix.to(device) for matrix in stacked.to(dtype).unbind(0)]
    if sizes is None:
        stack: Any = expert_stacks.Stack(matrices, transposed=module.is_transposed)
    else:
        expert_stacks.check(sizes.config, path)
        r, alpha, rslora = sizes.rank(path), sizes.alpha(path), sizes.config.rslora
        stack = expert_stacks.LoRAStack(matrices, transposed=module.is_transposed, r=r, alpha=alpha, rslora=rslora)
    delattr(module, name)
    setattr(module, name, stack)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each NF4 matrix by the weights that it decodes to, as each step would compute them."""
    for module in model.modules():
        if isinstance(module, lora.Frozen):
            module.base = nf4_matrix.dense(module.base, dtype)
        elif isinstance(module, expert_stacks.Stack):
            module.matrices = tuple(nf4_matrix.dense(matrix, dtype) for matrix in module.matrices)


def _fill_parameters(model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Read every parameter that is still empty, and buffers that the files contain; tied parameters stay tied.

    Those that the family declares in float32, such as routers, stay so in any `dtype`, as in transformers.
    """
    filled: dict[int, Any] = {}
    in_float32 = transformers_api.float32_parameters(model, dtype)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta or name in weights:
            # A tied parameter has several names and is read once.
            if id(parameter) not in filled:
                kept_dtype = torch.float32 if name in in_float32 else dtype
                tensor = weights.take(name, tuple(parameter.shape)).to(device, kept_dtype)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, filled[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name in weights:
            parent, _, attribute = name.rpartition(".")
            integers = not buffer.is_floating_point()
            tensor = weights.take(name, tuple(buffer.shape), integers=integers).to(device, buffer.dtype)
            model.get_submodule(parent)._buffers[attribute] = tensor
    model.tie_weights()
