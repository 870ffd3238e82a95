"""Pickles found by their opcodes: named by what they call, in bounded work, and text is none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from adapterhub.checks.scan import pickle_opcodes, scan
from tests.checks.test_scan import codes_in
from tests.support import malicious
from tests.support.adapters import write_adapter


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sound")


def test_a_pickle_is_found_by_what_it_does_and_names_what_it_calls(sound: Path) -> None:
    for protocol in range(6):
        (sound / "notes.txt").write_bytes(malicious.pickled(protocol))
        (problem,) = [finding for finding in scan(sound).problems if finding.code == "pickle"]
        assert problem.what == f"a pickle that calls {os.system.__module__}.system when it is loaded"


@pytest.mark.parametrize(
    "text",
    [
        "cats\nare\nnice\n",
        "I love it.\n",
        "(((((",
        "N.",
        "config\nfile\nR",
        "colors\nred\nblue\n",
        "}q\x00.",
        "# A card\n",
        "",
        "S'x'\n.",
    ],
)
def test_texts_that_begin_with_opcodes_are_not_pickles(text: str) -> None:
    assert pickle_opcodes.find(text.encode()) is None


def test_a_pickle_of_data_alone_is_a_pickle(sound: Path) -> None:
    assert "pickle" in codes_in(sound, "data.txt", pickle.dumps({"a": 1}))


def test_a_pickle_that_never_ends_takes_bounded_work() -> None:
    assert pickle_opcodes.find(b"\x80\x02" + b"(" * (4 << 20)) is not None


def test_a_pickle_that_names_one_text_again_and_again_has_it_once() -> None:
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000 + b"\x94"
    pickle_ = pickle_opcodes.find(b"\x80\x04" + text + b"h\0h\0\x93" * 100 + b".")
    assert pickle_ is not None
    assert sum(map(len, pickle_.imports)) < 100_000
