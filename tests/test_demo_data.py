"""The data of the demo: the same bytes everywhere, and held-out texts that share next to nothing with the others."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, need_module

spec = importlib.util.spec_from_file_location("licenses", ROOT / "examples" / "licenses.py")
assert spec is not None
assert spec.loader is not None
licenses = sys.modules.setdefault("licenses", importlib.util.module_from_spec(spec))
spec.loader.exec_module(licenses)


def words(name: str, count: int) -> str:
    return " ".join(f"{name}{number}" for number in range(count))


def test_the_data_have_the_same_bytes_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_module("identify")
    licenses.main(tmp_path)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in tmp_path.iterdir()}
    assert digests == {"train.jsonl": "79ea510473a63824", "heldout.jsonl": "1411880cf7f14c3f"}
    assert capsys.readouterr().out.endswith("of the runs of 8 words in the held-out texts 0.6% are in the training texts\n")


def test_other_texts_than_expected_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_module("identify")
    monkeypatch.setattr("identify.vendor.licenses.LICENSES", (("MIT", words("changed", 20)),))
    with pytest.raises(SystemExit, match=f"others, sha256:.*pip install {licenses.PACKAGE}"):
        licenses.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_that_share_passages_are_on_one_side_also_through_a_third() -> None:
    first, second, quoted, longer = words("one", 60), words("two", 60), words("quoted", 20), words("long", 300)
    texts = {"a": first, "b": f"{first} {quoted}", "c": f"{quoted} {second}", "d": longer, "e": words("other", 40)}
    passages = {name: licenses.passages_of(text) for name, text in texts.items()}
    clusters = licenses.clusters(sorted(texts), passages)
    assert sorted(map(sorted, clusters)) == [["a", "b", "c"], ["d"], ["e"]]
    assert licenses.split(sorted(texts), passages) == (["d"], ["a", "b", "c", "e"])
    assert licenses.overlap(["d"], ["a", "e"], passages) == 0
    assert licenses.overlap(["b"], ["a"], passages) == 1


def test_a_text_that_nearly_repeats_a_longer_one_is_left_out() -> None:
    texts = {"a": words("same", 100), "b": f"{words('same', 100)} {words('more', 10)}", "c": words("own", 20)}
    assert licenses.distinct({name: licenses.passages_of(text) for name, text in texts.items()}) == ["b", "c"]
