"""What a verdict says, the real peft, transformers, llama.cpp and mlx-lm do: many adapters, each on a base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import convert, peft
from tests.conftest import need_module
from tests.support import llama_cpp, tiny

pytestmark = pytest.mark.peer

TOKENS = [3, 17, 99, 5, 64, 23, 101, 7]


@dataclass(frozen=True)
class Case:
    """A config of peft's, the model it was trained on, and what is different in the one it is used with.

    `edited` are keys of the saved config that were changed since.
    """

    config: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)
    kind: str = "LlamaForCausalLM"
    edited: dict[str, Any] = field(default_factory=dict)


TIED = {"tie_word_embeddings": True}
CASES = {
    "plain": Case(),
    "rslora": Case({"use_rslora": True, "lora_alpha": 4}),
    "rank_pattern": Case({"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}}),
    "alpha_pattern": Case({"alpha_pattern": {"k_proj": 11, "v_proj": 3}}),
    "dora": Case({"use_dora": True}),
    "lora_bias": Case({"lora_bias": True}),
    "whole norm": Case({"modules_to_save": ["norm"]}),
    "whole lm_head": Case({"modules_to_save": ["lm_head"]}),
    "modules without tensors": Case({"target_modules": ["q_proj"]}, edited={"target_modules": ["q_proj", "k_proj"]}),
    "unknown key": Case({"target_modules": ["q_proj"]}, edited={"_comment": "hi"}),
    "tied token rows": Case({"target_modules": ["q_proj"], "trainable_token_indices": [3, 17]}, TIED, TIED),
    "token rows": Case({"trainable_token_indices": [3, 17]}),
    "embeddings": Case({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embeddings": Case({"target_modules": ["q_proj", "embed_tokens"]}, TIED, TIED),
    "tied head": Case({"target_modules": ["q_proj", "lm_head"]}, TIED, TIED),
    "pissa": Case({"init_lora_weights": "pissa"}),
    "olora": Case({"init_lora_weights": "olora"}),
    "alora": Case({"alora_invocation_tokens": [5, 64]}),
    "layer_replication": Case({"layer_replication": [[0, 1], [0, 2]]}),
    "deeper": Case({"target_modules": ["q_proj"]}, used={"num_hidden_layers": 3}),
    "shallower": Case({"target_modules": ["q_proj"]}, used={"num_hidden_layers": 1}),
    "wider": Case({"target_modules": ["q_proj"]}, used={"hidden_size": 128}),
    "other vocabulary": Case({"target_modules": ["embed_tokens", "lm_head"]}, used={"vocab_size": 160}),
    "larger head": Case({"modules_to_save": ["lm_head"]}, used={"vocab_size": 160}),
    "gemma": Case({}, kind="Gemma2ForCausalLM"),
    "experts": Case({"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
                    kind="MixtralForCausalLM"),
}  # fmt: skip


@dataclass
class Made:
    """An adapter, the base it is used with, and what the model computed that it was saved from."""

    adapter: Path
    base: Path
    model: Any
    expected: np.ndarray


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    for name in ("torch", "transformers", "peft", "mlx_lm", "llama_cpp_py_sync"):
        need_module(name)
    root, cases = tmp_path_factory.mktemp("cases"), {}

    def make(name: str) -> Made:
        if name not in cases:
            cases[name] = _make(root / name.replace(" ", "-"), CASES[name])
        return cases[name]

    return make


def _make(folder: Path, case: Case) -> Made:
    model = tiny.model(case.kind, **case.used)
    model.save_pretrained(folder / "base")
    wrapped = _trained(tiny.model(case.kind, **case.trained), folder / "a", case)
    saved = folder / "a" / peft.CONFIG
    saved.write_text(json.dumps(json.loads(saved.read_text()) | case.edited))
    return Made(folder / "a", folder / "base", model, _logits(wrapped))


def _trained(model: Any, folder: Path, case: Case) -> Any:
    """What tiny.adapter makes, but whole tensors and rows are changed too."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **case.config}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("lora_" in name or "modules_to_save" in name or "trainable_tokens" in name):
                parameter.add_(torch.randn(parameter.shape) * (0.01 if "magnitude" in name else 0.1))
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return wrapped


