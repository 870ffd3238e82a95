"""Golden tests of an adapter: by an engine here as `generate` has it, or by an endpoint, and recorded in the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.operations import golden_tests
from adapterhub.operations.golden_tests import EndpointOptions, Sampling
from adapterhub_converters.errors import UsageError
from tests.conftest import Run, need_module
from tests.support.adapters import Make
from tests.support.chat_server import chat_server, completion

TESTS = [
    {"id": "greets", "prompt": "hi", "contains": "hello"},
    {"id": "counts", "prompt": "count", "regex": "^[0-9]+$"},
]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write_tests(folder: Path, tests: list[dict[str, Any]] | None = None) -> Path:
    path = folder / "golden.jsonl"
    path.write_text("".join(json.dumps(test) + "\n" for test in tests or TESTS))
    return path


def answered(document: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """Greet, and count only with an even seed."""
    text = "hello" if document["messages"][-1]["content"] == "hi" else "12" if document["seed"] % 2 == 0 else "one"
    return 200, {"x-adapterhub-version": document["model"]}, completion(text)


@pytest.fixture
def pushed(run: Run, make: Make, tmp_path: Path) -> str:
    """A version of a registry in the working folder."""
    run("init")
    return str(json.loads(run("push", make("sql", 1), "team/sql", "--json").stdout)["digest"])


def test_an_endpoint_is_asked_by_digest_and_the_rates_are_recorded_shown_and_searched(
    run: Run, pushed: str, tmp_path: Path
) -> None:
    path = write_tests(tmp_path)
    (tmp_path / "golden.xml").write_text("the report of an earlier run")
    with chat_server(answered) as (url, requests):
        words = ("eval", "team/sql", "--tests", path, "--url", url, "--samples", "2", "--temperature", "0.7", "--seed", "4")
        document = json.loads(run(*words, "--junit", "golden.xml", "--json", code=1, env={"ADAPTERHUB_ENGINE_KEY": "k"}).stdout)
        output = run(*words, "--gate", "pass>=0.75").stdout
        failed = run(*words, "--gate", "pass>0.75", code=1).stdout
    assert requests[0][1]["model"] == f"team/sql@{pushed}"
    assert requests[0][0]["authorization"] == "Bearer k"
    assert (document["metrics"], document["cases"]) == (
        {"pass_rate": 0.75, "passed": 1.0, "cases": 2.0, "samples": 4.0}, {"greets": 1.0, "counts": 0.5},
    )  # fmt: skip
    assert (document["ok"], document["recorded"], document["digest"]) == (False, "team/sql:v1", pushed)
    assert document["results"][1]["problem"] == "does not match '^[0-9]+$'"
    assert "counts    1/2  does not match '^[0-9]+$'" in output
    assert "1 of 2 tests passed, 75.0% of the answers right" in output
    assert "passed: pass>=0.75 (0.75)" in output
    assert "FAILED: pass>0.75 (0.75)" in failed
    assert f'value="team/sql@{pushed}"' in (tmp_path / "golden.xml").read_text()
    [evaluation] = json.loads(run("show", "team/sql", "--json").stdout)["evaluations"]
    assert (evaluation["name"], evaluation["cases"]) == ("tests", document["cases"])
    assert json.loads(run("search", "--metric", "tests_pass_rate>0.7", "--json").stdout)["total"] == 1


def test_an_endpoint_that_names_no_digest_needs_trust(run: Run, pushed: str, tmp_path: Path) -> None:
    path = write_tests(tmp_path, TESTS[:1])
    with chat_server(lambda _: (200, {}, completion("hello"))) as (url, requests):
        words = ("eval", "team/sql", "--tests", path, "--url", url, "--served-as", "sql-lora")
        refused = run(*words, code=6).stderr
        trusted = json.loads(run(*words, "--trust-name", "--json").stdout)
    assert "names 'm' as what answered, and not sha256:" in refused
    assert "--trust-name" in refused
    assert (requests[0][1]["model"], trusted["base"]["trusted_name"]) == ("sql-lora", True)


def test_a_program_is_run_by_the_name_that_the_command_line_gives_it(run: Run, pushed: str, tmp_path: Path) -> None:
    path = write_tests(tmp_path, [{"prompt": "hi", "command": "is-hello"}])
    (tmp_path / "check.py").write_text("import sys; sys.exit(sys.stdin.read() != 'hello')")
    with chat_server(answered) as (url, _):
        words = ("eval", "team/sql", "--tests", path, "--url", url)
        assert "Pass --command 'is-hello=PROGRAM ARGUMENT …'" in run(*words, code=2).stderr
        assert "1 of 1 test passed" in run(*words, "--command", "is-hello=python3 check.py").stdout
        assert "names no program" in run(*words, "--command", "is-hello", code=2).stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "exactly one of them is required"),
        (("--tests", "golden.jsonl", "--data", "x.jsonl"), "exactly one of them is required"),
        (("--tests", "golden.jsonl", "--tokens", "4"), "--tokens: is not for --tests"),
        (("--data", "x.jsonl", "--base", "b", "--samples", "4"), "--samples: is not for --data"),
        (("--data", "x.jsonl"), "--base: is required for --data"),
        (("--tests", "golden.jsonl", "--trust-name"), "require --url"),
        (("--tests", "golden.jsonl", "--url", "http://h/v1", "--base", "b"), "answers in place of --base"),
        (("--tests", "golden.jsonl", "--gate", "ppl<3"), "'ppl' is not measured. Choose one of pass"),
        (("--tests", "golden.jsonl", "--name", "A b"), "not a valid name for an evaluation"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run: Run, tmp_path: Path, words: tuple[str, ...], problem: str) -> None:
    write_tests(tmp_path)
    result = run("eval", "./sql", *words, code=2)
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_version_that_is_not_there_is_said_before_anything_is_answered(run: Run, pushed: str, tmp_path: Path) -> None:
    with chat_server(answered) as (url, requests):
        words = ("eval", "team/sql", "--tests", write_tests(tmp_path), "--url", url, "--against", "team/sql:v9")
        assert "team/sql:v9: no such version" in run(*words, code=3).stderr
    assert requests == []


def test_a_test_that_allows_wrong_samples_is_signed_as_passed(run: Run, pushed: str, tmp_path: Path) -> None:
    need_module("cryptography")
    run("key", "generate", "ci")
    path = write_tests(tmp_path, [TESTS[0], TESTS[1] | {"pass_rate": 0.5}, TESTS[1] | {"id": "all"}])
    with chat_server(answered) as (url, _):
        words = ("eval", "team/sql", "--tests", path, "--url", url, "--samples", "2", "--key", "ci.key", "--json")
        [signed] = json.loads(run(*words, code=1).stdout)["attestations"]
    assert signed["predicate"]["passedTests"] == ["greets", "counts"]
    assert signed["predicate"]["failedTests"] == ["all"]


def test_a_folder_has_no_digest_that_an_endpoint_could_name(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a version of the registry"):
        golden_tests.run_tests(make("sql", 1), write_tests(tmp_path), endpoint=EndpointOptions("http://127.0.0.1:1/v1"))


@pytest.mark.parametrize("form", ["torch", "llama.cpp"])
def test_an_engine_here_answers_as_generate_does(tmp_path: Path, form: str) -> None:
    for module in ("torch", "transformers", "peft", *["llama_cpp_py_sync"] * (form == "llama.cpp")):
        need_module(module)
    from tests.support import serving

    models = serving.make_models(tmp_path, adapters=1)
    base = models.base if form == "torch" else models.gguf
    right = ah.generate(models.adapter(0), "ab", base=base, compare=False, max_tokens=8)
    tests: list[dict[str, Any]] = [
        {"id": "same", "prompt": "ab", "equals": right.text, "pass_rate": 1},
        {"id": "ends", "prompt": "ab", "max_tokens": 8},
        {"id": "talks", "messages": [*TALK, {"role": "user", "content": "ab"}], "equals": right.text},
    ]
    tested = golden_tests.run_tests(models.adapter(0), write_tests(tmp_path, tests), base=base, sampling=Sampling(max_tokens=8))
    assert tested.report.rates["same"] == 1.0
    assert tested.report.rates["ends"] == float(right.tokens < 8)
    assert tested.report.rates["talks"] == 0.0
    alone = golden_tests.run_tests(None, write_tests(tmp_path, tests), base=base, sampling=Sampling(max_tokens=8))
    assert alone.report.results[0].answer == ah.generate(None, "ab", base=base, compare=False, max_tokens=8).text
    assert (tested.measured_by["engine"], tested.ref, tested.digest[:7]) == (form, None, "sha256:")


def test_two_versions_are_compared_on_the_same_tests_and_flipped_ones_are_named(
    run: Run, pushed: str, make: Make, tmp_path: Path
) -> None:
    run("push", make("other", 2), "team/sql")
    run("tag", "team/sql:v1", "prod")
    path = write_tests(tmp_path, [{"id": f"t{number}", "prompt": str(number), "equals": "yes"} for number in range(150)])

    def better(document: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        """The first version is wrong in every fifth test."""
        wrong = document["model"].endswith(pushed) and int(document["messages"][0]["content"]) % 5 == 0
        return 200, {"x-adapterhub-version": document["model"]}, completion("no" if wrong else "yes")

    with chat_server(better) as (url, _):
        words = ("--tests", path, "--url", url, "--against")
        document = json.loads(run("eval", "team/sql:v2", *words, "team/sql:prod", "--gate", "pass>against", "--json").stdout)
        worse = run("eval", "team/sql:v1", *words, "team/sql:v2", "--gate", "pass>=against", code=1).stdout
        needs = run("eval", "team/sql", "--tests", path, "--url", url, "--gate", "pass>=against", code=2).stderr
    against = document["against"]
    assert (against["ref"], against["digest"], against["difference"]) == ("team/sql:v1", pushed, pytest.approx(0.2))
    assert (against["better"][:2], against["worse"], len(against["better"])) == (["t0", "t5"], [], 30)
    assert (document["ok"], document["gates"][0]["ok"], document["recorded"]) == (True, True, "team/sql:v2")
    assert "worse: t0, t5, t10, t15, t20, t25, t30, t35, t40, t45 and 20 more" in worse
    assert "against team/sql:v2: -20.0%, 95 % interval -26.2% to -13.3%; 0 better, 30 worse, McNemar p = 1.9e-09" in worse
    assert "FAILED: pass>=against (-20.0%," in worse
    assert "Name the other with --against" in needs


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--url", "http://h/v1", "--against", "base"), "--against: base needs the model here"),
        (("--against", "base"), "--against: base needs the model here"),
        (("--url", "http://h/v1", "--served-as", "x", "--against", "team/b"), "names one version, and --against another"),
        (("--base", "b", "--against", "team/b", "--gate", "pass<against"), "is no comparison"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(run: Run, tmp_path: Path, words: tuple[str, ...], problem: str) -> None:
    result = run("eval", "./sql", "--tests", write_tests(tmp_path), *words, code=2)
    assert problem in result.stderr
