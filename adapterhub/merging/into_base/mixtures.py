"""The type of each tensor of a GGUF in a mixture such as Q4_K_M.

The rules are those of llama-quantize (llama.cpp, `src/llama-quant.cpp`, `llama_tensor_get_type_impl`): more bits for the output
layer, and in some layers for the values of the attention and the last matrices of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub_converters.containers.gguf_types import MetadataValue

from .tensor_types import fitting

MIXTURES = {"q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_s": "Q5_K", "q5_k_m": "Q5_K"}
"""From names of mixtures to the type of most of their tensors."""
TABLES = ("token_embd.weight", "per_layer_token_embd.weight")
"""Tables of embeddings."""
_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_FLOATS = ("_norm.weight", "ffn_gate_inp.weight", "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight")
"""Parts of the names of matrices that stay in floats, as do vectors and tables of positions."""
# Layers of the 70B models, whose values are shared by so many heads that they get more bits.
_LARGE = {"llama": 80, "qwen2": 80, "olmo": 80}
_BLOCK = 256


def mixture_types(
    name: str, gguf: str, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, MetadataValue]
) -> dict[str, str]:
    """Return the type of every tensor that is quantized.

    Args:
        name: One of MIXTURES.
        gguf: The architecture.
        shapes: The tensors of the file, in numpy's order.
        numbers: The architecture's hyperparameters, without its prefix.
    """
    mixture = _Mixture(name, gguf, shapes, numbers)
    # In the order of llama.cpp's list of weights, by which it counts layers.
    return {
        tensor: mixture.next_type(tensor, shapes[tensor][-1])
        for tensor in sorted(shapes, key=_place)
        if _is_quantized(tensor, shapes[tensor])
    }


def _place(name: str) -> tuple[int, str]:
    return _layer(name), name


def _layer(name: str) -> int:
    number = name.removeprefix("blk.").partition(".")[0]
    return int(number) if name.startswith("blk.") and number.isdecimal() else -1


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    first = next((at for at, size in enumerate(shape) if size != 1), len(shape) - 1)  # ggml drops leading dimensions of 1
    matrix = len(shape) - first > 1 and name.endswith("weight")
    return matrix and name != "position_embd.weight" and not any(part in name for part in _FLOATS)


class _Mixture:
    """A walk over the tensors of a model that counts layers as llama-quantize does."""

    def __init__(
        self, name: str, gguf: str, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, MetadataValue]
    ) -> None:
        self._name, self._gguf = name, gguf
        self._base = MIXTURES[name]
        self._tied = "output.weight" not in shapes
        self._layers, self._experts = _number(numbers, "block_count"), _number(numbers, "expert_count")
        heads = _number(numbers, "attention.head_count"), _number(numbers, "attention.head_count_kv")
        self._large = _LARGE.get(gguf) == self._layers and not (gguf == "llama" and heads[0] == heads[1])
        self._all_values = sum(any(part in tensor for part in _VALUES) for tensor in shapes)
        self._values = self._downs = 0

    def next_type(self, tensor: str, columns: int) -> str:
        """Return the type of the next tensor, in llama.cpp's order."""
        return fitting(self._type(tensor, columns), columns)

    def _type(self, tensor: str, columns: int) -> str:
        """Return the type by the tensor's role, before rows that do not fit whole blocks are considered."""
        if tensor == "output.weight" or (self._tied and tensor in TABLES):
            return "Q8_0" if self._gguf == "falcon" or columns % _BLOCK else "Q6_K"
        if tensor in TABLES:
            return self._base
        if any(part in tensor for part in _VALUES):
            return self._value()
        # Mixtral: llama-quantize knows it by its eight experts.
        if "attn_k.weight" in tensor and self._experts == 8:
            return "Q8_0"
        if "ffn_down" in tensor and "attn_" not in tensor and "ffn_up" not in tensor and "ffn_gate" not in tensor:
            return self._down(tensor)
        mixtral_of_8 = self._experts == 8 and self._gguf != "falcon" and self._base == "Q4_K"
        return "Q5_K" if "attn_output.weight" in tensor and mixtral_of_8 else self._base

    def _value(self) -> str:
        """Return the type of the next attention tensor that holds values."""
        number, type_name = self._values, self._base
        self._values += 1
        if self._name.endswith("_m") and _is_special(number, self._all_values):
            type_name = "Q6_K"
        elif self._name == "q4_k_s" and number < 4:
            type_name = "Q5_K"
        if self._large and type_name == "Q4_K":
            type_name = "Q5_K"
        return "Q8_0" if self._experts == 8 else type_name

    def _down(self, tensor: str) -> str:
        """Return the type of the next down projection."""
        # With experts, several matrices belong to one layer, so llama-quantize goes by the name.
        layer = _layer(tensor) if self._experts > 1 else self._downs
        self._downs += 1
        special = _is_special(layer, self._layers)
        if self._gguf == "falcon":
            if self._name == "q4_k_m":
                return "Q6_K" if layer < self._layers // 16 else "Q5_K" if special else "Q4_K"
            return "Q6_K" if self._name == "q5_k_m" and special else self._base
        if self._name.endswith("_m"):
            return "Q6_K" if special else self._base
        return "Q5_K" if self._name == "q4_k_s" and layer < self._layers // 8 else self._base


def _is_special(layer: int, count: int) -> bool:
    """Return whether a layer gets more bits: the first and last eighths, and every third between them (`use_more_bits`)."""
    # C's remainder has the sign of the dividend.
    return layer < count // 8 or layer >= 7 * count // 8 or (layer >= count // 8 and (layer - count // 8) % 3 == 2)


def _number(numbers: Mapping[str, MetadataValue], key: str) -> int:
    """Return an integer hyperparameter, or 0."""
    value = numbers[key].value if key in numbers else 0
    return value if isinstance(value, int) else 0
