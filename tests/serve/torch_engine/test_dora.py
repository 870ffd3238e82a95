"""Adapters with magnitudes are peft's own forward pass and its merged weights, and rows without them never change."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from adapterhub.serve.torch_engine import Request, open_host  # noqa: E402
from adapterhub.serve.torch_engine.host_loop import Host  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.serve.torch_engine.conftest import FAMILIES, Peers, assert_same, pieces, with_adapters, write_adapters, write_base  # noqa: E402
from tests.serve.torch_engine.test_model import with_nf4_numbers  # noqa: E402

PROMPT = [3 + at * at % 250 for at in range(90)]
MAGNITUDE = "lora_magnitude_vector"


def write_dora(base: Path, folder: Path, family: str, count: int) -> Peers:
    """Adapters by peft whose magnitudes are those of the base's rows, changed by some percent."""
    peers = write_adapters(base, folder, family, count, use_dora=True)
    torch.manual_seed(2)
    for layer in peers.model.modules():
        for name, magnitude in getattr(layer, MAGNITUDE, {}).items():
            weight = layer.get_base_layer().weight.data
            norm = (weight.T if layer.fan_in_fan_out else weight).norm(dim=1)
            magnitude.weight.data = norm * (1 + 0.3 * torch.randn_like(norm))
            assert name in peers.folders
    peers.model.save_pretrained(folder)
    return peers


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def dora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """A base, in two of three families with biases, and three adapters."""
    folder = tmp_path_factory.mktemp("dora")
    assert request.param in FAMILIES
    base = write_base(folder / "base", request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(base)
    return write_dora(base, folder / "adapters", request.param, 3)


def logprobs(piece: Any) -> list[float]:
    return [logprob for _, logprob in sorted(piece.top)]


def test_every_row_is_peft_s_forward_pass_and_its_merged_weights(dora: Peers) -> None:
    names = [*dora.folders, None]
    requests = [
        Request(PROMPT[:length], ((name, 1.0),) if name else (), 4, logprobs=259) for name in names for length in (90, 5)
    ]
    with with_adapters(dora, slots=3, rows=8) as host:
        alone = [list(host.submit(request)) for request in requests]
        assert_same(host, pieces(host, requests), alone)
    for request, answer in zip(requests, alone, strict=True):
        name = request.blend[0][0] if request.blend else None
        ids = [*request.ids, *(piece.token for piece in answer)]
        expected = dora.logits(name, ids).log_softmax(-1).numpy()[len(request.ids) - 1 : -1]
        np.testing.assert_allclose([logprobs(piece) for piece in answer], expected, atol=3e-4)
        if name:
            assert np.abs(expected - dora.logits(None, ids).log_softmax(-1).numpy()[len(request.ids) - 1 : -1]).max() > 0.05
            merged = copy.deepcopy(dora.model)
            merged.set_adapter(name)
            with torch.no_grad():
                logits = merged.merge_and_unload()(torch.tensor([ids])).logits[0].log_softmax(-1)
            np.testing.assert_allclose([logprobs(piece) for piece in answer], logits[len(request.ids) - 1 : -1], atol=3e-4)


@pytest.fixture(scope="module")
def plain_and_dora(llama: Peers, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """The adapters of `llama`, and two with magnitudes on the same base."""
    scaled = write_dora(llama.base, tmp_path_factory.mktemp("mixed"), "llama", 2)
    return replace(llama, folders={**llama.folders, "d0": scaled.folders["a0"], "d1": scaled.folders["a1"]})


def answers(name: str | None, length: int) -> Request:
    return Request(PROMPT[:length], ((name, 1.0),) if name else (), 8, logprobs=3)


def test_rows_without_magnitudes_are_bit_by_bit_what_they_are_in_a_host_that_never_saw_any(
    plain_and_dora: Peers, llama: Peers
) -> None:
    plain = [answers(name, length) for length in (5, 70) for name in ("a0", "a1", None, "a3")]
    blended = Request(PROMPT[:9], (("a0", 0.5), ("a1", 0.5)), 8, logprobs=3)
    with with_adapters(llama, slots=6, rows=16, prefixes=0) as host:
        expected = pieces(host, [*plain, blended])
    with with_adapters(plain_and_dora, slots=6, rows=16, prefixes=0) as host:
        scaled = [answers("d0", 6), answers("d1", 12), answers("d0", 70)]
        alone = [list(host.submit(request)) for request in scaled]
        row_pieces = pieces(host, [*scaled, *plain, blended])
    assert_same(host, row_pieces[3:], expected)
    assert_same(host, row_pieces[:3], alone)


def test_a_slot_that_had_magnitudes_has_none_afterwards(plain_and_dora: Peers, llama: Peers) -> None:
    with with_adapters(plain_and_dora, slots=1, rows=2, prefixes=0) as host:
        for name in ("d0", "a0", "d1", "a1", "d0", None):
            [piece, *_] = host.submit(Request(PROMPT[:20], ((name, 1.0),) if name else (), 2, logprobs=259))
            if name is None or name.startswith("a"):
                expected = llama.logits(name, PROMPT[:20])[-1].log_softmax(-1).numpy()
                np.testing.assert_allclose(logprobs(piece), expected, atol=2e-4)


@pytest.mark.parametrize("blend", [(("d0", 0.5), ("a0", 0.5)), (("a0", 1.0), ("d0", 0.0)), (("d0", 0.9),)])
def test_a_blend_with_magnitudes_is_refused_by_name_and_holds_nothing(plain_and_dora: Peers, blend: Any) -> None:
    with with_adapters(plain_and_dora, slots=2, rows=2) as host:
        with pytest.raises(
            RefusedError, match=r"^d0: has magnitudes \(DoRA\), which cannot be blended or weighted. Ask for it"
        ):
            host.submit(Request([5], blend, 1))
        assert all(not adapter.uses for adapter in host._adapters._loaded.values())
        assert list(host.submit(Request([5], (("d0", 1.0),), 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [False, True])
def test_sixteen_and_four_bits_are_those_of_peft_on_the_same_weights(
    plain_and_dora: Peers, dtype: str, quantize: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    stored = torch.float32 if quantize else getattr(torch, dtype)  # what is quantized are the numbers in the file
    model = transformers.AutoModelForCausalLM.from_pretrained(plain_and_dora.base, dtype=stored)
    peers = replace(
        plain_and_dora, model=peft.PeftModel.from_pretrained(model, plain_and_dora.folders["d0"], adapter_name="d0").eval()
    )
    peers.model.to(torch.float32)  # the numbers stay, and sums are exact
    if quantize:
        peers = replace(peers, model=with_nf4_numbers(peers.model))
    right = peers.logits("d0", PROMPT)[-1].log_softmax(-1).numpy()
    with with_adapters(plain_and_dora, slots=2, rows=2, cache=tmp_path, dtype=dtype, quantize=quantize) as host:
        [piece] = host.submit(Request(PROMPT, (("d0", 1.0),), 1, logprobs=259))
    error = np.array(logprobs(piece)) - right
    assert np.sqrt((error**2).mean()) < (2e-4 if dtype == "float32" else 0.05)


def changed_copy(folder: Path, out: Path, change: Any) -> Path:
    shutil.copytree(folder, out)
    file = out / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)
    return out


@pytest.fixture
def host(llama: Peers) -> Any:
    with open_host(llama.base, slots=1, rows=1) as open_engine:
        yield open_engine


def test_magnitudes_that_are_not_those_of_the_layer_are_refused(host: Host, plain_and_dora: Peers, tmp_path: Path) -> None:
    short = changed_copy(
        plain_and_dora.folders["d0"], tmp_path / "a", lambda name, t: t[:7].clone() if MAGNITUDE in name else t
    )
    with pytest.raises(RefusedError) as caught:
        host.load("short", short)
    assert "magnitude" in str(caught.value)
    endless = changed_copy(
        plain_and_dora.folders["d0"], tmp_path / "b", lambda name, t: t * torch.inf if MAGNITUDE in name else t
    )
    with pytest.raises(RefusedError, match="not finite") as caught:
        host.load("endless", endless)
    assert caught.value.code == "non-finite"


def test_an_adapter_that_says_dora_and_has_no_magnitudes_is_refused(host: Host, llama: Peers, tmp_path: Path) -> None:
    shutil.copytree(llama.folders["a0"], tmp_path / "none")
    config = tmp_path / "none/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(RefusedError, match="magnitude"):
        host.load("none", tmp_path / "none")
