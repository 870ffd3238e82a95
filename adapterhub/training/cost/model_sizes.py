"""The sizes of a base and of its adapter that time and memory depend on, from a BaseSpec and a config, without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from adapterhub.training.layers.targets import Sizes, resolve
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters import safe_regex
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.bases.canonical_names import BaseTensor
from adapterhub_converters.lazy_dataclass import dataclass

# The last layers of attention and of an MLP have their own input; the other layers of a module share one.
_OWN_INPUT = {"o_proj", "out_proj", "wo", "dense", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2"}
_EXPERT = safe_regex.Pattern(r"(?P<stack>.*\.experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
_STACK = safe_regex.Pattern(r".*\.experts\.(gate_up_proj|up_proj|down_proj)")
_DOWN = ("w2", "down_proj")
_TABLES = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_NOT_LINEAR = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True)
class Stack:
    """The stacked matrices of all experts of a layer, each `(out, in)`; gate and up are one matrix, as in transformers 5."""

    experts: int
    out: int
    inside: int

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.experts * self.out * self.inside


@dataclass(frozen=True)
class Target:
    """A target module: its rank, `(out, in)`, the number of such matrices, and whether it is an embedding table."""

    r: int
    out: int
    inside: int
    count: int = 1
    table: bool = False

    @property
    def numbers(self) -> int:
        """The number of parameters of the factors."""
        return self.count * self.r * (self.out + self.inside)


@dataclass(frozen=True)
class Shape:
    """The shape of a base.

    `linears` are `(out, in)` by path, `table` is path, vocabulary and hidden size, and `width` is the bytes of a number.
    """

    linears: Mapping[str, tuple[int, ...]]
    stacks: Mapping[str, Stack]
    table: tuple[str, int, int]
    parameters: int
    hidden: int
    layers: int
    mlp: int
    heads: int
    head_dim: int
    vocabulary: int
    chosen: int
    """Experts that a token is sent to."""
    width: int

    @cached_property
    def linear(self) -> int:
        """The number of weights in linear layers, experts included."""
        return sum(map(math.prod, self.linears.values())) + sum(stack.size for stack in self.stacks.values())

    @property
    def used(self) -> int:
        """The number of those weights that a single token passes."""
        idle = sum(stack.size * max(0, stack.experts - self.chosen) // stack.experts for stack in self.stacks.values())
        return self.linear - idle


def shape_of(config: TrainConfig, spec: BaseSpec) -> Shape:
    """Return the sizes of the base in `spec`, in the dtype that `config` computes in."""
    base_config, tensors = spec.config, _text_tensors(spec)
    hidden, heads = int(base_config.get("hidden_size") or 0), int(base_config.get("num_attention_heads") or 1)
    linears, stacks = _matrices(tensors)
    mlp = int(base_config.get("intermediate_size") or 4 * hidden)
    return Shape(
        linears=linears,
        stacks=stacks,
        table=_table(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        hidden=hidden,
        layers=int(base_config.get("num_hidden_layers") or 1),
        # The dense part of a mixture is its shared expert, if it has one.
        mlp=int(base_config.get("shared_expert_intermediate_size") or 0) if stacks else mlp,
        heads=heads,
        head_dim=int(base_config.get("head_dim") or hidden // max(1, heads)),
        vocabulary=int(base_config.get("vocab_size") or 0),
        chosen=int(base_config.get("num_experts_per_tok") or 1),
        width=4 if config.base.dtype == "float32" else 2,
    )


def _text_tensors(spec: BaseSpec) -> Mapping[str, BaseTensor]:
    """Return the tensors used for text: of a vision-language model, those of its text model under their names in memory."""
    if spec.text_type is None:
        return spec.tensors
    renamed = {name: spec.tensors[stored] for stored, name in spec.renaming.names(spec.tensors).items()}
    text = {name: tensor for name, tensor in renamed.items() if ".language_model." in name or not name.startswith("model.")}
    return text if any(".language_model." in name for name in text) else spec.tensors


def _matrices(tensors: Mapping[str, BaseTensor]) -> tuple[dict[str, tuple[int, ...]], dict[str, Stack]]:
    linears: dict[str, tuple[int, ...]] = {}
    stacks: dict[str, Stack] = {}
    matrix_shapes: dict[str, list[tuple[int, ...]]] = {}
    expert_counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        path, shape = _path(name), tensor.shape
        if len(shape) == 3 and _STACK.fullmatch(path):
            stacks[path] = Stack(*shape)
        elif len(shape) == 2 and (match := _EXPERT.fullmatch(path)):
            # Files have a matrix for each expert, the model in memory one stack; the first expert tells the shape.
            stack_path = f"{match['stack']}.{'down_proj' if match['leaf'] in _DOWN else 'gate_up_proj'}"
            expert_counts[f"{match['stack']}.{match['leaf']}"] += 1
            if expert_counts[f"{match['stack']}.{match['leaf']}"] == 1:
                matrix_shapes.setdefault(stack_path, []).append(shape)
            stacks[stack_path] = Stack(max(expert_counts.values()), sum(out for out, _ in matrix_shapes[stack_path]), shape[1])
        elif len(shape) == 2 and name.endswith(".weight") and not any(word in name for word in _NOT_LINEAR):
            linears[path] = shape
    return linears, stacks


def _table(tensors: Mapping[str, BaseTensor]) -> tuple[str, int, int]:
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and _path(name).endswith(_TABLES):
            return _path(name), tensor.shape[0], tensor.shape[1]
    return "", 0, 0


def _path(name: str) -> str:
    return name.removesuffix(".weight")


def targets(config: TrainConfig, shape: Shape) -> dict[str, Target]:
    """Return the target modules by path.

    Raises:
        RefusedError: The config names a module that the base does not have.
    """
    table, stacks = shape.table, list(shape.stacks)
    # Stacks of experts are adapted where they are named, as in peft.
    linears = [*shape.linears, *(stacks if config.lora.targets != "all-linear" else ())]
    sizes = Sizes(config.lora, config.location)
    target_modules = {}
    for path in resolve(config.lora, linears, [table[0]] if table[0] else [], config.location):
        if path in shape.stacks:
            stack = shape.stacks[path]
            target_modules[path] = Target(sizes.rank(path), stack.out, stack.inside, count=stack.experts)
        elif path == table[0]:
            target_modules[path] = Target(sizes.rank(path), table[1], table[2], table=True)
        else:
            out, inside = shape.linears[path]
            target_modules[path] = Target(sizes.rank(path), out, inside)
    return target_modules


def trained_parameters(config: TrainConfig, shape: Shape) -> int:
    """Return the number of trained parameters."""
    target_modules = targets(config, shape).values()
    magnitudes = sum(target.out for target in target_modules) if config.lora.dora else 0
    rows = len(config.lora.trainable_token_indices) * shape.hidden
    return sum(target.numbers for target in target_modules) + magnitudes + rows


def input_sizes(target_modules: Mapping[str, Target]) -> tuple[int, int]:
    """Return the size of a token's inputs of all adapted linear layers, with shared inputs counted for each layer, and once."""
    separate_size = 0
    largest_input: dict[str, int] = {}
    for path, target in target_modules.items():
        # A table saves token ids alone, and the inputs of experts are counted by `memory`.
        if target.table or target.count > 1:
            continue
        separate_size += target.inside
        key = path if path.rpartition(".")[2] in _OWN_INPUT else path.rpartition(".")[0]
        largest_input[key] = max(largest_input.get(key, 0), target.inside)
    return separate_size, sum(largest_input.values())
