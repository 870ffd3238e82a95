"""Documents of files as people have them: shapes told by their keys, tables, folders, and all errors at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.training.data import document_files, record_shapes
from adapterhub_converters.errors import FormatError, RefusedError, UsageError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ASKED = {"instruction": "q", "output": "a"}
HUMAN = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CALL = {"name": "add", "arguments": {"x": 1}}
CHOSEN = "preference pairs without their rejected sides"


@pytest.mark.parametrize(
    ("record", "shape", "form"),
    [
        ({"text": "t", "id": 3}, "text", {"text": "t", "id": 3}),
        ({"messages": [Q, A], "text": "t"}, "conversations", {"messages": [Q, A], "text": "t"}),
        ({"messages": HUMAN}, "conversations", {"messages": [Q, A]}),
        ({"messages": json.dumps([Q, A])}, "conversations", {"messages": [Q, A]}),
        ({"prompt": "q", "completion": "a"}, "prompts with completions", {"prompt": "q", "completion": "a"}),
        ({"instruction": "q", "input": "i", "output": "a", "text": "t"}, "Alpaca", {**ASKED, "input": "i"}),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, "Alpaca", {**ASKED, "system": "s"}),
        ({"instruction": "q", "context": "i", "response": "a", "category": "c"}, "Dolly", {**ASKED, "input": "i"}),
        ({"conversations": HUMAN, "id": "1"}, "ShareGPT", {"messages": [Q, A]}),
        (
            {"conversations": HUMAN, "system": "s", "tools": []},
            "ShareGPT",
            {"messages": [{"role": "system", "content": "s"}, Q, A], "tools": []},
        ),
        ({"messages": [{"role": "user", "value": "q"}, {"role": "gpt", "value": "a"}]}, "conversations", {"messages": [Q, A]}),
        (
            {"conversations": [{"from": "prompter", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}]},
            "ShareGPT",
            {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}]},
        ),
        (
            {"conversations": [{"from": "tool_call", "value": [CALL, CALL]}, {"from": "tool_response", "value": "3"}]},
            "ShareGPT",
            {
                "messages": [
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}] * 2},
                    {"role": "tool", "content": "3"},
                ]
            },
        ),
        ({"question": "q", "answer": "a"}, "questions with answers", ASKED),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "questions with answers", {**ASKED, "system": "s"}),
        ({"query": "q", "response": "a"}, "questions with answers", ASKED),
        ({"prompt": "q", "response": "a"}, "questions with answers", ASKED),
        ({"input": "q", "output": "a"}, "questions with answers", ASKED),
        ({"chosen": "c", "rejected": "r"}, CHOSEN, {"text": "c"}),
        ({"prompt": "q", "chosen": "a", "rejected": "r"}, CHOSEN, {"prompt": "q", "completion": "a"}),
        ({"question": "q", "chosen": "a", "rejected": "r"}, CHOSEN, ASKED),
        ({"chosen": [Q, A], "rejected": [Q, Q]}, CHOSEN, {"messages": [Q, A]}),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, Q]}, CHOSEN, {"messages": [Q, A]}),
        ({"prompt": "q", "chosen": [A], "rejected": [Q]}, CHOSEN, {"prompt": [Q], "completion": [A]}),
        ({"conversations": HUMAN[:1], "chosen": HUMAN[1], "rejected": HUMAN[1]}, CHOSEN, {"prompt": [Q], "completion": [A]}),
    ],
)
def test_the_keys_of_a_record_determine_its_shape(record: dict[str, Any], shape: str, form: dict[str, Any]) -> None:
    assert record_shapes.canonical(record, "") == (shape, form)


def test_columns_name_what_no_key_determines() -> None:
    record = {"body": "q", "reply": "a", "text": "t"}
    assert record_shapes.canonical(record, "", {"prompt": "body", "completion": "reply"})[1] == {
        "prompt": "q",
        "completion": "a",
    }
    assert record_shapes.canonical(record, "", {"instruction": "body", "input": "none", "output": "reply"})[1] == ASKED
    with pytest.raises(
        FormatError, match=r'has no "boddy", which \[data\] columns names. It has "body", "reply", "text"'
    ) as caught:
        record_shapes.canonical(record, "", {"text": "boddy"})
    assert caught.value.code == "unknown-columns"
    with pytest.raises(UsageError, match="'promt' has no known meaning. The known names are messages, prompt, completion"):
        record_shapes.check_columns({"promt": "body"}, "c.toml")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"id": 1}, 'its keys have no known meaning: "id"'),
        ({}, "it has no keys"),
        ({"instruction": "q", "output": 3}, '"output" is not text'),
        ({"prompt": "q", "completion": [A]}, '"prompt" and "completion" are neither both text nor both lists of messages'),
        ({"messages": "hello"}, '"messages" is text, and not JSON'),
        ({"conversations": {}}, '"conversations" is not a list of messages'),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "'alien' is not a known speaker. Those are assistant, bard"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, 'a call is not JSON with a "name" and "arguments"'),
        ({"prompt": "q", "completion": "a", "label": False}, '"label" tells good answers from bad ones'),
        ({"question": "q", "answer": "a", "label": "True"}, '"label" tells good answers from bad ones'),
    ],
)
def test_an_invalid_record_is_refused(record: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError) as caught:
        record_shapes.canonical(record, "a.jsonl:1")
    assert f"a.jsonl:1: {says}" in str(caught.value)


def records(path: Path, **options: Any) -> list[Any]:
    return [document.record for document in document_files.read(path, document_files.Options(**options)).documents]


def test_unpaired_preferences_are_refused_once_with_what_to_do(tmp_path: Path) -> None:
    """In the form of trl's KTO, and where pairs are wanted; a config that names its columns trains on all of them."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "completion": "a", "label": good}) + "\n" for good in (True, False)))
    for pairs in (False, True):
        with pytest.raises(record_shapes.UnpairedError) as caught:
            document_files.read(path, document_files.Options(pairs=pairs))
        assert (caught.value.where, caught.value.code, caught.value.problems) == (str(path), "unpaired-preferences", ())
        assert 'Keep the examples whose "label" is true and remove the key, or make pairs with "chosen"' in caught.value.hint
    columns = {"prompt": "prompt", "completion": "completion"}
    assert records(path, columns=columns) == [{"prompt": "q", "completion": "a"}] * 2
    path.write_text(json.dumps({"text": "t", "label": True}))  # a class of the text, as of any data for classification
    assert len(records(path)) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_ratings_that_are_not_used_and_empty_answers_are_notes(tmp_path: Path, name: str) -> None:
    lines = [
        {"instruction": "q", "output": " ", "score": 0.5}, {"prompt": "q", "completion": "a", "rating": 5},
        {"prompt": "q", "completion": ""}, {"messages": [Q, {**A, "content": ""}], "score": "high"}, {"messages": [Q, A]},
        {"messages": [Q, {**A, "content": "", "weight": 0}, A]},
        {"messages": [Q, {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}]},
    ]  # fmt: skip
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = document_files.read(tmp_path / name)
    rated = "which is not used: if it rates the answers, the bad ones are learned like the good ones"
    expected = [
        f'{name}: 1 of 7 examples have "score", {rated}',
        f"{name}: 3 of 7 examples have an empty answer, which is learned as its end mark alone",
        f'{name}: 1 of 7 examples have "rating", {rated}',
    ]
    assert file.notes[1:] == file.remark_notes == expected
    assert file.part(lambda document: "output" in document.record).remark_notes == [
        f'{name}: 1 of 1 examples have "score", {rated}',
        f"{name}: 1 of 1 examples have an empty answer, which is learned as its end mark alone",
    ]
    (tmp_path / name).write_text(json.dumps({"prompt": "q", "chosen": "", "rejected": "r"}) + "\n")
    [note] = document_files.read(tmp_path / name, document_files.Options(pairs=True)).notes
    assert note == f"{name}: 1 of 1 examples have an empty answer, which is learned as its end mark alone"


