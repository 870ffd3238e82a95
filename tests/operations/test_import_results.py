"""A result of another tool counts for the version that it names by digest: in the log, gates and policies, and signed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run, need_module
from tests.evidence.result_files.test_reading import FIXTURES, LM_EVAL, VERSION
from tests.support.adapters import Make


@pytest.fixture
def digest(run: Run, make: Make, tmp_path: Path) -> str:
    """The digest of the version of a registry in the working folder, made of the folder `sql`."""
    run("init")
    return str(json.loads(run("push", make("sql", 1), "team/sql", "--json").stdout)["digest"])


@pytest.fixture
def results(digest: str, tmp_path: Path) -> Callable[..., Path]:
    """Write a fixture about the version, or with another text in place of who answered."""

    def write(fixture: Path, answered_by: str = "", *, count: int = -1) -> Path:
        path = tmp_path / fixture.name
        path.write_text(fixture.read_text().replace(VERSION, answered_by or f"team/sql@{digest}", count))
        return path

    return write


def test_results_are_recorded_shown_searched_and_in_a_policy(
    run: Run, results: Callable[..., Path], digest: str, tmp_path: Path
) -> None:
    words = ("eval", "team/sql", "--import", results(LM_EVAL), "--import", results(FIXTURES / "promptfoo.json"))
    document = json.loads(run(*words, "--gate", "golden_pass_rate>=0.5", "--json").stdout)
    lm_eval, promptfoo = document["evaluations"]
    assert (document["digest"], document["recorded"], document["ok"]) == (digest, "team/sql:v1", True)
    assert (lm_eval["name"], lm_eval["metrics"]["samples"]) == ("tiny_gen", 3.0)
    assert lm_eval["base"] == {"tool": "lm-evaluation-harness", "version": "0.4.13", "file": LM_EVAL.name}
    assert promptfoo["cases"] == {"not empty": 1.0, "test-1": 0.0}
    evaluations = json.loads(run("show", "team/sql", "--json").stdout)["evaluations"]
    assert [item["name"] for item in evaluations] == ["golden", "tiny_gen"]
    assert json.loads(run("search", "--metric", "golden_pass_rate>0.4", "--json").stdout)["total"] == 1
    failed = run("eval", "team/sql", "--import", results(FIXTURES / "promptfoo.json"), "--gate", "pass_rate>0.5", code=1).stdout
    assert "golden  pass_rate    0.5  promptfoo 0.121.20" in failed
    assert "FAILED: pass_rate>0.5 (0.5)" in failed
    (tmp_path / "adapterhub.toml").write_text("[policy.metrics]\ngolden_pass_rate = { min = 0.6 }\n")
    assert "golden_pass_rate: 0.5 is below 0.6" in run("pull", "team/sql", "-o", "out", code=6).stderr


@pytest.mark.parametrize(
    ("answered_by", "trust", "problem"),
    [
        ("team/sql:prod", False, "is about 'team/sql:prod', and not by its digest about sha256:"),
        ("team/sql@sha256:" + "0" * 64, False, "and not by its digest about sha256:"),
        ("team/sql@sha256:" + "0" * 64, True, "Name the version that was evaluated"),
        ("team/sql:prod", True, ""),
    ],
)
@pytest.mark.parametrize("name", ["promptfoo.json", "inspect_ai.json", LM_EVAL.name])
def test_a_result_of_another_version_is_refused_and_one_of_a_name_needs_trust(
    run: Run, results: Callable[..., Path], answered_by: str, trust: bool, problem: str, name: str
) -> None:
    path = results(FIXTURES / name, answered_by)
    result = run("eval", "team/sql", "--import", path, *["--trust-name"] * trust, "--json", code=6 if problem else 0)
    if problem:
        assert problem in result.stderr
        assert ("--trust-name" in result.stderr) == ("@" not in answered_by)
        code = "unnamed-version" if "@" not in answered_by else "other-version"
        assert f"[{code}]" in result.stderr
        assert json.loads(run("show", "team/sql", "--json").stdout)["evaluations"] == []
    else:
        assert json.loads(result.stdout)["evaluations"][0]["base"]["trusted_name"] == "team/sql:prod"


def test_junit_counts_by_its_property_and_needs_trust_without_one(run: Run, digest: str, tmp_path: Path) -> None:
    words = ("eval", "team/sql", "--import", "j.xml", "--gate", "pass_rate>=1")
    named = '<properties><property name="adapterhub.version" value="team/sql@{}"/></properties>'
    for properties, code in (
        (named.format(digest), ""),
        (named.format("sha256:" + "0" * 64), "other-version"),
        ("", "unnamed-version"),
    ):
        (tmp_path / "j.xml").write_text(f'<testsuite name="sql">{properties}<testcase name="a"/></testsuite>')
        assert f"[{code}]" in f"{run(*words, code=6 if code else 0).stderr}[]"
    run(*words, "--trust-name")
    assert len(json.loads(run("show", "team/sql", "--json").stdout)["evaluations"]) == 1


def test_answers_of_two_versions_are_no_result(run: Run, results: Callable[..., Path]) -> None:
    path = results(FIXTURES / "promptfoo.json", "team/sql@sha256:" + "0" * 64, count=2)
    result = run("eval", "team/sql", "--import", path, "--trust-name", code=6)
    assert "has answers of 2 models" in result.stderr


def test_a_folder_that_the_tool_loaded_itself_counts_by_its_digest(run: Run, make: Make, digest: str, tmp_path: Path) -> None:
    document = json.loads(LM_EVAL.read_text())
    for folder, code in ((make("sql", 1), 0), (make("other", 2), 6)):
        document["config"]["model_args"] = {"pretrained": "base", "peft": str(folder)}
        (tmp_path / "results_1.json").write_text(json.dumps(document | {"model_name": "base"}))
        result = run("eval", "team/sql", "--import", "results_1.json", "--trust-name", code=code)
        assert ("is about the adapter in" in result.stderr) == bool(code)


def test_a_folder_that_was_changed_after_the_tool_began_needs_trust(run: Run, make: Make, digest: str, tmp_path: Path) -> None:
    document = json.loads(LM_EVAL.read_text())
    folder = make("sql", 1)
    document["config"]["model_args"] = f"pretrained=base,peft={folder}"
    words = ("eval", "team/sql", "--import", "results_1.json")
    for began, code in ((time.time() + 60, 0), ((folder / "adapter_config.json").stat().st_mtime - 60, 6)):
        (tmp_path / "results_1.json").write_text(json.dumps(document | {"date": began}))
        result = run(*words, code=code)
        assert ("whose files were changed after the tool began" in result.stderr) == bool(code)
    assert json.loads(run(*words, "--trust-name", "--json").stdout)["evaluations"][0]["base"]["trusted_name"] == str(folder)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("./sql", "--import", "r.json"), "is not a version of the registry"),
        (("team/sql", "--import", "r.json", "--tests", "t.jsonl"), "exactly one of them is required"),
        (("team/sql", "--import", "r.json", "--base", "b"), "--base: is not for --import"),
        (("team/sql", "--import", "r.json", "--gate", "bleu>1"), "bleu was not measured. Bound one of"),
        (("team/sql", "--import", "r.json", "--import", "r.json"), "has the task 'golden', as another file has"),
        (("team/sql", "--import", "r.json", "--import", "r.json", "--name", "x"), "is one, and the files have 2 tasks"),
    ],
)
def test_what_cannot_be_imported_is_a_line(
    run: Run, results: Callable[..., Path], tmp_path: Path, words: tuple[str, ...], problem: str
) -> None:
    results(FIXTURES / "promptfoo.json").rename(tmp_path / "r.json")
    result = run("eval", *words, code=2)
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_signed_result_is_a_test_result_that_a_policy_can_require(
    run: Run, results: Callable[..., Path], digest: str, tmp_path: Path
) -> None:
    need_module("cryptography")
    run("key", "generate", "ci")
    path = results(FIXTURES / "promptfoo.json")
    (tmp_path / "adapterhub.toml").write_text('[policy.attestations."team/*"]\ntests = ["ci.pub"]\n')
    pull = ("pull", "team/sql", "-o", "out")
    assert "tests: has no attestation 'tests'" in run(*pull, code=6).stderr
    words = ("eval", "team/sql", "--import", path, "--key", "ci.key", "--json")
    run(*words, "--gate", "pass_rate>0.5", code=1)
    assert "attests tests that did not pass" in run(*pull, code=6).stderr
    [signed] = json.loads(run(*words, "--gate", "pass_rate>=0.5").stdout)["attestations"]
    assert (signed["kind"], signed["type"]) == ("tests", "https://in-toto.io/attestation/test-result/v0.1")
    predicate = signed["predicate"]
    assert (predicate["result"], predicate["passedTests"], predicate["failedTests"]) == ("PASSED", ["not empty"], ["test-1"])
    assert predicate["configuration"][0].keys() == {"name", "digest"}
    run(*pull)
    verified = run("verify", "team/sql", "--attestations", "--recompute", "--key", "ci.pub").stdout
    assert "tests: what the signer measured, which cannot be computed again" in verified
    assert "tests attested by ci.pub\n" in verified
    assert "one of them is required" in run(*words, "--keyless", code=2).stderr
