"""The value that all readers of a base make."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.architectures.names import by_class
from adapterhub_converters.errors import RefusedError

from . import canonical_names
from .canonical_names import BaseTensor


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """A base model seen from its headers.

    Attributes:
        where: The folder, file or URL it was read from.
        kind: `hf` or `gguf`.
        architecture: Hugging Face's class name, `LlamaForCausalLM`.
        model_type: Hugging Face's `model_type`, `llama`.
        config: The numbers that change the function, under their `config.json` names.
        tensors: Parameter name (`model.layers.0.mlp.up_proj.weight`) to its tensor; empty when there are no weights. Those
            of a GGUF have the names and shapes of the checkpoint it came from.
        stored: What a GGUF file itself has, under its own names; a file may fuse or split what its kind mostly doesn't.
        packed: Parameters whose logical shape is not known, with the reason; none of them is in `tensors`.
        derived: Linear modules and tables as the config says they are, where there are no weights (`base.shapes`).
        tied: Whether the output layer is the embedding table.
        quantization: How the weights are stored when not in floats: `nf4`, `q4_1`, …
        repo: Its name on the Hugging Face Hub; `revision` the commit there, if it was read from there.
        names: Parameter names, where an index says them and `tensors` is empty because no shape is known.
        size: Bytes of its weight files.
        folder: A Hugging Face folder on the disk whose usual weight files are these, so that values can be read too.
        fetched: Bytes that came over the network; None when it was read from the disk.
        notes: What could not be read, one line each.
    """

    where: str
    kind: str
    architecture: str
    model_type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, BaseTensor] = field(default_factory=dict)
    tied: bool = False
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
        """The tensors under the names of the checkpoint, which transformers 5 may save otherwise."""
        known = self._known
        return canonical_names.of_hf(known, self.tensors) if known and self.kind == "hf" else self.tensors

    def tensor(self, name: str) -> BaseTensor | None:
        """The weight of this name in any version of transformers, however the base stores it; None when there is none."""
        if found := self.tensors.get(name):
            return found
        known = self._known
        return canonical_names.lookup(known, self.canonical, name) if known else None

    @property
    def _known(self) -> Architecture | None:
        try:
            return by_class(self.architecture, self.where)
        except RefusedError:
            return None

    @property
    def fingerprint(self) -> str | None:
        """Digest of the checkpoint's names and logical shapes, whatever holds them (`canonical`).

        None without weights or where one's shape is unknown. A tied output layer counts as absent.
        """
        if not self.tensors or self.packed:
            return None
        lines = (
            f"{name}\t{','.join(map(str, tensor.shape))}\n"
            for name, tensor in sorted(self.canonical.items())
            if not (self.tied and name == "lm_head.weight")
        )
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def text_digest(text: object) -> str | None:
    """Of the exact text; None when it is none."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the numbers that transformers derives where a config leaves them out."""
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


# What GPT-2's and BLOOM's configs call the numbers that all others call alike.
_OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
