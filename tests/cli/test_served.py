"""`served`: what it says of an answer, and of none."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.serve.usage.answer_log import AnswerRecord, Feedback
from adapterhub.serve.usage.record_place import FILE
from adapterhub.serve.usage.usage_database import UsageDatabase
from tests.conftest import Run
from tests.support.adapters import Make

VERSION = f"team/sql@sha256:{'5' * 64}"
ANSWER = AnswerRecord(
    "req-1", "cmpl-1", 0.0, "ada", VERSION, "legal", "team/sql:v2", "vllm", "/v1/completions", 200, 0.5, 21, 12
)


def test_it_shows_the_version_the_arm_and_what_people_think(tmp_path: Path, run: Run) -> None:
    Registry.init(tmp_path).close()
    database = UsageDatabase(tmp_path / FILE)
    with database.transaction():
        feedback = Feedback("req-1", "ada", VERSION, "legal", "team/sql:v2", 1.0, 0.0, "dates")
        database.add_answers([ANSWER], [feedback])
    database.close()
    text = run("served", "cmpl-1").stdout
    assert "1970-01-01T00:00:00Z" in text
    assert "team/sql@sha256:555555" in text
    assert "21+12" in text
    [answer] = json.loads(run("served", "req-1", "--json").stdout)["answers"]
    assert (answer["version"], answer["arm"], answer["key"], answer["engine"]) == (VERSION, "team/sql:v2", "ada", "vllm")
    assert answer["feedback"] == {"score": 0.0, "label": "dates", "comment": None}


def test_an_unknown_id_and_a_missing_record_are_not_found(tmp_path: Path, run: Run) -> None:
    Registry.init(tmp_path).close()
    assert "[no-such-answer]" in run("served", "cmpl-1", code=3).stderr
    UsageDatabase(tmp_path / FILE).close()
    assert "[no-such-answer]" in run("served", "cmpl-1", code=3).stderr


def test_show_counts_what_people_think_of_a_version(tmp_path: Path, run: Run, make: Make) -> None:
    with Registry.init(tmp_path) as registry:
        digest = registry.push(make("a1", 1), Ref("team/sql")).digest
    database = UsageDatabase(tmp_path / FILE)
    with database.transaction():
        feedback = [Feedback(f"r{number}", "", f"team/sql@{digest}", "", "", 1.0, number / 2) for number in range(3)]
        database.add_answers([], feedback)
    database.close()
    assert "2 good, 1 bad" in run("show", "team/sql").stdout
    assert json.loads(run("show", "team/sql", "--json").stdout)["feedback"] == {"good": 2, "bad": 1}
