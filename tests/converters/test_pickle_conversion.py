"""Pickles are refused by what they are and by what they are called; asked to, they are read where they can do no harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import adapter_files
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft, pickle_conversion
from tests.conftest import Run, need_module

Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def zipped(data: bytes, *, name: str = "archive/data.pkl", extra: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
        for path, content in {"archive/version": b"3\n", **(extra or {})}.items():
            archive.writestr(path, content)
    return buffer.getvalue()


PAYLOADS = {
    "pickle": pickle.dumps({"a": 1}),
    "zip": zipped(pickle.dumps({"a": 1})),
    "legacy": b"\x80\x02\x8a\nl\xfc" + b"x" * 20,
}
NAMES = ["adapter_model.safetensors", "adapter_model.bin"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_content_decides_for_any_name(tmp_path: Path, payload: str, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(PAYLOADS[payload])
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(RefusedError, match=r"a pickle can run code when it is loaded"):
            convert.read(path)
        with pytest.raises(RefusedError, match=f"{name}: a pickle"):
            convert.convert(path, tmp_path / "out", to="mlx")


@pytest.mark.parametrize("suffix", sorted(adapter_files.PICKLE_SUFFIXES))
def test_the_name_decides_for_any_content(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(b"(dp0\nS'a'\n.")
    with pytest.raises(RefusedError, match="a pickle can run code"):
        convert.sniff(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("length", [0x80, 0x280, 0x380])
def test_a_safetensors_header_may_have_the_length_of_a_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    head = b'{"q.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(length.to_bytes(8, "little") + head.ljust(length) + bytes(4))
    assert not pickle_conversion.is_pickle(path)
    assert convert.sniff(path) == "raw"


def save(
    tmp_path: Path, *, config: bool = True, dtype: str = "bfloat16", zipped: bool = True
) -> tuple[Path, dict[str, np.ndarray]]:
    need_module("torch")
    import torch

    state = {
        f"{Q}.lora_A.weight": torch.randn(2, 8).to(getattr(torch, dtype)),
        f"{Q}.lora_B.weight": torch.randn(2, 6).T.to(getattr(torch, dtype)),
    }
    torch.save(state, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "adapter_model.bin", {name: tensor.float().numpy() for name, tensor in state.items()}


@pytest.mark.peer
@pytest.mark.parametrize(("dtype", "zipped"), [("bfloat16", True), ("float16", False)])
def test_asked_to_it_is_read_to_the_bit(tmp_path: Path, dtype: str, zipped: bool) -> None:
    _, expected = save(tmp_path, dtype=dtype, zipped=zipped)
    report = convert.convert(tmp_path, tmp_path / "out", to="peft", unsafe_pickle=True)
    with safetensors_file.SafetensorsFile(tmp_path / "out" / peft.WEIGHTS) as file:
        for name, array in expected.items():
            assert np.array_equal(file.tensor(name).astype(np.float32), array)
    assert json.loads((tmp_path / "out" / peft.CONFIG).read_text()) == CONFIG
    assert len(report.losses) == 2


@pytest.mark.peer
def test_a_lone_one_needs_its_alpha(tmp_path: Path) -> None:
    path, _ = save(tmp_path, config=False)
    with pytest.raises(RefusedError, match="nothing else records its alpha") as caught:
        convert.convert(path, tmp_path / "out", to="mlx", unsafe_pickle=True)
    assert str(tmp_path) in caught.value.where
    convert.convert(path, tmp_path / "out", to="mlx", unsafe_pickle=True, alpha=2)


@pytest.mark.peer
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_malicious_one_runs_nothing(tmp_path: Path, form: str) -> None:
    need_module("torch")
    raw = pickle.dumps({f"{Q}.lora_A.weight": Evil(f"touch {tmp_path}/ran")}, protocol=2)
    (tmp_path / "adapter_model.bin").write_bytes(
        raw if form == "pickle" else zipped(raw, extra={"archive/byteorder": b"little"})
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(AdapterhubError) as caught:
        convert.convert(tmp_path, tmp_path / "out", to="mlx", unsafe_pickle=True)
    assert isinstance(caught.value, RefusedError | FormatError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.peer
def test_tensors_that_repeat_their_elements_do_not_fill_the_memory(tmp_path: Path) -> None:
    need_module("torch")
    import torch

    torch.save({"a": torch.zeros(1).expand(1 << 34)}, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="some repeat their elements"):
        convert.convert(tmp_path / "adapter_model.bin", tmp_path / "out", to="peft", unsafe_pickle=True, alpha=1)


@pytest.mark.peer
def test_a_bomb_ends_at_the_limits(tmp_path: Path) -> None:
    need_module("torch")
    import torch

    torch.save({"a": torch.zeros(4)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(content)
                if name.endswith("data/0"):
                    for _ in range(640):  # more than an address space has room for
                        entry.write(bytes(1 << 20))
    assert (tmp_path / "adapter_model.bin").stat().st_size < 4 << 20
    with pytest.raises(FormatError):
        convert.convert(tmp_path / "adapter_model.bin", tmp_path / "out", to="peft", unsafe_pickle=True, alpha=1)


@pytest.mark.peer
def test_one_that_loads_for_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    monkeypatch.setattr(pickle_conversion, "_SECONDS", 0.001)
    with pytest.raises(FormatError, match=r"adapter_model\.bin: loading it took more than 0\.001 seconds, and was stopped"):
        convert.convert(tmp_path, tmp_path / "out", to="mlx", unsafe_pickle=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.peer
@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_truncated_one_is_malformed(tmp_path: Path, part: float) -> None:
    path, _ = save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(AdapterhubError) as caught:
        convert.convert(tmp_path, tmp_path / "out", to="mlx", unsafe_pickle=True)
    assert isinstance(caught.value, FormatError | RefusedError)
    assert "\n" not in str(caught.value)


def test_without_torch_it_names_what_to_install(tmp_path: Path, run: Run) -> None:
    (tmp_path / "torch").mkdir()
    code = "import importlib.util as u; f=u.find_spec; u.find_spec=lambda n, *a: None if n == 'torch' else f(n, *a)"
    (tmp_path / "torchless").mkdir()
    (tmp_path / "torchless" / "sitecustomize.py").write_text(code)
    (tmp_path / "x.bin").write_bytes(PAYLOADS["zip"])
    from tests.conftest import ROOT

    path = os.pathsep.join(map(str, [tmp_path / "torchless", ROOT, ROOT / "converters", ROOT / "schemas"]))
    words = ["convert", "x.bin", "out", "--to", "peft", "--unsafe-pickle", "--alpha", "1"]
    result = run(*words, env={"PYTHONPATH": path}, code=9)
    assert "pip install 'adapterhub[train]'" in result.stderr
