"""What tests of merges into a base share."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_converters.adapter import Adapter
from adapterhub_converters.bases import read_base
from tests.conftest import need_module
from tests.merging.into_base.gguf_folders import low_rank
from tests.support import tiny


@pytest.fixture(scope="module")
def bf16_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter]:
    """A Llama in bfloat16 and an adapter on it."""
    need_module("torch")
    need_module("transformers")
    import torch

    folder = tmp_path_factory.mktemp("llama") / "hf"
    tiny.model().to(torch.bfloat16).save_pretrained(folder)
    tensors = read_base(folder).tensors
    return folder, Adapter(
        {
            name.removesuffix(".weight"): low_rank(*tensor.shape)
            for name, tensor in tensors.items()
            if "_proj" in name or name == "lm_head.weight"
        }
    )
