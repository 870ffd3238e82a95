"""`adapterhub scan`: a report without a verdict, percentiles with their number, SARIF, and the exit codes of validate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support import malicious
from tests.support.adapters import Make


@pytest.fixture
def registry(run: Run, make: Make) -> None:
    for name in ("a", "b", "c"):
        run("push", make(name, seed=ord(name)), f"team/{name}")


def test_an_adapter_is_compared_with_the_others_of_its_base_by_number(run: Run, make: Make, registry: None) -> None:
    make("other", seed=9, base_model_name_or_path="org/other")
    run("push", "other", "team/other")
    document = json.loads(run("scan", "team/a", "--json").stdout)
    assert document["weights"]["base"] == "org/base"
    assert document["weights"]["population"] == 2
    assert {row["n"] for row in (*document["weights"]["kinds"], *document["weights"]["modules"])} == {2}
    assert len(document["weights"]["modules"]) == 4
    again = json.loads(run("scan", "team/a", "--json").stdout)  # the numbers of others from the cache
    assert again == document
    run("fsck")


def test_the_report_has_no_verdict(run: Run, make: Make) -> None:
    result = run("scan", make("a"))
    assert "nothing found: no code, no hidden bytes, no misleading text. What the model writes is not checked" in result.stdout
    assert "No other adapter of org/base is in the registry" in result.stdout
    assert "PCT" not in result.stdout  # a column of dashes
    assert "No verdict follows from them." in result.stdout
    for word in ("safe", "clean", "harmless", "trusted", "secure"):
        assert word not in result.stdout.lower()


def test_an_error_exits_1_and_a_warning_only_with_strict(run: Run, make: Make) -> None:
    folder = make("a")
    (folder / "chat_template.jinja").write_text(malicious.SWITCH)
    assert "warning[template-switch]" in run("scan", folder).stdout
    run("scan", folder, "--strict", code=1)
    (folder / "notes.txt").write_bytes(malicious.pickled())
    assert "error[pickle] notes.txt: a pickle that calls" in run("scan", folder, code=1).stdout
    assert "no such file" in run("scan", "absent", code=3).stderr


def test_sarif_has_the_problems(run: Run, make: Make) -> None:
    folder = make("a")
    (folder / "notes.txt").write_bytes(malicious.pickled())
    document = json.loads(run("scan", folder, "--sarif", code=1).stdout)
    assert document["version"] == "2.1.0"
    (result,) = document["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("pickle", "error")
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith("a/notes.txt")


def test_a_folder_that_is_no_adapter_is_scanned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.pkl").write_bytes(malicious.pickled())
    result = run("scan", "x", code=1)
    assert "error[pickle]" in result.stdout
    assert "no numbers of weights" in result.stdout
