"""Rows: tokens that are trained on, sequence packing, and data that are refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.training import TrainConfig, config_file
from adapterhub.training.data import dataset as data
from adapterhub.training.data import document_files, survey
from adapterhub.training.data.example import Example
from adapterhub.training.data.examples import encode
from adapterhub.training.data.packed_rows import IGNORED, Rows, document_lengths, lengths, mean_context, order, pack
from adapterhub.training.data.token_arrays import TRAINED, collect
from adapterhub_converters.errors import AdapterhubError, FormatError, MissingExtraError, NotFoundError, RefusedError
from tests.conftest import need_module

EOS = 2


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path, tokenizer: object, **options: Any) -> data.Dataset:
    return data.build([document_files.read(path)], tokenizer, **{"sequence": 32, "loss": "completion", "seed": None, **options})


def trained(rows: Rows, tokenizer: object) -> str:
    """The text that the labels spell."""
    return tokenizer.decode(rows.labels[rows.labels != IGNORED])  # type: ignore[attr-defined,no-any-return]


def test_a_text_begins_a_context_and_so_does_what_is_left_of_a_long_one(tmp_path: Path, tokenizer: object) -> None:
    rows = load(write(tmp_path / "a.jsonl", {"text": "x" * 40}, {"text": "y" * 10}), tokenizer).rows
    assert rows.ids.shape == (2, 32)
    # 32 of the first document; the second with its end; the last 8 of the first and its end; padding.
    assert rows.positions[0].tolist() == list(range(32))
    assert rows.positions[1].tolist() == [*range(11), *range(9), *range(12)]
    assert rows.ids[1, [10, 19]].tolist() == [EOS, EOS]
    assert rows.labels[1, 9] == EOS
    assert rows.labels[1, 10] == IGNORED  # the next document can't be foreseen
    assert (rows.labels[1, 19:] == IGNORED).all()
    assert rows.label_tokens == 31 + 10 + 8


def test_what_is_evaluated_does_not_depend_on_the_order_of_documents(tmp_path: Path, tokenizer: object) -> None:
    """Cut where rows end, it would: a text's first words would have a context or not by what stands before it."""
    texts = [{"text": f"{number} " * (7 + 13 * number % 29)} for number in range(40)]
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / "a.jsonl", *texts), write(tmp_path / "b" / "a.jsonl", *reversed(texts))]
    first, second = (load(path, tokenizer).rows for path in paths)
    assert (first.ids == second.ids).all()
    assert (first.labels == second.labels).all()
    assert (first.positions == second.positions).all()


def test_of_a_prompt_and_completion_only_the_completion_is_trained_on(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"})
    assert trained(load(path, tokenizer).rows, tokenizer) == "4<|im_end|>"
    assert trained(load(path, tokenizer, loss="all").rows, tokenizer) == "+2=4<|im_end|>"


ALPACA = {"instruction": "add", "input": "2, 2", "output": "4"}


def test_an_instruction_is_a_conversation_of_the_models_own_template(tmp_path: Path, tokenizer: object) -> None:
    dataset = load(write(tmp_path / "a.jsonl", ALPACA), tokenizer, sequence=128)
    same = {"messages": [{"role": "user", "content": "add\n\n2, 2"}, {"role": "assistant", "content": "4"}]}
    assert (dataset.rows.ids == load(write(tmp_path / "b.jsonl", same), tokenizer, sequence=128).rows.ids).all()
    assert dataset.notes[0] == "a.jsonl: Alpaca, 1 example"


def test_examples_stay_whole_and_share_rows(tmp_path: Path, tokenizer: object) -> None:
    pairs = [{"prompt": "p" * size, "completion": "c"} for size in (20, 4, 10, 3)]
    rows = load(write(tmp_path / "a.jsonl", *pairs), tokenizer).rows
    assert rows.ids.shape == (2, 32)
    assert sorted(np.flatnonzero(row == 0).size for row in rows.positions) == [3, 3]  # two examples and the padding


def test_examples_of_any_lengths_fill_rows_nearly_and_all_are_there() -> None:
    sizes = np.random.default_rng(0).integers(2, 200, 20_000)
    examples = [Example(np.full(size, number), np.ones(size, bool), joint=True) for number, size in enumerate(sizes)]
    rows = pack(collect(((example, b"") for example in examples), set()), 128)
    assert sorted((rows.marked[rows.starts] & ~TRAINED).tolist()) == list(range(len(examples)))
    filled = np.add.reduceat(rows.segments, rows.bounds[:-1])
    assert filled.max() == 128
    assert filled.mean() > 0.99 * 128


def test_packing_takes_memory_for_the_documents_however_long_a_row_is() -> None:
    tokens = collect(((Example(np.ones(size), np.ones(size, bool), joint=True), b"") for size in (5, 3, 4)), set())
    tracemalloc.start()
    rows = pack(tokens, 1 << 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.segments.tolist() == [5, 4, 3]
    assert peak < 32 << 20


def test_truncated_and_endless_samples_are_reported(tmp_path: Path, tokenizer: object) -> None:
    dataset = load(write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c" * 90}), tokenizer)
    assert dataset.notes[0] == "1 of 1 examples (100%) are longer than 32 tokens and were cut there"
    assert dataset.truncated == 1
    never = load(write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "q"}]}), tokenizer, loss="all")
    assert never.notes == ()  # the user's turn ends with the same mark