def test_what_a_file_is_understood_as_is_one_note(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{**ASKED, "input": ""}] * 1200))
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "c", "rejected": "r"}\n{"text": "t"}\n{"text": "u"}\n')
    (tmp_path / "plain.jsonl").write_text('{"text": "t"}\n')
    notes = [document_files.read(tmp_path / name).notes for name in ("data.json", "pairs.jsonl", "plain.jsonl")]
    assert notes == [
        ["data.json: Alpaca, 1,200 examples"],
        ["pairs.jsonl: 2 text, 1 preference pairs without their rejected sides"],
        [],
    ]


def test_all_lines_that_are_wrong_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{\n\n{"text": 3}\n[1]\n{"body": "x"}\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(FormatError) as caught:
        document_files.read(path)
    assert [line.removeprefix(str(tmp_path))[:32] for line in caught.value.problems] == [
        "/a.jsonl:2: not valid JSON (Expe", '/a.jsonl:4: "text" is not text', "/a.jsonl:5: not a JSON object",
        "/a.jsonl:6: its keys have no kno", '/a.jsonl:7: a message needs "rol',
    ]  # fmt: skip
    assert str(caught.value).endswith("(and 4 more)")
    path.write_text('{"text": "x"}\n' + "{\n" * 1000)
    with pytest.raises(FormatError) as caught:
        document_files.read(path)
    assert (len(caught.value.problems), caught.value.problems[-1]) == (21, "980 more lines like them")


def test_columns_that_have_other_names_are_one_problem_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body\n" + "x,y\n" * 50)
    with pytest.raises(
        FormatError, match=r'a.csv: its keys have no known meaning: "title", "body". Say what they are'
    ) as caught:
        document_files.read(tmp_path / "a.csv")
    assert caught.value.problems == ()
    assert records(tmp_path / "a.csv", columns={"prompt": "title", "completion": "body"})[0] == {
        "prompt": "x",
        "completion": "y",
    }


def test_a_table_is_read_under_the_names_of_its_columns(tmp_path: Path) -> None:
    rows = [["question", "answer"], ["q", "a"], ['say "hi",\nthen go', "x" * 200_000]]
    quoted = "\r\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + quoted.encode())
    (tmp_path / "a.tsv").write_text("instruction\toutput\nq\ta\n")
    assert records(tmp_path / "a.csv") == [ASKED, {"instruction": 'say "hi",\nthen go', "output": "x" * 200_000}]
    assert records(tmp_path / "a.tsv") == [ASKED]
    assert [document.location for document in document_files.read(tmp_path / "a.csv").documents] == [
        f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"text,id\nx,1,2\ny\nz,1\n", (":2: 3 cells, but there are 2 columns", ":3: 1 cells, but there are 2 columns")),
        (b'text,id\nx,1,2\n"y\n', (":2: 3 cells, but there are 2 columns", ":3: not a table (unexpected end of data)")),
        (b"text,text\nx,y\n", (":1: two columns have one name",)),
        (b"text\nx\n\xff\n", (":3: not UTF-8 text. Export it as UTF-8",)),
    ],
)
def test_an_invalid_table_is_refused(tmp_path: Path, raw: bytes, says: tuple[str, ...]) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        document_files.read(tmp_path / "a.csv")
    lines = caught.value.problems or (str(caught.value),)
    assert tuple(line.removeprefix(f"{tmp_path}/a.csv") for line in lines) == says


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"text": "t"}\n' * 2, "a.json": '[{"text": "t"}, {"text": "t"}]', "a.txt": "t\n\nt"}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        file = document_files.read(tmp_path / name, document_files.Options(split_text="paragraphs"))
        assert [document.record for document in file.documents] == [{"text": "t"}] * 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_names_of_the_columns_tell_how_a_csv_is_delimited(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "a.csv").write_text(f'instruction{delimiter}output\n"q"{delimiter}"a, b; c"\n')
    assert records(tmp_path / "a.csv") == [{**ASKED, "output": "a, b; c"}]
    (tmp_path / "a.csv").write_text('"text"\n"a, b; c"\n')
    assert records(tmp_path / "a.csv") == [{"text": "a, b; c"}]


