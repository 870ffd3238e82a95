"""`BaseSpec`: the content of a base model's headers, in any file format."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_converters.architectures.architecture import Architecture, text_name
from adapterhub_converters.architectures.architecture_lookup import by_class
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import canonical_names, names_in_memory
from .canonical_names import BaseTensor
from .names_in_memory import Renaming


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """A base model, from its headers.

    Attributes:
        source: The folder, file or URL it was read from.
        kind: `hf` or `gguf`.
        architecture: Hugging Face's class name, `LlamaForCausalLM`.
        model_type: Hugging Face's `model_type`, `llama`.
        text_type: The `model_type` of the text model in a vision or audio model; None for others.
        config: The numbers that change the function, under their `config.json` names.
        tensors: Parameter name (`model.layers.0.mlp.up_proj.weight`) to its tensor; empty without weights. The tensors of a
            GGUF have the names and shapes of the checkpoint it was converted from.
        stored: The tensors of a GGUF file under its own names; a file may fuse or split tensors unlike others of its kind.
        packed: Parameters of unknown logical shape, with the reason; they are not in `tensors`.
        derived: Linear modules and tables computed from the config, if there are no weights (`bases.config_shapes`).
        tied: Whether the output layer is the embedding table.
        quantization: Type of quantized weights: `nf4`, `q4_1`, …; None for floats.
        repo: Its name on the Hugging Face Hub; `revision` is the commit, if it was read from there.
        names: Parameter names from an index, if no shape is known and `tensors` is empty.
        size: Size of its weight files in bytes.
        folder: The local Hugging Face folder whose usual weight files these are, so that values can be read too.
        fetched: Bytes downloaded; None for a local base.
        notes: What could not be read, one line each.
    """

    source: str
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
        """The tensors under the names of the checkpoint, which transformers 5 may change when it saves."""
        architecture = self._architecture_or_none
        return canonical_names.rename_hf(architecture, self.tensors) if architecture and self.kind == "hf" else self.tensors

    def tensor(self, name: str) -> BaseTensor | None:
        """Return the weight called `name` in any version of transformers, in any storage; None if there is none."""
        if tensor := self.tensors.get(name):
            return tensor
        architecture = self._architecture_or_none
        return canonical_names.lookup(architecture, self.canonical, name) if architecture else None

    def text_tensor(self, name: str) -> BaseTensor | None:
        """Return the weight called `name`, whatever prefix the file or `name` has for the text model; None if there is none."""
        architecture = self._architecture_or_none
        if (tensor := self.tensor(name)) or not architecture:
            return tensor
        return canonical_names.lookup(dataclasses.replace(architecture, text="model"), self._text_tensors, text_name(name))

    @cached_property
    def _text_tensors(self) -> Mapping[str, BaseTensor]:
        return canonical_names.rename_for_text_model(self.canonical, self.renaming)

    @property
    def renaming(self) -> Renaming:
        """The renaming of its tensors, and modules, to their names in memory."""
        return names_in_memory.renaming(self.model_type, self.architecture)

    @cached_property
    def names_in_memory(self) -> frozenset[str]:
        """The modules and parameters under their names in memory."""
        renamed = self.renaming.names((*self.tensors, *self.packed, *self.names)).values()
        return frozenset((*renamed, *(name.rpartition(".")[0] for name in renamed)))

    def llama_cpp_architecture(self) -> Architecture:
        """Return its architecture in llama.cpp; RefusedError if that is not known."""
        names = self.tensors or self.names
        return by_class(self.architecture, self.source, experts="num_experts_per_tok" in self.config, names=names)

    @property
    def _architecture_or_none(self) -> Architecture | None:
        try:
            return self.llama_cpp_architecture()
        except RefusedError:
            return None

    @property
    def fingerprint(self) -> str | None:
        """Digest of the checkpoint's own names and logical shapes: the rule `shapes-1` of `schemas/SPECIFICATION.md`.

        It is the same for 16-bit and NF4 weights, and for a GGUF whose tensors all have names in the checkpoint. None without
        weights or if a shape or, in a GGUF, a name is unknown. A tied output layer counts as absent.
        """
        return self._fingerprint(self.tensors)

    def has_fingerprint(self, fingerprint: str | None) -> bool:
        """Return whether a recorded fingerprint is of this base, also if the checkpoint was saved again under other names.

        Before the rule had a name, the fingerprint was of the canonical names, which depend on a table of architectures.
        """
        if self.fingerprint == fingerprint:
            return True
        return fingerprint is not None and self._fingerprint(self.canonical) == fingerprint

    def _fingerprint(self, tensors: Mapping[str, BaseTensor]) -> str | None:
        if (
            not self.tensors
            or self.packed
            or (self.kind == "gguf" and self._architecture_or_none and not self._architecture_or_none.whole)
        ):
            return None
        # The output layer is left out if tied, since some files store it anyway.
        lines = (
            f"{name}\t{','.join(map(str, tensor.shape))}\n"
            for name, tensor in sorted(tensors.items())
            if not (self.tied and name == "lm_head.weight")
        )
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def text_digest(text: object) -> str | None:
    """Return the digest of the exact text; None if it is not a string."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config`, completed with the numbers that transformers derives if they are missing."""
    for old_name, name in _OLD_CONFIG_KEYS.items():
        if old_name in config:
            config.setdefault(name, config[old_name])
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        config.setdefault("num_key_value_heads", heads)
        # Some configs have the key with null.
        if isinstance(hidden, int) and config.get("head_dim") is None:
            config["head_dim"] = hidden // heads
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    return config


# GPT-2's and BLOOM's keys to those of all other configs.
_OLD_CONFIG_KEYS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
