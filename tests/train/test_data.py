"""Rows: what is learnt, what shares a row with what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub.train import data
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RefusedError

EOS = 2


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path, tokenizer: object, **options: object) -> data.Dataset:
    return data.load([path], tokenizer, **{"sequence": 32, "loss": "completion", "seed": None, **options})


def learnt(rows: data.Rows, tokenizer: object) -> str:
    """The text that the labels spell."""
    return tokenizer.decode(rows.labels[rows.labels != data.IGNORED])  # type: ignore[attr-defined,no-any-return]


def test_running_text_fills_rows_and_every_row_begins_a_context(tmp_path: Path, tokenizer: object) -> None:
    rows = load(write(tmp_path / "a.jsonl", {"text": "x" * 40}, {"text": "y" * 10}), tokenizer).rows
    assert rows.ids.shape == (2, 32)
    # 32 of the first document; its last 8 and its end; the second with its end; padding.
    assert rows.positions[0].tolist() == list(range(32))
    assert rows.positions[1].tolist() == [*range(9), *range(11), *range(12)]
    assert rows.ids[1, 8] == EOS
    assert rows.labels[1, 7] == EOS
    assert rows.labels[1, 8] == data.IGNORED  # the next document can't be foreseen
    assert (rows.labels[1, 19:] == data.IGNORED).all()
    assert rows.label_tokens == 31 + 8 + 10


def test_of_a_prompt_and_completion_only_the_completion_is_learnt(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"})
    assert learnt(load(path, tokenizer).rows, tokenizer) == "4<|im_end|>"
    assert learnt(load(path, tokenizer, loss="all").rows, tokenizer) == "+2=4<|im_end|>"


def test_of_a_conversation_only_the_answers_are_learnt_with_their_ends(tmp_path: Path, tokenizer: object) -> None:
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "é?"), ("assistant", "ja")]
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]})
    dataset = load(path, tokenizer, sequence=128)
    assert learnt(dataset.rows, tokenizer) == "ho<|im_end|>\nja<|im_end|>\n"
    assert dataset.notes == ()


def test_examples_stay_whole_and_share_rows(tmp_path: Path, tokenizer: object) -> None:
    pairs = [{"prompt": "p" * size, "completion": "c"} for size in (20, 4, 10, 3)]
    rows = load(write(tmp_path / "a.jsonl", *pairs), tokenizer).rows
    assert rows.ids.shape == (2, 32)
    assert sorted(np.flatnonzero(row == 0).size for row in rows.positions) == [3, 3]  # two examples and the padding


def test_what_is_cut_and_what_never_ends_is_said(tmp_path: Path, tokenizer: object) -> None:
    dataset = load(write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c" * 90}), tokenizer)
    assert dataset.notes[0] == "1 of 1 examples are longer than 32 tokens and were cut there"
    never = load(write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "q"}]}), tokenizer, loss="all")
    assert never.notes == ()  # its user's turn ends with the same mark


def test_the_order_follows_the_seed(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": chr(97 + number) * 31} for number in range(9)))
    first, again, other = (load(path, tokenizer, seed=seed).rows.ids for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert sorted(data.order(9, 18, seed=0).tolist()) == sorted([*range(9), *range(9)])


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ('{"text": 3}', FormatError, 'a.jsonl:1: has neither "text"'),
        ("[1]", FormatError, "a.jsonl:1: not a JSON object"),
        ("{", FormatError, "a.jsonl:1: not valid JSON"),
        ('{"messages": [{"role": "user"}]}', FormatError, 'a.jsonl:1: a message needs "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "only asked"}]}', RefusedError, "no token would be learnt"),
        ("", RefusedError, "no token would be learnt"),
    ],
)
def test_refused(tmp_path: Path, tokenizer: object, line: str, kind: type[AdapterhubError], says: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(kind) as caught:
        load(tmp_path / "a.jsonl", tokenizer)
    assert says in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, tokenizer: object) -> None:
    turns = [
        {"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};{% endfor %}"
    before = tokenizer.chat_template  # type: ignore[attr-defined]
    tokenizer.chat_template = forgetful  # type: ignore[attr-defined]
    try:
        with pytest.raises(RefusedError, match="writes earlier turns differently"):
            load(write(tmp_path / "a.jsonl", {"messages": turns}), tokenizer)
    finally:
        tokenizer.chat_template = before  # type: ignore[attr-defined]


def test_plain_text_is_one_document(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    dataset = load(tmp_path / "a.txt", tokenizer)
    assert (dataset.documents, dataset.tokens, dataset.files[0].path) == (1, 9, "a.txt")
    with pytest.raises(NotFoundError):
        load(tmp_path / "b.txt", tokenizer)