def test_a_number_that_is_none_counts_as_a_missing_value(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a", "input": NaN, "score": Infinity}\n')
    assert records(tmp_path / "a.jsonl") == [ASKED]
    (tmp_path / "a.json").write_text('[{"instruction": "q", "output": NaN}]')
    with pytest.raises(FormatError, match="its keys have no known meaning"):
        document_files.read(tmp_path / "a.json")


def test_one_json_document_may_have_its_examples_under_a_key(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ({"version": 1, "data": [ASKED]}, [ASKED], ASKED):
        for indent in (None, 2):
            path.write_text(json.dumps(text, indent=indent))
            assert records(path) == [ASKED]
    path.write_text("[1")
    with pytest.raises(FormatError, match="not valid JSON"):
        document_files.read(path)


def test_plain_text_is_one_document_or_its_paragraphs_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \n\nthree\n")
    assert records(path) == [{"text": "one\ntwo\n\n \n\nthree\n"}]
    assert records(path, split_text="paragraphs") == [{"text": "one\ntwo"}, {"text": "three"}]
    assert records(path, split_text="lines") == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    split = document_files.read(path, document_files.Options(split_text="paragraphs")).documents
    assert [document.location for document in split] == [f"{path}:1", f"{path}:6"]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"text": str(number)}))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert records(tmp_path) == [{"text": "1"}, {"text": "2"}]
    before = document_files.read(tmp_path)
    assert before.size == sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    (tmp_path / "part-1.jsonl").write_text(json.dumps({"text": "3"}))
    assert document_files.read(tmp_path).digest != before.digest


