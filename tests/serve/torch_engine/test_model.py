"""The numbers of many families are those of transformers, in every type of floats; what is promised is tested at the start."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.serve.torch_engine import Request, open_host  # noqa: E402
from adapterhub.training import compute_device  # noqa: E402
from adapterhub.training.layers import nf4_matrix  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.serve.torch_engine.conftest import Peers, assert_same, pieces, tokens, with_adapters, write_adapters, write_base  # noqa: E402

PROMPT = [3 + at * at % 250 for at in range(90)]


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen2"])
def test_windows_caps_sinks_and_experts_are_those_of_the_family(family: str, tmp_path: Path) -> None:
    peers = write_adapters(write_base(tmp_path / "base", family), tmp_path / "adapters", family, 2)
    requests = [Request(PROMPT[:length], blend, 10, logprobs=259) for length in (90, 7) for blend in ((("a1", 1.0),), ())]
    with with_adapters(peers, slots=2, rows=4) as host:
        answers = pieces(host, requests)
    for request, answer in zip(requests, answers, strict=True):
        name = request.blend[0][0] if request.blend else None
        ids = [*request.ids, *(piece.token for piece in answer)]
        expected = peers.logits(name, ids).log_softmax(-1).numpy()[len(request.ids) - 1 : -1]
        logprobs = [[logprob for _, logprob in sorted(piece.top)] for piece in answer]
        np.testing.assert_allclose(logprobs, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("mamba", "MambaForCausalLM cannot use the attention that keeps the requests of a batch apart"),
        ("bloom", "BloomForCausalLM cannot use the attention that keeps the requests of a batch apart"),
        ("lfm2", "Lfm2ForCausalLM does not keep the tokens of several requests apart"),
    ],
)
def test_a_base_whose_layers_mix_requests_is_refused(family: str, says: str, tmp_path: Path) -> None:
    with (
        pytest.raises(RefusedError, match=f"{says}. Serve it with another engine"),
        open_host(write_base(tmp_path, family)),
    ):
        pass


def test_a_request_is_not_longer_than_the_angles_of_positions_stay_the_same_for_all(tmp_path: Path) -> None:
    peers = write_adapters(write_base(tmp_path / "base", "phi3"), tmp_path / "adapters", "phi3", 1)
    with with_adapters(peers, slots=1, rows=2) as host:
        assert host.longest == 128  # and not 512
        assert tokens(host, Request(PROMPT, (("a0", 1.0),), 38)) == peers.answer("a0", PROMPT, 38)


def test_the_log_says_what_holds_here(llama: Peers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adapterhub.serve.torch_engine")
    for dtype in ("float32", "bfloat16"):
        with open_host(llama.base, slots=1, rows=2, dtype=dtype) as host:
            same = "are the same, bit for bit" if host.exact else "may differ by rounding"
        assert f"{llama.base} in {dtype}: answers alone and in a batch {same}" in caplog.text


def test_the_log_says_where_the_base_s_dtype_is_slow(
    llama: Peers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = f"{llama.base}: this processor multiplies bfloat16 4 to 15 times slower than float32: "
    for is_fast in (True, False):
        monkeypatch.setattr(compute_device, "multiplies_bfloat16", lambda is_fast=is_fast: is_fast)
        for dtype in ("float32", "bfloat16"):
            caplog.clear()
            with open_host(llama.base, slots=1, rows=2, dtype=dtype):
                assert (note in caplog.text) == (dtype == "bfloat16" and not is_fast)


def test_where_the_bits_of_a_product_depend_on_the_batch_the_log_says_so_and_answers_are_the_same_up_to_rounding(
    llama: Peers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "adapterhub.serve.torch_engine")
    requests = [Request(PROMPT[:length], ((name, 1.0),), 8, logprobs=3) for length in (5, 70) for name in llama.folders]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", lambda *tensors: False)  # as on a processor of that kind
        with with_adapters(llama, slots=3, rows=4) as host:
            assert not host.exact
            assert_same(host, pieces(host, requests), [list(host.submit(request)) for request in requests])
    assert f"{llama.base} in float32: answers alone and in a batch may differ by rounding" in caplog.text


@pytest.mark.parametrize("is_fast", [False, True], ids=["slow in bfloat16", "fast in bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [False, True])
def test_sixteen_and_four_bits_are_those_of_peft_on_the_same_weights(
    llama: Peers, dtype: str, quantize: bool, is_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute_device, "multiplies_bfloat16", lambda: is_fast)
    request = Request(PROMPT, (("a1", 1.0),), 1, logprobs=259)
    peers = replace(llama, model=with_nf4_numbers(llama.model)) if quantize else llama
    right = peers.logits("a1", PROMPT)[-1].log_softmax(-1).numpy()
    for _ in range(2):  # the second time from the cache of quantized bases
        with with_adapters(llama, slots=2, rows=2, cache=tmp_path, dtype=dtype, quantize=quantize) as host:
            assert host.precision == dtype
            [piece] = host.submit(request)
            assert len(tokens(host, Request(PROMPT, (("a1", 0.5), ("a2", 0.5)), 5))) == 5
        error = np.array([logprob for _, logprob in sorted(piece.top)]) - right
        assert np.sqrt((error**2).mean()) < (2e-4 if dtype == "float32" else 0.05)
    assert quantize == (tmp_path / "bases").is_dir()


def with_nf4_numbers(model: Any) -> Any:
    """A copy of peft's model whose linear layers have the numbers that NF4 represents."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name:
            module.weight.data = nf4_matrix.dense(nf4_matrix.quantize(module.weight.data), torch.float32)
    return copied
