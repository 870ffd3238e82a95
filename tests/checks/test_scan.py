"""Scanning files for what could run code or mislead: nothing is run, nothing sound is reported."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from adapterhub.checks import CODES, SCAN
from adapterhub.checks.scan import scan
from adapterhub_converters.errors import NotFoundError, RefusedError
from tests.conftest import ROOT
from tests.support import malicious
from tests.support.adapters import write_adapter
from tests.support.byte_tokenizer import TEMPLATE

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0IEND\xaeB`\x82"


def codes(path: Path) -> set[str]:
    return {problem.code for problem in scan(path).problems}


def codes_in(folder: Path, name: str, data: bytes | str) -> set[str]:
    """The codes of a file next to a sound adapter."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return {problem.code for problem in scan(folder).problems if problem.file == name}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sound")


def test_a_sound_adapter_has_nothing_to_report(sound: Path) -> None:
    (sound / "README.md").write_text(
        "# Ein Adapter 👩‍🔬\n\n```html\n<script>shown();</script>\n```\nSee [the site](https://a.example).\n"
    )
    (sound / "chat_template.jinja").write_text(TEMPLATE)
    (sound / "plot.png").write_bytes(PNG)
    (sound / "LICENSE").write_text("MIT")
    (sound / "tokenizer.model").write_bytes(b"\0" * 4096 + b"<html><script><?php%PDF-1.7")
    (sound / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<script": 1, "\u200b": 2}}}))
    report = scan(sound)
    assert [problem for problem in report.problems if problem.code != "template-text"] == []
    assert report.facts["files"] == 8


def test_every_malicious_file_is_an_error(tmp_path: Path) -> None:
    assert [path.name for path in malicious.corpus(tmp_path) if scan(path).ok] == []


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("weights.safetensors", b"PK\x03\x04" + b"\0" * 64, "disguised"),
        ("weights.gguf", b"GGML" + b"\0" * 64, "disguised"),
        ("weights.gguf", b"GGUF" + b"\0" * 64, "malformed"),
        ("plot.png", b"GIF89a", "disguised"),
        ("plot.png", PNG + b"PK", "trailing-data"),
        ("plot.png", PNG[:-8], "malformed"),
        ("notes.txt", b"\xff\xfe\0", "disguised"),
        ("state.dat", b"\xff\xfe\0", "unknown-binary"),
        ("train.log", "epoch 1", "left-out"),
        ("config.json", "{", "malformed"),
        ("notes.txt", "  <!DOCTYPE html><p>", "polyglot"),
        ("notes.txt", b"hello" + malicious.zipped(a_txt=b""), "polyglot"),
        ("plot.svg", "<svg onload='x()'/>", "active-markup"),
        ("plot.svg", "<!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>", "active-markup"),
        ("card.md", "[a](java&#x0A;script:x)", "active-markup"),
        ("card.md", f"[a](&#{'0' * 5_000}106;avascript:x) &#{'9' * 5_000};", "active-markup"),
        ("card.md", "<img src=x onerror=x()>", "active-markup"),
        ("card.md", "[a](data:text/html;base64,AAAA)", "active-markup"),
        ("card.md", "a\u202eb", "invisible-text"),
        ("card.md", "".join(chr(0xE0000 + ord(char)) for char in "ignore"), "invisible-text"),
        ("run.sh", "id", "program"),
        ("a/b/model.py", "pass", "program"),
        ("config.json", '{"attn_implementation": "evil/kernel"}', "remote-code"),
        ("adapter_config.json", '{"auto_mapping": {"parent_library": "evil"}}', "remote-code"),
        ("adapter_config.json", '{"megatron_core": "evil"}', "remote-code"),
        ("model_index.json", '{"_class_name": ["pipeline", "Evil"]}', "remote-code"),
        ("x.json", '{"a": [{"_target_": "os.system"}]}', "remote-code"),
        ("x.json", '{"py/object": "os.system"}', "remote-code"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}', "outside-path"),
        ("model.bin", "text", "pickle"),
    ],
)  # fmt: skip
def test_each_pattern_is_found(sound: Path, name: str, data: bytes | str, code: str) -> None:
    assert code in codes_in(sound, name, data)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"auto_map": null, "trust_remote_code": false, "attn_implementation": "sdpa"}'),
        ("a.json", '{"auto_mapping": {"parent_library": "transformers.models.llama"}, "megatron_core": "megatron.core"}'),
        ("card.md", "I like javascript: it is a language. a < b, and c > d on = 3"),
        ("card.md", "~~~\n<iframe>\n~~~\n"),
    ],
)
def test_what_looks_alike_is_not_reported(sound: Path, name: str, text: str) -> None:
    assert codes_in(sound, name, text) == set()


def test_links_and_pipes_are_named_and_not_opened(sound: Path) -> None:
    (sound / "secret.json").symlink_to("/etc/passwd")
    os.mkfifo(sound / "pipe.json")
    assert {problem.file for problem in scan(sound).problems if problem.code == "not-packaged"} == {"secret.json", "pipe.json"}


def test_the_history_of_a_clone_is_named_and_not_entered(sound: Path) -> None:
    assert codes_in(sound, ".git/objects/x", b"\x80\x02.") == set()
    assert {problem.file for problem in scan(sound).problems if problem.code == "not-scanned"} == {".git"}


def test_a_report_counts_more_problems_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"trust_remote_code": True}] * 50))
    report = scan(tmp_path, limit=10)
    assert (len(report.problems), report.counted()) == (10, {"remote-code": 50})


def test_nothing_and_too_much_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError):
        scan(tmp_path / "absent")
    monkeypatch.setattr("adapterhub.checks.scan.MAX_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_text("")
    with pytest.raises(RefusedError, match="more than 2 files"):
        scan(tmp_path)


# ---- templates


def test_the_page_lists_every_code_that_a_scan_reports() -> None:
    items = re.findall(r"^- \*\*(\w+)\*\*: ((?:.+\n)+?)(?=-|\n)", (ROOT / "docs/scan.md").read_text(), re.MULTILINE)
    severities = {code: severity for severity, text in items for code in re.findall(r"`([a-z-]+)`", text)}
    assert set(severities) >= SCAN
    assert {code: CODES[code][0] for code in severities} == severities
