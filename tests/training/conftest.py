"""A tiny real base: a two-layer Llama with random weights and a byte-level tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.byte_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterhub.training.data.example import Example
    from adapterhub.training.data.packed_rows import Rows
    from adapterhub.training.model.base_model import Base
    from adapterhub.training.train_config import BaseConfig, LoRAConfig


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny base; bf16, tied embeddings, grouped heads."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path):  # type: ignore[no-untyped-def]
    """The tiny base's tokenizer, as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_base)


def load_base(path: Path, base: BaseConfig, adapter: LoRAConfig | None, *, location: str = "", **options: Any) -> Base:
    """Load a base without a cache, as the trainer does."""
    from adapterhub.training.model.base_files import BaseFiles
    from adapterhub.training.model.loading import load

    with BaseFiles(path) as files:
        return load(files, base, adapter, location=location, **options)


def packed_rows(examples: Iterable[Example], sequence: int, **options: Any) -> Rows:
    """Pack examples into rows, as the trainer does."""
    from adapterhub.training.data import packed_rows, token_arrays

    return packed_rows.pack(token_arrays.collect(((example, b"") for example in examples), set()), sequence, **options).all()