def test_fully_truncated_answers_are_reported_and_refused_where_nothing_is_left(tmp_path: Path, tokenizer: object) -> None:
    short, long = ({"prompt": "p" * size, "completion": "c"} for size in (3, 90))
    lost, *_ = load(write(tmp_path / "a.jsonl", short, long), tokenizer).notes
    assert lost == "1 of 2 examples are left out: their answers come after token 32"
    with pytest.raises(RefusedError, match=r"after the first 32 tokens of every document. Raise \[data\] sequence"):
        load(write(tmp_path / "b.jsonl", long), tokenizer)


@pytest.mark.parametrize("pack_rows", [True, False])
def test_no_row_is_without_a_label(pack_rows: bool, tmp_path: Path, tokenizer: object) -> None:
    """Long prompts, a prompt alone, an empty conversation and text, and a text that is one token longer than a row."""
    records = [
        *[{"prompt": "p" * 100, "completion": "c"}] * 6, *[{"prompt": "p", "completion": "c"}] * 2, {"text": ""},
        {"messages": [{"role": "user", "content": "q"}]}, {"messages": []}, {"text": "x" * 32},
    ]  # fmt: skip
    dataset = load(write(tmp_path / "a.jsonl", *records), tokenizer, pack_rows=pack_rows)
    assert (dataset.rows.labels != IGNORED).any(axis=1).all()
    assert len(dataset.rows) == (2 if pack_rows else 3)
    assert dataset.notes[:2] == (
        "6 of 12 examples are left out: their answers come after token 32",
        "3 of 12 examples are left out: they have no token to train on",
    )


def test_an_example_without_an_answer_is_not_said_to_lack_its_end(tmp_path: Path, tokenizer: object) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    file = write(tmp_path / "a.jsonl", {"messages": [question, answer]}, {"messages": [question]})
    left_out, *other_notes = load(file, tokenizer).notes
    assert left_out == "1 of 2 examples are left out: they have no token to train on"
    assert not any("stop token" in note for note in other_notes)


