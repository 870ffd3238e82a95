"""What is hidden in files of weights: between tensors, in a template, among the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.checks.scan import scan
from tests.checks.test_scan import codes
from tests.support import malicious


def test_bytes_within_a_gguf_that_belong_to_no_tensor_are_found(tmp_path: Path) -> None:
    raw = malicious.gguf(tmp_path, "{{ messages }}", b"\0" * 8)
    (tmp_path / "a.gguf").write_bytes(raw)
    assert "trailing-data" not in codes(tmp_path / "a.gguf")  # zeros, as for an alignment
    (tmp_path / "a.gguf").write_bytes(raw + b"\1")
    assert "trailing-data" in codes(tmp_path / "a.gguf")


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use", "adapterhub.chat_template"])
def test_a_template_in_a_gguf_is_read_whoever_wrote_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.gguf").write_bytes(malicious.gguf(tmp_path, "{{ ''.__class__.__mro__ }}", key=key))
    assert "template-escape" in codes(tmp_path / "a.gguf")


@pytest.mark.parametrize("inside", [malicious.elf(), malicious.pe(), malicious.tarred("x"), malicious.zipped(a_txt=b"x")])
def test_a_file_within_the_numbers_of_weights_is_found(tmp_path: Path, inside: bytes) -> None:
    data = b"\0" * 100 + inside + b"\0" * 100
    header = json.dumps({"t": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert codes(tmp_path / "a.safetensors") == {"polyglot"}


@pytest.mark.parametrize("begins", [b"ustar", b"PK\x03\x04", b"PE\0\0"])
def test_weights_made_of_beginnings_are_not_tried_without_end(tmp_path: Path, begins: bytes) -> None:
    data = begins * 20_000
    header = json.dumps({"t": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert "10,000 times how one begins" in scan(tmp_path / "a.safetensors").problems[0].what
