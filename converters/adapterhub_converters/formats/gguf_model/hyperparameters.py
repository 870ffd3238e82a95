"""The numbers of an architecture in GGUF's keys (llama.cpp, `conversion/*.py`, `set_gguf_parameters`).

Where its conversion passes over what would change the function (an activation, a rotary embedding it has no tensors for), the
model is refused.
"""

from __future__ import annotations

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.containers.gguf_file import u32
from adapterhub_converters.errors import RefusedError

from .configured import Config
from .special import MORE, OWN
from .usual import Numbers, usual

_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_ACTIVATIONS = {
    "gemma": _GELU, "gemma2": _GELU, "gemma3": _GELU, "starcoder2": _GELU, "gpt2": _GELU, "falcon": _GELU, "bloom": _GELU,
    "nemotron": ("relu2",), "arcee": ("relu2",),
}  # fmt: skip
"""What llama.cpp computes (`src/models/*.cpp`); all others silu. Its gelu is the tanh approximation."""
_SCALED = {
    **dict.fromkeys(("llama", "granite", "smollm3", "arcee"), ("default", "linear", "yarn", "llama3")),
    "phi3": ("default", "longrope", "su"),
    **dict.fromkeys(("command-r", "cohere2"), ("default",)),
}
"""Types of rotary embeddings whose scaling llama.cpp's conversion writes, as numbers or as tensors."""


def hyperparameters(architecture: Architecture, config: Config) -> Numbers:
    """Key under the architecture's prefix to value."""
    _check(architecture, config)
    special = OWN.get(architecture.gguf)
    made = special(config) if special else usual(config) | MORE.get(architecture.gguf, _nothing)(config)
    if architecture.gguf == "granite":  # which has no head_dim of its own
        made = {key: value for key, value in made.items() if key not in ("attention.key_length", "attention.value_length")}
    return {"block_count": u32(config.count("num_hidden_layers"))} | made


def _check(architecture: Architecture, config: Config) -> None:
    known = _ACTIVATIONS.get(architecture.gguf, ("silu", "swish"))
    # An old Gemma says "gelu" in hidden_act and means the other key, which is null.
    key = next((key for key in ("hidden_activation", "hidden_act", "activation_function", "activation") if config.get(key)), "")
    if key and config.get(key) not in known:
        what = f"config.json: {key} is {config.get(key)}, and llama.cpp's {architecture.gguf} computes {known[-1]}"
        raise RefusedError(config.where, what)
    kind = config.rope["rope_type"]
    if kind not in _SCALED.get(architecture.gguf, ("default",) if architecture.gguf in OWN else ("default", "linear", "yarn")):
        what = (
            f"a rotary embedding of the type {str(kind)[:40]!r}, which llama.cpp's conversion of {architecture.gguf} leaves out"
        )
        raise RefusedError(config.where, what)
    if config.sliding_rope.get("rope_type", "default") != "default":
        raise RefusedError(
            config.where, "the rotary embedding of the layers with a window is scaled, which llama.cpp has no key for"
        )


def _nothing(_: Config) -> Numbers:
    return {}
