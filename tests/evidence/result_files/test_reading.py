"""Result files that the tools themselves wrote are read as they are; hostile ones are an error in a line.

The fixtures are of lm_eval 0.4.13, promptfoo 0.121.20 and inspect_ai 0.3.285, run against a gateway with a tiny model, without
their transcripts and what they tell of the machine.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from adapterhub.evidence.result_files import bounded_files, reading
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RefusedError

FIXTURES = Path(__file__).parent / "fixtures"
VERSION = "team/a0@sha256:d730eb7a0b9153110e147d7749810d9d5b7a7df136d27db96c36685e9ac5735f"
LM_EVAL = FIXTURES / "results_2026-12-01T06-29-52.450303.json"


def test_lm_eval_has_metrics_with_errors_the_samples_beside_it_and_the_model_that_was_asked() -> None:
    [result] = reading.read(LM_EVAL)
    assert (result.tool, result.tool_version, result.task) == ("lm-evaluation-harness", "0.4.13", "tiny_gen")
    assert result.metrics == {"exact_match": 0.0, "exact_match_stderr": 0.0, "samples": 3.0}
    assert result.cases == {"doc-0": 0.0, "doc-1": 0.0, "doc-2": 0.0}
    assert (result.answered_by, result.data_digest[:7]) == (frozenset({VERSION}), "sha256:")
    assert reading.read(LM_EVAL.with_name("samples_tiny_gen_2026-12-01T06-29-52.450303.jsonl")) == [result]


def test_promptfoo_has_the_version_that_answered_each_test() -> None:
    [result] = reading.read(FIXTURES / "promptfoo.json")
    assert (result.tool, result.tool_version, result.task) == ("promptfoo", "0.121.20", "golden")
    assert result.metrics == {"pass_rate": 0.5, "passed": 1.0, "samples": 2.0, "errors": 0.0}
    assert (result.cases, result.answered_by) == ({"not empty": 1.0, "test-1": 0.0}, frozenset({VERSION}))


@pytest.mark.parametrize("name", ["inspect_ai.json", "inspect_ai.eval"])
def test_inspect_ai_has_the_version_of_each_sample_in_both_forms(name: str) -> None:
    [result] = reading.read(FIXTURES / name)
    assert (result.tool, result.tool_version, result.task) == ("inspect_ai", "0.3.285", "tiny")
    assert result.metrics == {"accuracy": 0.0, "stderr": 0.0, "samples": 2.0}
    assert (result.cases, result.answered_by) == ({"one": 0.0, "two": 0.0}, frozenset({VERSION}))
    assert result.data_digest == reading.read(FIXTURES / "inspect_ai.json")[0].data_digest


def test_junit_counts_what_was_run_and_names_the_version_by_a_property(tmp_path: Path) -> None:
    (tmp_path / "j.xml").write_text(
        '<testsuites><testsuite name="SQL suite">'
        f'<properties><property name="adapterhub.version" value="{VERSION}"/></properties>'
        '<testcase classname="a" name="b"/><testcase name="c"><failure message="x"/></testcase>'
        '<testcase name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    [result] = reading.read(tmp_path / "j.xml")
    assert (result.task, result.answered_by, result.cases) == ("sql-suite", frozenset({VERSION}), {"a.b": 1.0, "c": 0.0})
    assert result.metrics == {"pass_rate": 0.5, "passed": 1.0, "samples": 2.0, "errors": 0.0}


_NAMED = f'<properties><property name="adapterhub.version" value="{VERSION}"/></properties>'


@pytest.mark.parametrize(
    ("xml", "answered_by"),
    [
        (f'<testsuite><testcase name="a"/>{_NAMED}</testsuite>', {VERSION}),
        (f'<testsuites>{_NAMED}<testsuite><testcase name="a"/></testsuite></testsuites>', {VERSION}),
        (f'<testsuite><testcase name="a">{_NAMED}</testcase></testsuite>', {VERSION}),
        (
            f'<a><testsuite>{_NAMED}<testcase name="a"/></testsuite><testsuite><testcase name="b"/></testsuite></a>',
            {VERSION, "an unnamed version"},
        ),
        (
            f'<testsuite><testcase name="a">{_NAMED}</testcase><testcase name="b"/></testsuite>',
            {VERSION, "an unnamed version"},
        ),
        ('<testsuite><testcase name="a"/></testsuite>', {"an unnamed version"}),
    ],
)
def test_a_property_of_junit_is_about_the_cases_of_its_suite_and_no_others(
    tmp_path: Path, xml: str, answered_by: set[str]
) -> None:
    (tmp_path / "j.xml").write_text(xml)
    assert reading.read(tmp_path / "j.xml")[0].answered_by == answered_by


def test_a_case_of_junit_that_failed_does_not_count_as_skipped(tmp_path: Path) -> None:
    (tmp_path / "j.xml").write_text(
        '<testsuite><testcase name="a"><failure/><skipped/></testcase><testcase name="b"/><error/></testsuite>'
    )
    assert reading.read(tmp_path / "j.xml")[0].cases == {"a": 0.0, "b": 1.0}


def test_lm_eval_of_earlier_versions_has_its_arguments_in_a_line_and_headings_among_its_tasks(tmp_path: Path) -> None:
    document = {
        "lm_eval_version": "0.4.8",
        "results": {"group": {" ": " ", "alias": "group"}, "task": {"alias": " - task", "acc,none": 0.5}},
        "config": {"model": "hf", "model_args": "pretrained=./base,peft=./sql,dtype=bfloat16"},
        "model_name": "./sql",
    }
    (tmp_path / "results_.json").write_text(json.dumps(document))
    [result] = reading.read(tmp_path / "results_.json")
    assert (result.task, result.adapter_path, result.answered_by) == ("task", "./sql", frozenset())


def test_a_run_that_failed_is_refused(tmp_path: Path) -> None:
    log = json.loads((FIXTURES / "inspect_ai.json").read_text()) | {"status": "error"}
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(RefusedError, match="is of a run that ended as 'error'"):
        reading.read(tmp_path / "log.json")


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{}", "is not a result file of lm-evaluation-harness, promptfoo, inspect_ai, JUnit"),
        ('{"evalId": "x"}'.encode("utf-16"), "not UTF-8 text"),
        (b"\xef\xbb\xbf{}", "it starts with a byte order mark"),
        (b'{"evalId": 1, "results": {"results": []}}', "has no results"),
        (b'{"evalId": 1, "results": []}', "has no results"),
        (b'{"lm_eval_version": "1", "results": {"t": {"acc,none": "N/A"}}}', "has no metric"),
        (
            b'{"lm_eval_version": "1", "results": {"t": {"a b,none": 1, "a-b,none": 2}}}',
            "two metrics would have the name 'a-b'",
        ),
        (b'{"lm_eval_version": 1, "results": 7}', "has no results of a task"),
        (b'{"eval": {}, "status": "success", "results": {"scores": [1]}}', "has no metric"),
        (b"[" * 100_000, "not valid JSON"),
        (b"<testsuite/>", "has no test case that was run"),
        (b"<testsuite>", "not valid XML"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><testsuite><testcase name="&b;"/></testsuite>', "has a document type"),
        *(
            (f'<?xml version="1.0" encoding="{name}"?><a/>'.encode(), "not valid XML")
            for name in ("gbk", "x", "rot13", "utf-16")
        ),
        (b"<a>" * 100, "nested more than 32 deep"),
        (b"PK\x03\x04 no archive", "not a readable zip archive"),
    ],
)
def test_a_malformed_file_is_an_error_in_a_line(tmp_path: Path, raw: bytes, problem: str) -> None:
    (tmp_path / "r.json").write_bytes(raw)
    with pytest.raises(FormatError) as error:
        reading.read(tmp_path / "r.json")
    assert problem in error.value.what
    assert error.value.code in ("malformed-results", "malformed")
    assert "\n" not in str(error.value)


def test_a_name_of_a_task_leads_to_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "samples_x").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"doc_hash": "x", "metrics": ["acc"], "acc": 1, "doc_id": "secret"}\n')
    tasks = [f"{name}/../../secret" for name in ("x", "y\0", "z" * 300)]
    document = {"lm_eval_version": "1", "results": {task: {"acc,none": 1} for task in tasks}}
    (tmp_path / "results_.json").write_text(json.dumps(document))
    results = reading.read(tmp_path / "results_.json")
    assert [(result.cases, result.data_digest) for result in results] == [({}, "")] * 3


def test_a_file_of_a_gigabyte_or_an_archive_that_grows_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(FormatError, match="has 1,024 MB, and at most 64 MB are read") as error:
        reading.read(tmp_path / "r.json")
    assert error.value.code == "too-large"
    monkeypatch.setattr(bounded_files, "MAX_DOCUMENT", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", b" " * (2 << 20))
    with pytest.raises(FormatError, match="unpacks to more than 1 MB"):
        reading.read(tmp_path / "bomb.eval")
    monkeypatch.setattr(bounded_files, "MAX_DOCUMENT", 1000)
    with pytest.raises(FormatError, match="unpacks to more than 0 MB"):
        reading.read(FIXTURES / "inspect_ai.eval")


def test_every_cut_and_changed_byte_of_an_archive_is_an_error_or_the_same_result(tmp_path: Path) -> None:
    raw = (FIXTURES / "inspect_ai.eval").read_bytes()
    right = reading.read(FIXTURES / "inspect_ai.eval")
    for position in range(0, len(raw), 97):
        for changed in (raw[:position], raw[:position] + bytes([raw[position] ^ 0xFF]) + raw[position + 1 :]):
            (tmp_path / "r.eval").write_bytes(changed)
            with contextlib.suppress(AdapterhubError):
                assert reading.read(tmp_path / "r.eval") == right


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        reading.read(tmp_path / "r.json")


def test_fields_of_any_type_are_no_crash(tmp_path: Path) -> None:
    values: list[Any] = [None, True, 1, 1.5, "x", [], [[]], [{}], {}, {"a": {}}]
    for name in ("promptfoo.json", "inspect_ai.json", LM_EVAL.name):
        document = json.loads((FIXTURES / name).read_text())
        for key in [*document, *(f"results.{inner}" for inner in document.get("results", {}))]:
            for value in values:
                outer, _, inner = key.partition(".")
                changed = document | {outer: document[outer] | {inner: value} if inner else value}
                (tmp_path / "r.json").write_text(json.dumps(changed))
                with contextlib.suppress(AdapterhubError):
                    reading.read(tmp_path / "r.json")