def test_a_data_set_as_the_hub_lays_it_out_is_its_data_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    from pyarrow import parquet

    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("about")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "t"}]), tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    assert records(tmp_path / "set") == records(tmp_path / "set" / "data") == [{"text": "t"}]
    assert document_files.read(tmp_path / "set").digest == document_files.read(tmp_path / "set" / "data").digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data").symlink_to(tmp_path / "set" / "data")
    with pytest.raises(FormatError, match="a folder without data"):
        document_files.read(tmp_path / "other")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a.jsonl", "b.csv"), "contains files of several kinds: .csv, .jsonl. Name the files to use"),
        (("train-00000.jsonl", "test-00000.jsonl"), "contains several splits: test, train. Name the files to use"),
    ],
)
def test_a_folder_that_means_two_things(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(RefusedError) as caught:
        document_files.read(tmp_path)
    assert says in str(caught.value)


def test_a_folder_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"text": "secret"}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match="a link, which is not followed"):
        document_files.read(tmp_path / "data")
    (tmp_path / "own.jsonl").symlink_to(tmp_path / "secret")
    assert records(tmp_path / "own.jsonl") == [{"text": "secret"}]  # the user's own path


def test_tables_of_arrow_are_read_in_each_form(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"q": "q", "a": "a", "n": 1}] * 3)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert records(tmp_path / name, columns={"question": "q", "answer": "a"}) == [ASKED] * 3
    with pytest.raises(FormatError, match=r'a.parquet: its keys have no known meaning: "q", "a", "n"'):
        document_files.read(tmp_path / "a.parquet")
    (tmp_path / "d.arrow").write_bytes(b"ARROW1" + bytes(40))
    with pytest.raises(FormatError, match="not an Arrow file"):
        document_files.read(tmp_path / "d.arrow")