def _logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy())


def in_peft(case: Made, spec: BaseSpec, room: Path) -> np.ndarray:
    from peft import PeftModel

    return _logits(PeftModel.from_pretrained(_fresh(case), case.adapter).eval())


def in_transformers(case: Made, spec: BaseSpec, room: Path) -> np.ndarray:
    model = _fresh(case)
    model.load_adapter(str(case.adapter))
    return _logits(model.eval())


def _fresh(case: Made) -> Any:
    return type(case.model).from_pretrained(case.base, dtype="float32").eval()


def in_llama_cpp(case: Made, spec: BaseSpec, room: Path) -> np.ndarray:
    convert.convert(case.adapter, room / "a.gguf", to="gguf", base=spec)
    logits_of = llama_cpp.gated_logits if convert.read(case.adapter).meta.invocation else llama_cpp.logits
    return logits_of(tiny.write_gguf(case.model, room / "base.gguf"), TOKENS, room / "a.gguf")


def in_mlx(case: Made, spec: BaseSpec, room: Path) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    convert.convert(case.adapter, room / "mlx", to="mlx", base=spec)
    model, _ = load_model(case.base)
    return np.array(load_adapters(model, str(room / "mlx"))(mx.array([TOKENS]))[0])


RUNTIMES: dict[str, Callable[[Made, BaseSpec, Path], np.ndarray]] = {
    "peft": in_peft,
    "transformers": in_transformers,
    "llama.cpp": in_llama_cpp,
    "mlx": in_mlx,
}


def happened(case: Made, runtime: str, spec: BaseSpec, room: Path) -> str:
    try:
        logits = RUNTIMES[runtime](case, spec, room)
    except (AdapterhubError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"refused ({type(error).__name__}: {str(error)[:200]})"
    if logits.shape != case.expected.shape:
        return "not applied (other outputs)"
    off = float(np.abs(logits - case.expected).max() / np.abs(case.expected).max())
    return "applied" if off < 2e-3 else f"not applied ({off:.3f} off)"


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        (name, runtime)
        for name, case in CASES.items()
        for runtime in RUNTIMES
        # Of Mixtral only llama.cpp's own scripts make a GGUF, in test_architecture_lookup.py.
        if (runtime, case.kind) != ("llama.cpp", "MixtralForCausalLM")
    ],
)
def test_a_runtime_behaves_as_its_verdict_predicts(
    make_case: Callable[[str], Made], tmp_path: Path, name: str, runtime: str
) -> None:
    case = make_case(name)
    spec = read_base(case.base)
    verdict = checks.check(case.adapter, base=spec).verdicts[runtime]
    outcome = happened(case, runtime, spec, tmp_path)
    # A conversion refuses in advance what would end the process.
    expected_outcome = {"ignored": "not applied", "wrong": "not applied", "crashes": "refused"}.get(
        verdict.verdict, verdict.verdict
    )
    assert outcome.startswith(expected_outcome), (outcome, verdict)


def test_the_crash_that_a_conversion_prevents(make_case: Callable[[str], Made], tmp_path: Path) -> None:
    case = make_case("tied embeddings")
    assert checks.check(case.adapter, base=read_base(case.base)).verdicts["llama.cpp"].verdict == "crashes"
    untied = tmp_path / "untied"
    tiny.model().save_pretrained(untied)
    convert.convert(case.adapter, tmp_path / "a.gguf", to="gguf", base=read_base(untied))
    tiny.write_gguf(case.model, tmp_path / "base.gguf")
    code = (
        "import sys; from pathlib import Path; from tests.support import llama_cpp; "
        f"llama_cpp.logits(Path(sys.argv[1]), {TOKENS}, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "base.gguf"), str(tmp_path / "a.gguf")]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert "llama.cpp ends by SIGABRT" in result.stderr  # a child, which loads it first
    assert "GGML_ASSERT" in result.stderr
