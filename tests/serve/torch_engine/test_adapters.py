"""What slots can represent is loaded, and everything else is refused by name with the code of a check."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from adapterhub.checks.report import CODES  # noqa: E402
from adapterhub.serve.torch_engine import Request, open_host  # noqa: E402
from adapterhub.serve.torch_engine.host_loop import Host  # noqa: E402
from adapterhub.serve.torch_engine.loaded_adapters import CHANGED  # noqa: E402
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError  # noqa: E402
from tests.serve.torch_engine.conftest import Peers, tokens, write_adapters  # noqa: E402


@pytest.fixture(scope="module")
def host(llama: Peers) -> Iterator[Host]:
    with open_host(llama.base, slots=4, rows=4, rank=64) as open_engine:
        yield open_engine


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "all linear": {"target_modules": "all-linear"},
    "rank one": {"r": 1, "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plain_lora_answers_as_in_peft(host: Host, llama: Peers, tmp_path: Path, kind: str) -> None:
    peers = write_adapters(llama.base, tmp_path, "llama", 1, **KINDS[kind])
    host.load(kind, peers.folders["a0"])
    assert tokens(host, Request([5, 80, 90], ((kind, 1.0),), 12)) == peers.answer("a0", [5, 80, 90], 12)


def test_a_slot_keeps_nothing_of_the_adapter_before(llama: Peers, tmp_path: Path) -> None:
    with open_host(llama.base, slots=1, rows=1) as host:
        for kind in ("all linear", "one layer", "rank one"):
            peers = write_adapters(llama.base, tmp_path / kind, "llama", 1, **KINDS[kind])
            host.load(kind, peers.folders["a0"])
            assert tokens(host, Request([5, 80, 90], ((kind, 1.0),), 6)) == peers.answer("a0", [5, 80, 90], 6)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "biases": ({"lora_bias": True}, "biases of its deltas", "runtime"),
    "rows": ({"trainable_token_indices": [3, 4]}, "replaces rows of a table: model.embed_tokens", "runtime"),
    "whole modules": ({"modules_to_save": ["norm"]}, "replaces whole parameters: model.", "runtime"),
    "a table": ({"target_modules": ["embed_tokens"]}, "model.embed_tokens: is not a delta of one linear layer", "runtime"),
    "rank": ({"r": 65}, "has rank 65, and slots have room for 64", "rank-above-max"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_slots_cannot_represent_is_refused_by_name(host: Host, llama: Peers, tmp_path: Path, name: str) -> None:
    config, message, code = REFUSED[name]
    peers = write_adapters(llama.base, tmp_path, "llama", 1, **config)
    assert_refused(host, peers.folders["a0"], message, code)


def assert_refused(host: Host, folder: Path, message: str, code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        host.load("refused", folder)
    assert message in str(caught.value)
    assert caught.value.code == code
    assert code in CODES or code == "other-base-shapes"
    with pytest.raises(NotFoundError):
        host.submit(Request([5], (("refused", 1.0),), 1))


CHANGES: dict[str, tuple[Any, str, str]] = {
    "another module": (
        lambda numbers: {name.replace("layers.1.", "layers.7."): tensor for name, tensor in numbers.items()},
        "model.layers.7.", "no-such-module",
    ),
    "another width": (
        lambda numbers: {n: t[..., :40].contiguous() if "q_proj.lora_A" in n else t for n, t in numbers.items()},
        "q_proj: is a delta of shape (64, 40), but the base's layer has (64, 64)", "shape-mismatch",
    ),
    "the output layer": (
        lambda numbers: {
            "base_model.model.lm_head.lora_A.weight": torch.ones(2, 64),
            "base_model.model.lm_head.lora_B.weight": torch.ones(259, 2),
        },
        "lm_head: is not a linear layer that can be shared", "runtime",
    ),
    "infinity": (
        lambda numbers: {name: tensor * torch.inf if "lora_B" in name else tensor for name, tensor in numbers.items()},
        "a number that is not finite", "non-finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_of_another_base_is_refused(host: Host, llama: Peers, tmp_path: Path, name: str) -> None:
    change, message, code = CHANGES[name]
    shutil.copytree(llama.folders["a0"], tmp_path / "changed")
    file = tmp_path / "changed/adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    if name == "the output layer":
        config = tmp_path / "changed/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["lm_head"]}))
    assert_refused(host, tmp_path / "changed", message, code)


def test_a_folder_that_is_broken_or_gone_is_one_line(host: Host, llama: Peers, tmp_path: Path) -> None:
    shutil.copytree(llama.folders["a0"], tmp_path / "cut")
    file = tmp_path / "cut/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for folder in (tmp_path / "cut", tmp_path / "gone"):
        with pytest.raises(AdapterhubError) as caught:
            host.load("broken", folder)
        assert "\n" not in str(caught.value)
    assert tokens(host, Request([5], (), 3)) == llama.answer(None, [5], 3)


def test_files_are_read_and_not_mapped_so_that_a_shorter_one_ends_no_server(
    host: Host, llama: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("mapped")

    monkeypatch.setattr("mmap.mmap", refuse)
    host.load("unmapped", llama.folders["a3"])
    assert tokens(host, Request([5, 6], (("unmapped", 1.0),), 5)) == llama.answer("a3", [5, 6], 5)


@pytest.mark.parametrize(
    ("change", "message"), [("other weights", "was changed after"), ("shorter", "truncated"), ("gone", "no adapter_model")]
)
def test_a_version_whose_files_changed_is_an_error_and_no_other_answer(
    llama: Peers, tmp_path: Path, change: str, message: str
) -> None:
    folder = shutil.copytree(llama.folders["a0"], tmp_path / "a0")
    request, file = Request([5, 6], (("a0", 1.0),), 5), folder / "adapter_model.safetensors"
    with open_host(llama.base, slots=1, rows=1, adapters=0) as host:
        host.load("a0", folder)
        assert tokens(host, request) == llama.answer("a0", [5, 6], 5)
        host.load("a1", llama.folders["a1"])  # displaces a0 from memory
        if change == "other weights":
            file.write_bytes((llama.folders["a2"] / file.name).read_bytes())
        elif change == "shorter":
            os.truncate(file, 1000)
        else:
            file.unlink()
        with pytest.raises(AdapterhubError, match=message) as caught:
            host.submit(request)
        assert caught.value.code == CHANGED or change != "other weights"
        assert tokens(host, Request([5, 6], (("a1", 1.0),), 5)) == llama.answer("a1", [5, 6], 5)


def test_numbers_that_overflow_end_one_answer_and_no_other(host: Host, llama: Peers, tmp_path: Path) -> None:
    shutil.copytree(llama.folders["a1"], tmp_path / "huge")
    file = tmp_path / "huge/adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    host.load("huge", tmp_path / "huge")
    host.load("a2", llama.folders["a2"])
    good = [host.submit(Request([5, 6], (("a2", 1.0),), 20)) for _ in range(2)]
    bad = host.submit(Request([5, 6], (("huge", 1.0),), 20))
    with pytest.raises(RefusedError, match="NaN or Inf"):
        list(bad)
    for stream in good:
        assert [piece.token for piece in stream] == llama.answer("a2", [5, 6], 20)
    assert tokens(host, Request([5, 6], (("a2", 0.5), ("a2", 0.5)), 5)) == llama.answer("a2", [5, 6], 5)
    assert host.state().pinned == 0