def test_an_array_of_objects_means_the_same_as_json_lines(tmp_path: Path, tokenizer: object) -> None:
    records = [{"text": "x"}, {"prompt": "a", "completion": "b"}]
    lines = write(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_bytes(lines.read_bytes())
    expected = load(lines, tokenizer).rows.ids.tolist()
    for name in ("b.json", "c.json"):
        assert load(tmp_path / name, tokenizer).rows.ids.tolist() == expected
    (tmp_path / "d.json").write_text('[{"text": "x"}, 3]')
    with pytest.raises(FormatError, match=r"d.json: item 2: not a JSON object"):
        load(tmp_path / "d.json", tokenizer)


def test_the_order_follows_the_seed(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": chr(97 + number) * 31} for number in range(9)))
    first, again, other_order = (load(path, tokenizer, seed=seed).rows.ids for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other_order).any()
    assert sorted(order(9, 18, seed=0).tolist()) == sorted([*range(9), *range(9)])


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ('{"text": 3}', FormatError, 'a.jsonl:1: "text" is not text'),
        (
            '{"body": "x"}',
            FormatError,
            'a.jsonl:1: its keys have no known meaning: "body". Say what they are, like [data] columns',
        ),
        ("[1]", FormatError, "a.jsonl:1: not a JSON object"),
        ("{", FormatError, "a.jsonl:1: not valid JSON"),
        ('{"messages": [{"role": "user"}]}', FormatError, 'a.jsonl:1: a message needs "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "only asked"}]}', RefusedError, "no token to train on"),
        ("", RefusedError, "no token to train on"),
    ],
)
def test_refused(tmp_path: Path, tokenizer: object, line: str, kind: type[AdapterhubError], says: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(kind) as caught:
        load(tmp_path / "a.jsonl", tokenizer)
    assert says in str(caught.value)


def test_plain_text_is_one_document(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    dataset = load(tmp_path / "a.txt", tokenizer)
    assert (dataset.documents, dataset.tokens, dataset.files[0].path) == (1, 9, "a.txt")
    with pytest.raises(NotFoundError):
        load(tmp_path / "b.txt", tokenizer)


def say(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tmp_path: Path) -> None:
    for name in ("tokenizers", "transformers"):
        need_module(name)
    import tokenizers
    import transformers

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    ending = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert encode({"text": "a b"}, ending, loss="all", location="").ids.tolist() == [0, 2, 3, 1]
    pair = encode({"prompt": "a", "completion": "b"}, ending, loss="completion", location="")
    assert pair.ids.tolist() == [0, 2, 3, 1]
    assert pair.trained.tolist() == [False, False, True, True]


def test_the_held_out_share_follows_from_the_documents_alone(tmp_path: Path, tokenizer: object) -> None:
    records = [{"text": f"document {number}"} for number in range(200)]
    (tmp_path / "c.toml").write_text('[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nheldout_share = 0.2\nsequence = 32\n')
    write(tmp_path / "a.jsonl", *records)
    settings = config_file.read(tmp_path / "c.toml")
    train_set, heldout = data.datasets(settings, tokenizer)
    assert heldout is not None
    assert train_set.documents + heldout.documents == 200
    assert 20 < heldout.documents < 60
    assert not set(train_set.digests) & set(heldout.digests)
    assert data.overlap(train_set, heldout) == []
    write(tmp_path / "a.jsonl", {"text": "another"}, *reversed(records), records[0])
    _, again = data.datasets(settings, tokenizer)
    assert again is not None
    another = int.from_bytes(document_files.Document({"text": "another"}, "").digest[:8], "big")
    assert set(again.digests) - {another} == set(heldout.digests)


def test_a_share_that_leaves_nothing_is_refused_by_name(tmp_path: Path, tokenizer: object) -> None:
    write(tmp_path / "a.jsonl", {"text": "document"})
    text = '[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nheldout_share = 0.01\n'
    settings = config_file.parse(text, folder=tmp_path, location="c.toml")
    says = (
        r"c.toml: \[data\] heldout_share: it holds out whole documents, and of 1 one part is empty. Name other files in heldout"
    )
    with pytest.raises(RefusedError, match=says):
        data.datasets(settings, tokenizer)


def mix(tmp_path: Path, shares: dict[str, float], section_text: str = "") -> TrainConfig:
    sources = ", ".join(f'{{path = "{name}.jsonl", share = {share}}}' for name, share in shares.items())
    text = f'[base]\npath = "b"\n[data]\ntrain = [{sources}]\nsequence = 64\n{section_text}'
    return config_file.parse(text, folder=tmp_path, location="c.toml")


def test_files_are_mixed_by_their_shares_of_the_tokens(tmp_path: Path, tokenizer: object) -> None:
    """The file that is scarce is used as a whole; what is drawn of the other follows from the seed."""
    for name, count in (("a", 40), ("b", 200)):
        write(tmp_path / f"{name}.jsonl", *({"text": f"{name}{number:03} " * (1 + number % 5)} for number in range(count)))
    settings = mix(tmp_path, {"a": 0.25, "b": 0.75})
    train_set, _ = data.datasets(settings, tokenizer)
    a, b = train_set.files
    assert (a.documents, b.documents < 200) == (40, True)
    assert b.tokens / train_set.tokens == pytest.approx(0.75, abs=0.01)
    assert (
        f"b.jsonl: {b.documents} of 200 documents are used, {b.tokens / train_set.tokens:.1%} of the tokens" in train_set.notes
    )
    assert (train_set.packed.segments.sum(), len(train_set.packed)) == (train_set.tokens, len(train_set.rows))
    again, other_order = (
        data.datasets(replace(settings, train=replace(settings.train, seed=seed)), tokenizer)[0] for seed in (0, 1)
    )
    assert (again.rows.ids == train_set.rows.ids).all()
    assert tokenizer.decode(other_order.rows.ids[0]) != tokenizer.decode(again.rows.ids[0])  # type: ignore[attr-defined]
    assert settings.document()["data"]["train"] == [{"path": "a.jsonl", "share": 0.25}, {"path": "b.jsonl", "share": 0.75}]
    ahead = survey.survey(settings, tokenizer)
    assert ahead.count is not None
    assert (ahead.count.tokens, ahead.count.rows, ahead.notes) == (train_set.tokens, len(train_set.packed), train_set.notes)


def test_a_document_in_both_splits_is_reported(tmp_path: Path, tokenizer: object) -> None:
    train_set = load(write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}), tokenizer)
    heldout = load(write(tmp_path / "b.jsonl", {"text": "b"}, {"text": "c"}), tokenizer)
    assert data.overlap(train_set, heldout) == ["1 held-out documents are also trained on: its perplexity proves nothing"]


