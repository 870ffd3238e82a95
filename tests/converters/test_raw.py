"""A lone state dict: its alpha is said by somebody or it is refused, and its keys are turned into peft's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError, NotFoundError, ParameterError, RefusedError
from adapterhub_converters.formats import convert, peft, raw
from tests.conftest import Run

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
A, B = np.arange(16, dtype=np.float32).reshape(2, 8), np.arange(12, dtype=np.float16).reshape(6, 2)


def save(path: Path, form: str = "base_model.model.{}.lora_{}.weight", metadata: dict[str, str] | None = None) -> Path:
    tensors = {form.format(target, half): array for target in (Q, K) for half, array in (("A", A), ("B", B))}
    safetensors_file.write(path, tensors, metadata)
    return path


@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "{}.lora_{}.my-name.weight",
        "{}.lora_{}.weight",
    ],
)
def test_with_a_given_alpha_it_is_a_peft_adapter(tmp_path: Path, form: str) -> None:
    path = save(tmp_path / "x.safetensors", form)
    assert convert.sniff(path) == "raw"
    with pytest.raises(RefusedError, match=r"its alpha is not recorded") as caught:
        convert.read(path)
    assert caught.value.code == "alpha-or-rslora-required"
    convert.convert(path, tmp_path / "peft", to="peft", alpha=3, rslora=True)
    adapter = peft.read(tmp_path / "peft")
    assert set(adapter.deltas) == {Q, K}
    for delta in adapter.deltas.values():
        assert (delta.alpha, delta.rslora, delta.r) == (3, True, 2)
        assert (delta.lora_A.tobytes(), delta.lora_B.tobytes()) == (A.tobytes(), B.tobytes())


def test_the_report_names_the_source_of_the_alpha(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", "{}.lora_{}.default.weight")
    notes = convert.convert(path, tmp_path / "peft", to="peft", alpha=3).notes
    assert "alpha 3 for all modules, as given" in notes
    assert "'default' was the adapter's name in its keys" in notes
    assert "base_model.model. was added to keys without it" in notes


def test_there_and_back_is_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    peft.write(Adapter({Q: LowRank(A, B, 5.0, True), K: LowRank(A, B, 3.0, True)}), source)
    convert.convert(source, tmp_path / "x.safetensors", to="raw")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "again", to="peft")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    for scale_options in ({"alpha": 3.0}, {"rslora": True}):
        says = r"its config records the alpha, and whether it is rsLoRA\. Leave out alpha and rslora"
        with pytest.raises(RefusedError, match=says) as caught:
            convert.convert(tmp_path / "x.safetensors", tmp_path / "more", to="peft", **scale_options)
        assert caught.value.code == "alpha-recorded"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "source", "x.safetensors"]


def test_the_weights_file_of_a_peft_folder_uses_the_config_next_to_it(tmp_path: Path) -> None:
    save(tmp_path / peft.WEIGHTS)
    (tmp_path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 7}))
    assert convert.read(tmp_path / peft.WEIGHTS).deltas[Q].alpha == 7


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "says"),
    [
        ({f"{Q}.lora_A.one.weight": A, f"{Q}.lora_B.two.weight": B}, {}, RefusedError, "it contains 2 adapters: one, two"),
        ({f"{Q}.lora_A.one.weight": A, f"{Q}.lora_A.weight": A}, {}, FormatError, "exists under two names"),
        ({f"{Q}.lora_A.weight": A}, {}, FormatError, "its counterpart exists"),
        ({f"{Q}.lora_A.weight": A}, {raw.CONFIG_KEY: "x"}, FormatError, "not valid JSON"),
        ({f"{Q}.lora_A.weight": A}, {raw.CONFIG_KEY: '{"peft_type": "X"}'}, RefusedError, "peft_type 'X'"),
        ({f"{Q}.lora_A.weight": A}, {raw.CONFIG_KEY: "{}", raw.METADATA_KEY: '{"a":1}'}, FormatError, ""),
    ],
)
def test_malformed_ones_are_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], error: type[AdapterhubError], says: str
) -> None:
    safetensors_file.write(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(AdapterhubError) as caught:
        raw.read(tmp_path / "x.safetensors", alpha=None if metadata else 1.0)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    if says:
        assert isinstance(caught.value, error)


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\xff" * 40, (10).to_bytes(8, "little") + b'{"a": 1}'])
def test_a_malformed_file_is_refused_with_the_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        convert.read(tmp_path / "x.safetensors")


def test_a_file_of_other_tensors_is_no_adapter(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "x.safetensors", {"weight": A})
    with pytest.raises(FormatError, match="not an adapter of a known format"):
        convert.sniff(tmp_path / "x.safetensors")


def test_a_config_without_the_kind_of_adapter_is_told_how_to_get_it(run: Run, tmp_path: Path) -> None:
    save(tmp_path / peft.WEIGHTS)
    (tmp_path / peft.CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    says = r"its adapter_config\.json has no peft_type\. Add the peft_type to its config"
    with pytest.raises(FormatError, match=says) as caught:
        convert.sniff(tmp_path)
    assert caught.value.code == "peft-type-missing"
    error = run("convert", tmp_path, "out", "--to", "gguf", code=4).stderr
    assert f"`adapterhub fix {tmp_path}` adds a missing peft_type" in error
    assert "[peft-type-missing]" in error


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (os.mkfifo, RefusedError, "a pipe or a device, not a regular file. Replace it with a file"),
        (lambda path: path.symlink_to("nothing"), NotFoundError, "no such file"),
        (lambda path: path.mkdir(), LocalIOError, "Is a directory"),
    ],
    ids=["pipe", "link", "folder"],
)
def test_a_config_that_is_no_file_is_named(tmp_path: Path, make: Any, error: type[AdapterhubError], says: str) -> None:
    save(tmp_path / peft.WEIGHTS)
    make(tmp_path / peft.CONFIG)
    with pytest.raises(error) as caught:
        convert.sniff(tmp_path)
    assert str(caught.value) == f"{tmp_path / peft.CONFIG}: {says}"


def test_alpha_for_a_format_that_records_it_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    peft.write(Adapter({Q: LowRank(A, B, 5.0)}), tmp_path / "a")
    for scale_options, says in (
        ({"alpha": 1.0}, r"^alpha: .*/a is in peft, which records its own alpha\. Leave it out"),
        ({"rslora": True}, r"^rslora: .*/a is in peft, which records its own scale\. Leave it out"),
    ):
        with pytest.raises(ParameterError, match=says):
            convert.convert(tmp_path / "a", tmp_path / "b", to="mlx", **scale_options)


def test_the_command_takes_it(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors")
    assert "--alpha" in run("convert", "x.safetensors", "out", "--to", "peft", code=6).stderr
    document: Any = json.loads(run("convert", "x.safetensors", "out", "--to", "peft", "--alpha", "4", "--json").stdout)
    assert document["worst"] == "exact"
