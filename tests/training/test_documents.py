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
    ],
)
def test_an_invalid_record_is_refused(record: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError) as caught:
        record_shapes.canonical(record, "a.jsonl:1")
    assert f"a.jsonl:1: {says}" in str(caught.value)


def records(path: Path, **options: Any) -> list[Any]:
    return [document.record for document in document_files.read(path, document_files.Options(**options)).documents]


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
    path.write_text('{"text": "x"}\n{\n\n{"text": 3}\n[1]\n{"body": "x"}\n')
    with pytest.raises(FormatError) as caught:
        document_files.read(path)
    assert [line.removeprefix(str(tmp_path))[:32] for line in caught.value.problems] == [
        "/a.jsonl:2: not valid JSON (Expe", '/a.jsonl:4: "text" is not text', "/a.jsonl:5: not a JSON object",
        "/a.jsonl:6: its keys have no kno",
    ]  # fmt: skip
    assert str(caught.value).endswith("(and 3 more)")
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
