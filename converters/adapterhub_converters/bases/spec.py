"""`BaseSpec`: what the headers of a base model contain, in any file format."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_converters.architectures.architecture import Architecture, text_name
from adapterhub_converters.architectures.names import by_class
from adapterhub_converters.errors import RefusedError

from . import canonical_names
from .canonical_names import BaseTensor


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """A base model, from its headers.

    Attributes:
        where: The folder, file or URL it was read from.
        kind: `hf` or `gguf`.
        architecture: Hugging Face's class name, `LlamaForCausalLM`.
        model_type: Hugging Face's `model_type`, `llama`.
        text_type: That of the text model in a vision or audio model; None for others.
        config: The numbers that change the function, under their `config.json` names.
        tensors: Parameter name (`model.layers.0.mlp.up_proj.weight`) to its tensor; empty without weights. The tensors of a
            GGUF have the names and shapes of the checkpoint it was converted from.
        stored: The tensors of a GGUF file under its own names; a file may fuse or split tensors unlike others of its kind.
        packed: Parameters of unknown logical shape, with the reason; they are not in `tensors`.
        derived: Linear modules and tables computed from the config, if there are no weights (`bases.shapes`).
        tied: Whether the output layer is the embedding table.
        quantization: Type of quantized weights: `nf4`, `q4_1`, …; None for floats.
        repo: Its name on the Hugging Face Hub; `revision` is the commit, if it was read from there.
        names: Parameter names from an index, if no shape is known and `tensors` is empty.
        size: Size of its weight files in bytes.
        folder: The local Hugging Face folder whose usual weight files these are, so that values can be read too.
        fetched: Bytes downloaded; None for a local base.
        notes: Things that could not be read, one line each.
    """

    where: str
    kind: str
    architecture: str
    model_type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, BaseTensor] = field(default_factory=dict)
    tied: bool = False
    text_type: str | None = None
    quantization: str | None = None
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    repo: str | None = None
    revision: str | None = None
    names: frozenset[str] = frozenset()
    size: int = 0
    folder: Path | None = None
    fetched: int | None = None
    notes: tuple[str, ...] = ()
    stored: Mapping[str, BaseTensor] = field(default_factory=dict)
    packed: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, BaseTensor] = field(default_factory=dict)

    @cached_property
    def canonical(self) -> Mapping[str, BaseTensor]:
        """The tensors under the names of the checkpoint, which transformers 5 may change as it saves."""
        known = self._known
        return canonical_names.of_hf(known, self.tensors) if known and self.kind == "hf" else self.tensors

    def tensor(self, name: str) -> BaseTensor | None:
        """The weight called `name` in any version of transformers, in any storage; None if there is none."""
        if found := self.tensors.get(name):
            return found
        known = self._known
        return canonical_names.lookup(known, self.canonical, name) if known else None

    def text_tensor(self, name: str) -> BaseTensor | None:
        """The weight called `name`, whatever prefix the file or `name` has for the text model; None if there is none."""
        known = self._known
        if (found := self.tensor(name)) or not known:
            return found
        return canonical_names.lookup(dataclasses.replace(known, text="model"), self._of_text, text_name(name))

    @cached_property
    def _of_text(self) -> Mapping[str, BaseTensor]:
        return canonical_names.of_text(self.canonical, self.model_type)

    def mapped(self) -> Architecture:
        """Its architecture in llama.cpp; RefusedError if that is not known."""
        return by_class(self.architecture, self.where, experts="num_experts_per_tok" in self.config)

    @property
    def _known(self) -> Architecture | None:
        try:
            return self.mapped()
        except RefusedError:
            return None

    @property
    def fingerprint(self) -> str | None:
        """Digest of the checkpoint's names and logical shapes (`canonical`), the same for every storage.

        None without weights or if a shape or, in a GGUF, a name is unknown. A tied output layer counts as absent.
        """
        if not self.tensors or self.packed or (self.kind == "gguf" and self._known and not self._known.whole):
            return None
        lines = (
            f"{name}\t{','.join(map(str, tensor.shape))}\n"
            for name, tensor in sorted(self.canonical.items())
            if not (self.tied and name == "lm_head.weight")
        )
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def text_digest(text: object) -> str | None:
    """Digest of the exact text; None if it is not a string."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Complete `config` with the numbers that transformers derives if they are missing."""
    for old, name in _OLD_NAMES.items():
        if old in config:
            config.setdefault(name, config[old])
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        config.setdefault("num_key_value_heads", heads)
        if isinstance(hidden, int) and config.get("head_dim") is None:
            config["head_dim"] = hidden // heads
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    return config


# GPT-2's and BLOOM's keys to those of all other configs.
_OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