@pytest.mark.parametrize("pack_rows", [True, False])
def test_padding_is_no_part_of_a_document(pack_rows: bool, tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"prompt": "p", "completion": "c"}, {"text": "x" * 20})
    rows = load(path, tokenizer, pack_rows=pack_rows).rows
    assert sorted(document_lengths(rows).tolist()) == [3, 4, 21]
    assert mean_context(document_lengths(rows)) == (9 + 16 + 441) / 28
    assert mean_context(np.array([])) == 0


def test_passages_of_held_out_texts_that_are_trained_on_are_reported(tmp_path: Path, tokenizer: object) -> None:
    """Of 15 runs of eight words one text has eight in common with another; what only prompts have in common does not count."""
    passage = " ".join(f"word{number}" for number in range(15))
    other_texts = [" ".join(f"{name}{number}" for number in range(22 - 15 + 7)) for name in "ab"]
    write(tmp_path / "a.jsonl", {"text": f"{other_texts[0]}  {passage}"}, {"prompt": other_texts[1], "completion": "x"})
    write(tmp_path / "b.jsonl", {"text": f"{passage}\n{other_texts[1]}"})
    text = '[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nheldout = "b.jsonl"\nsequence = 512\n'
    train_set, heldout = data.datasets(config_file.parse(text, folder=tmp_path, location="c.toml"), tokenizer)
    assert heldout is not None
    assert heldout.shared == pytest.approx(8 / 22)
    (note,) = data.overlap(train_set, heldout)
    assert note.startswith("36% of the runs of 8 words in the held-out texts are in the training data too: its perplexity")
    write(tmp_path / "b.jsonl", {"prompt": passage, "completion": other_texts[1]})
    _, heldout = data.datasets(config_file.parse(text, folder=tmp_path, location="c.toml"), tokenizer)
    assert heldout is not None
    assert heldout.shared == 0


def test_without_packing_each_document_has_a_row(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"prompt": "p", "completion": "c"}, {"text": "x" * 40})
    dataset = load(path, tokenizer, pack_rows=False)
    assert dataset.rows.ids.shape == (3, 32)
    assert sorted(lengths(dataset.rows.labels).tolist()) == [2, 3, 31]
    assert dataset.truncated == 1


MIXED = [
    {"messages": say(("user", "hi"), ("assistant", "ho"))},
    {"messages": [*say(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}]},
]


def test_parquet_means_the_same_as_json_lines(tmp_path: Path, tokenizer: object) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(MIXED), tmp_path / "a.parquet")
    source = document_files.read(tmp_path / "a.parquet")
    assert [document.record for document in source.documents] == MIXED  # no key that only another row has
    ours, lines = (
        load(tmp_path / "a.parquet", tokenizer, sequence=64),
        load(write(tmp_path / "a.jsonl", *MIXED), tokenizer, sequence=64),
    )
    assert (ours.rows.ids == lines.rows.ids).all()
    assert ours.digests.tolist() == lines.digests.tolist()
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(FormatError, match="not a Parquet file"):
        load(tmp_path / "b.parquet", tokenizer)


def test_a_folder_saved_by_datasets_means_the_same_as_json_lines(tmp_path: Path, tokenizer: object) -> None:
    need_module("datasets")
    import datasets

    saved = datasets.Dataset(datasets.table.InMemoryTable.from_pylist(MIXED), fingerprint="mixed")
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "splits")
    expected = load(write(tmp_path / "a.jsonl", *MIXED), tokenizer, sequence=64)
    for folder in ("saved", "splits/train"):
        assert load(tmp_path / folder, tokenizer, sequence=64).digests.tolist() == expected.digests.tolist()
    with pytest.raises(RefusedError, match="contains several splits. Use one of its folders: train"):
        load(tmp_path / "splits", tokenizer)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(FormatError, match="a folder without data: no .json, .jsonl"):
        load(tmp_path, tokenizer)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../a"}]}')
    with pytest.raises(FormatError, match="names files outside its folder"):
        load(tmp_path, tokenizer)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"a\.parquet: needs the package pyarrow, which is not installed"):
        load(tmp_path / "a.parquet", tokenizer)


def test_the_mean_context_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example(np.arange(40), np.ones(40, bool), joint=False)
    packed = pack(collect([(example, bytes(8))], set()), 16)
    first = packed.mean_context
    monkeypatch.delattr(type(packed), "take")  # which fills rows
    assert packed.mean_context == first == (16**2 * 2 + 8**2) / 40
