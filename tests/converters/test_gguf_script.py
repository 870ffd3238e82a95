"""Adapters of every architecture, by llama.cpp's own `convert_lora_to_gguf.py` and by ours: the same tensors, byte for byte.

The script has one scale for all modules, so the adapters here have one as well. It knows no stacks of experts as peft saves
them; experts that a model has one by one, it has too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.formats import gguf as gguf_lora
from adapterhub_converters.formats import peft
from tests.conftest import ROOT
from tests.converters import test_rule_named_models
from tests.converters.test_architecture_lookup import CLASSES, deltas
from tests.converters.test_rule_named_models import saved
from tests.support.llama_cpp_scripts import LoraConverter

pytestmark = pytest.mark.peer
ROWS = [("", name) for name in CLASSES] + test_rule_named_models.CLASSES
_PREDICTING = ("qwen35", "qwen35moe", "qwen3next")  # the script wants layers for the prediction of several tokens
_PERMUTED = "NotImplementedError"  # it cannot put the rows of a pair in another order than by heads
_TOKENIZER = "ValueError"  # it writes the vocabulary of the model as well, and asks for it
_HALVES = "AssertionError"  # it cannot put together what it took apart along the second axis
RAISES = {
    **{(kind, name): _TOKENIZER for kind, name in ROWS if kind == "mistral3"},
    ("qwen3next", "Qwen3NextForCausalLM"): _PERMUTED,
    ("glm4", "Glm4vForConditionalGeneration"): _HALVES,
    ("glm4", "GlmOcrForConditionalGeneration"): _HALVES,
}
_NOT_PERMUTED = "it leaves the rows of q and k as they are, which the conversion of the model permutes"
WRONG = {
    ("", "GPT2LMHeadModel"): "it transposes lora_A and lora_B in place of their product",
    ("nemotron_h", "NemotronHForCausalLM"): "it takes the model for one with experts",
    **{(kind, name): _NOT_PERMUTED for kind, name in ROWS if name == test_rule_named_models.GRANITE4},
}


def content(path: Path) -> dict[str, bytes]:
    """Return the tensors of a GGUF file by name and shape, and the metadata that llama.cpp goes by."""
    with GGUFFile(path) as file:
        tensors = {name: np.ascontiguousarray(file.tensor(name)) for name in file.tensors}
        keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
        metadata = {key: str(file.header.metadata[key]).encode() for key in keys}
    return metadata | {f"{name} {array.dtype} {array.shape}": array.tobytes() for name, array in tensors.items()}


def test_every_row_of_the_table_is_compared() -> None:
    assert {name for _, name in ROWS} == {name for row in architecture_lookup.ADAPTERS for name in (*row.classes, *row.wrapped)}


def test_the_page_has_the_share_of_the_kinds_of_models_compared_here() -> None:
    same = len(ROWS) - len(RAISES) - len(WRONG)
    page = " ".join((ROOT / "docs/formats.md").read_text().split())
    counts = f"{same}, raises an error for {len(RAISES)} and is wrong for {len(WRONG)}"
    subject = f"Of the {len(ROWS)} kinds of models in the table below, llama.cpp's `convert_lora_to_gguf.py`"
    assert f"{subject} writes the same bytes for {counts}" in page


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_our_file_has_the_bytes_of_llama_cpp_s_own(tmp_path: Path, lora_converted: LoraConverter, kind: str, name: str) -> None:
    folder = saved(name, kind, tmp_path / "hf")
    if kind in _PREDICTING:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mtp_num_hidden_layers": 1}))
    base = read_base(folder)
    architecture = base.llama_cpp_architecture()
    tensors = {
        file if architecture.stem(file.removesuffix(".weight")) else base.renaming(file): tensor
        for file, tensor in base.tensors.items()
    }
    adapter = Adapter(
        {
            target: dataclasses.replace(delta, lora_A=delta.lora_A[:2], lora_B=delta.lora_B[:, :2], alpha=4.0)
            for target, delta in deltas(dataclasses.replace(base, tensors=tensors), architecture)
            if isinstance(delta, LowRank | LowRankEmbedding)
        }
    )
    assert len(adapter.deltas) >= 6
    gguf_lora.write(adapter, tmp_path / "ours.gguf", base=base)
    (tmp_path / "a").mkdir()
    peft.write(adapter, tmp_path / "a")
    error = lora_converted(tmp_path / "a", folder, tmp_path / "theirs.gguf")
    assert error.partition(":")[0] == RAISES.get((kind, name), ""), error
    if not error:
        is_same = content(tmp_path / "ours.gguf") == content(tmp_path / "theirs.gguf")
        assert is_same == ((kind, name) not in WRONG)
