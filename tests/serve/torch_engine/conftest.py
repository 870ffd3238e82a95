"""Tiny real bases of several families, adapters that peft saved, and what peft answers with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import need_module
from tests.support.byte_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from adapterhub.serve.torch_engine import Piece, Request
    from adapterhub.serve.torch_engine.host_loop import Host

_SHARED: dict[str, Any] = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
_LLAMA: dict[str, Any] = {
    **_SHARED, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "gpt2": ("GPT2Config", {**_SHARED, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "qwen2": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOssConfig", {
        **_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }),
    "phi3": ("Phi3Config", {
        **_LLAMA, "pad_token_id": 0, "original_max_position_embeddings": 128, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
            "original_max_position_embeddings": 128,
        },
    }),
    "lfm2": ("Lfm2Config", {**_LLAMA, "full_attn_idxs": [1]}),
    "mamba": ("MambaConfig", {**_SHARED, "hidden_size": 64, "num_hidden_layers": 2}),
    "bloom": ("BloomConfig", {**_SHARED, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_oss": ["q_proj", "v_proj", "o_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}
LLAMA_TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def write_base(folder: Path, family: str) -> Path:
    """A random base in float32."""
    import torch
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@dataclass
class Peers:
    """A base, and adapters on it in folders and in peft's model.

    Attributes:
        model: peft's, with every adapter.
        folders: Of the adapters, by the name that peft has for them.
    """

    base: Path
    model: Any
    folders: dict[str, Path] = field(default_factory=dict)

    def answer(self, name: str | None, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens, by transformers, with an adapter or without."""
        import torch

        with torch.no_grad():
            tokens = torch.tensor([list(ids)])
            options = {
                "max_new_tokens": count,
                "do_sample": False,
                "pad_token_id": 0,
                "attention_mask": torch.ones_like(tokens),
            }
            if name is None:
                with self.model.disable_adapter():
                    return self.model.generate(input_ids=tokens, **options)[0, len(ids) :].tolist()  # type: ignore[no-any-return]
            self.model.set_adapter(name)
            return self.model.generate(input_ids=tokens, **options)[0, len(ids) :].tolist()  # type: ignore[no-any-return]

    def logits(self, name: str | None, ids: Sequence[int]) -> Any:
        """The logits behind each token."""
        import torch

        with torch.no_grad():
            if name is None:
                with self.model.disable_adapter():
                    return self.model(torch.tensor([list(ids)])).logits[0]
            self.model.set_adapter(name)
            return self.model(torch.tensor([list(ids)])).logits[0]


def write_adapters(base: Path, folder: Path, family: str, count: int, **config: Any) -> Peers:
    """Random adapters of several ranks, saved by peft."""
    need_module("peft")
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    adapted: Any = None
    for at in range(count):
        options = {"r": (2, 8, 16, 24)[at % 4], "lora_alpha": 16, "target_modules": TARGETS.get(family, LLAMA_TARGETS)}
        settings = peft.LoraConfig(**{**options, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2", **config})
        if adapted is None:
            adapted = peft.get_peft_model(
                transformers.AutoModelForCausalLM.from_pretrained(base), settings, adapter_name=f"a{at}"
            )
        else:
            adapted.add_adapter(f"a{at}", settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return Peers(base, adapted.eval(), {f"a{at}": folder / f"a{at}" for at in range(count)})


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """A tiny Llama with eight adapters."""
    return _peers(tmp_path_factory, "llama")


@pytest.fixture(scope="package", params=["llama", "gpt2"])
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """Two families, each with eight adapters."""
    return request.getfixturevalue("llama") if request.param == "llama" else _peers(tmp_path_factory, request.param)


def _peers(paths: pytest.TempPathFactory, family: str) -> Peers:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = paths.mktemp(family)
    return write_adapters(write_base(folder / "base", family), folder / "adapters", family, 8)


@contextmanager
def with_adapters(peers: Peers, **options: Any) -> Iterator[Host]:
    """A host that has loaded all adapters."""
    from adapterhub.serve.torch_engine import open_host

    with open_host(peers.base, **options) as host:
        for name, folder in peers.folders.items():
            host.load(name, folder)
        yield host


def assert_same(host: Host, answers: Sequence[list[Piece]], expected: Sequence[list[Piece]]) -> None:
    """Assert that answers are the same: bit for bit on a machine of which the host says so, else up to rounding.

    Where the bits of a product depend on the size of the batch, the tokens are still the same, with logarithms of
    probabilities that differ in their last digits.
    """
    if host.exact:
        assert answers == expected
        return
    for answer, right in zip(answers, expected, strict=True):
        assert [piece.token for piece in answer] == [piece.token for piece in right]
        for piece, right_piece in zip(answer, right, strict=True):
            assert piece.logprob == pytest.approx(right_piece.logprob, abs=2e-4)
            assert dict(piece.top or ()) == pytest.approx(dict(right_piece.top or ()), abs=2e-4)


def tokens(host: Host, request: Request) -> list[int]:
    """The tokens of an answer that is alone in the host."""
    return [piece.token for piece in host.submit(request)]


def pieces(host: Host, requests: Sequence[Request]) -> list[list[Piece]]:
    """The answers to requests that are in the host at the same time."""
    return [list(stream) for stream in [host.submit(request) for request in requests]]
