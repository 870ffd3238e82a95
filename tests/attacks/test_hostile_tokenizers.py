"""The tokenizer of a base, which a library in Rust follows without limits: no text grows, waits or ends a command as a bug."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
Tokenizer = pytest.importorskip("tokenizers").Tokenizer

from adapterhub.training.model import quantized_cache, tokenizer_files, tokenizer_search, transformers_api  # noqa: E402
from adapterhub.training.model.base_files import BaseFiles  # noqa: E402
from adapterhub_converters.errors import FormatError, RefusedError  # noqa: E402
from tests.training.conftest import tiny_base  # noqa: E402

__all__ = ["tiny_base"]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    return folder


def loaded(base: Path) -> Any:
    with BaseFiles(base) as files:
        return transformers_api.config_and_tokenizer(files.folder, json.loads(files.config_text), location="base")[1]


def change(base: Path, **parts: Any) -> None:
    path = base / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def replace(count: int, content: str = "aa", pattern: Any = None) -> dict[str, Any]:
    normalizer = {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [normalizer] * count}


def charsmap(text: bytes) -> dict[str, Any]:
    raw = (4).to_bytes(4, "little") + bytes(4) + text + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


SPECIAL = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
GROWS = r"its normalizer can make [\d,]+ characters of one"
ADDS = r"its post_processor adds [\d,]+ tokens to every text"
BOMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "replacements": (GROWS, {"normalizer": replace(40)}),
    "replacements in sequences": (GROWS, {"normalizer": {"type": "Sequence", "normalizers": [replace(5), replace(5)]}}),
    "a long replacement": (GROWS, {"normalizer": replace(1, "b" * 100_000)}),
    "a replacement of nothing": (GROWS, {"normalizer": replace(2, "b" * 20, {"Regex": "x*"})}),
    "a table of SentencePiece": (GROWS, {"normalizer": charsmap(b"y" * 1000)}),
    "a decoder": (
        "its decoder can make 1,048,576 characters of one",
        {"decoder": {"type": "Sequence", "decoders": replace(20)["normalizers"]}},
    ),
    "tokens around a text": (
        ADDS,
        {"post_processor": {"type": "TemplateProcessing", "single": [SPECIAL] * 20_000, "pair": [], "special_tokens": {}}},
    ),
    "a token that is many": (
        ADDS,
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [SPECIAL] * 200,
                "pair": [],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0] * 200, "tokens": ["x"] * 200}},
            }
        },
    ),
    "words without an end": (
        "its model looks up words of 1,099,511,627,776 characters",
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 2**40}},
    ),
}


@pytest.mark.parametrize(("says", "parts"), BOMBS.values(), ids=BOMBS)
def test_a_tokenizer_that_lets_a_text_grow_is_refused(base: Path, says: str, parts: dict[str, Any]) -> None:
    change(base, **parts)
    with pytest.raises(RefusedError, match=f"base/tokenizer.json: {says}. Use another base"):
        loaded(base)


def test_what_real_tokenizers_do_is_taken(base: Path) -> None:
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "NFKC"},
        charsmap(b"ab\0" + "صلى الله عليه وسلم".encode()),
    ]
    change(base, normalizer={"type": "Sequence", "normalizers": normalizers[:3]})
    assert loaded(base)("abc")["input_ids"]
    tokenizer_files._check_document({"normalizer": {"type": "Sequence", "normalizers": normalizers[3:]}}, "base")


def test_another_file_that_transformers_would_read_is_looked_at(base: Path) -> None:
    change(base, normalizer=replace(40))
    (base / "tokenizer.json").rename(base / "tokenizer.4.0.json")
    with pytest.raises(RefusedError, match="tokenizer.4.0.json"):
        loaded(base)


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "added_tokens.json", "vocab.txt", "additional_chat_templates/x.jinja"]
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_pipe_or_a_device_among_the_files_is_refused(base: Path, name: str, make: Callable[[Path], object]) -> None:
    (base / name).parent.mkdir(exist_ok=True)
    make(base / name)
    with pytest.raises(RefusedError, match="a pipe or a device"):
        loaded(base)


def test_a_tokenizer_json_that_is_none_is_one_line(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"a":' * 100_000)
    with pytest.raises(FormatError, match="nested more than 64 deep"):
        loaded(base)


SEARCH = {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|a)*c"}, "behavior": "Isolated", "invert": False}
GIVES_UP: dict[str, dict[str, Any]] = {
    "a pattern": {"pre_tokenizer": SEARCH},
    "a token that is not there": {"model": {"type": "WordPiece", "vocab": {"b": 0}, "unk_token": "[UNK]",
                                            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}},
}  # fmt: skip


@pytest.mark.parametrize("parts", GIVES_UP.values(), ids=GIVES_UP)
def test_a_tokenizer_that_gives_up_is_one_line(base: Path, parts: dict[str, Any]) -> None:
    change(base, **parts)
    with pytest.raises(FormatError, match="base: its tokenizer gives up on a text"):
        loaded(base)("a" * 1000 + "b")


WANDERS = {"type": "Split", "pattern": {"Regex": r"(\w*\w*){9}!|\w+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the time of a process")
def test_a_pattern_that_tries_a_text_for_hours_is_ended(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each match is within Oniguruma's limit on its steps; there are as many as the text has letters."""
    monkeypatch.setattr(tokenizer_search, "_SECONDS", 1)
    change(base, pre_tokenizer=WANDERS)
    tokenizer = loaded(base)
    with pytest.raises(FormatError, match=r"base: its tokenizer takes more than 1 s for a text, with '\(\\\\w\*"):
        tokenizer("aaaaaaaaa " * 5000)
    assert tokenizer("b")["input_ids"]


def test_an_unknown_pattern_that_does_not_wander_splits_as_ever(base: Path) -> None:
    change(base, pre_tokenizer={**WANDERS, "pattern": {"Regex": r"\w+|[^\w]+"}})
    tokenizer, plain = loaded(base), Tokenizer.from_file(str(base / "tokenizer.json"))
    for text in ("two words", ["two", "words"]):
        ours = tokenizer(text)["input_ids"]
        assert ours == (plain.encode(text).ids if isinstance(text, str) else [plain.encode(part).ids for part in text])


def test_a_known_pattern_needs_no_process(base: Path) -> None:
    tokenizer = loaded(base)
    tokenizer("two words")
    assert tokenizer.search._process._process is None  # it has not started


def test_a_decoder_that_searches_is_refused(base: Path) -> None:
    change(base, decoder={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""})
    with pytest.raises(RefusedError, match="its decoder searches with an unknown expression"):
        loaded(base)


def test_no_device_is_copied_into_the_cache_of_quantized_bases(base: Path, tmp_path: Path) -> None:
    """/dev/zero has 0 bytes, and no end."""
    (base / "x.txt").symlink_to("/dev/zero")
    (base / "y.json").write_text("{}")
    (tmp_path / "copied").mkdir()
    quantized_cache._copy_texts(base, tmp_path / "copied")
    assert "y.json" in os.listdir(tmp_path / "copied")
    assert "x.txt" not in os.listdir(tmp_path / "copied")
