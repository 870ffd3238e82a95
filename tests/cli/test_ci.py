"""Validating in CI: several adapters at once, the action, the hook, and SARIF."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from adapterhub.checks import CODES, Problem, Report
from adapterhub.cli.views import report_documents
from tests.cli.test_process import PATH
from tests.conftest import ROOT, Run, need_module, need_program
from tests.support import folders
from tests.support.folders import base, pairs
from tests.support.programs import write_program


def adapter(path: Path, shapes: folders.Shapes, **config: Any) -> Path:
    """An adapter that names its base: `--strict` fails one that does not."""
    return folders.adapter(path, shapes, **{"base_model_name_or_path": "org/base", **config})


@pytest.fixture
def two(tmp_path: Path) -> None:
    """A good adapter and one that is only warned about."""
    base(tmp_path / "base", 2)
    adapter(tmp_path / "good", pairs(2))
    adapter(tmp_path / "unused", pairs(2), alpha_pattern={"no_such_module": 3})


def test_several_adapters_are_checked_in_one_call(run: Run, two: None) -> None:
    document = json.loads(run("validate", "good", "unused", "--json").stdout)
    assert document["ok"] is True
    assert [report["source"] for report in document["reports"]] == ["good", "unused"]
    lines = run("validate", "good", "unused").stdout.splitlines()
    assert lines[-1] == "2 adapters: all ok"
    assert sum(line.startswith("good") for line in lines) == 1
    assert "warning[pattern-unused]" in "\n".join(lines)
    assert "RUNTIME" in run("validate", "good", "unused", "--verbose").stdout


def test_a_folder_of_adapters_stands_for_all_of_them(run: Run, two: None) -> None:
    document = json.loads(run("validate", ".", "--json").stdout)
    assert [report["source"] for report in document["reports"]] == ["good", "unused"]


def test_a_missing_adapter_is_reported_along_with_the_others(run: Run, two: None, tmp_path: Path) -> None:
    result = run("validate", "nosuch", "good", code=3)
    assert "error[no-adapter] no such file or folder" in result.stdout
    assert result.stdout.splitlines()[-1] == "2 adapters: 1 not ok: nosuch"
    adapter(tmp_path / "bad", pairs(2), r=3)
    run("validate", "nosuch", "bad", code=1)


def test_an_ignored_code_is_counted_and_changes_the_result(run: Run, two: None) -> None:
    assert (
        "ok: nothing to report; ignored: 1 pattern-unused"
        in run("validate", "unused", "--strict", "--ignore", "pattern-unused").stdout
    )
    assert "Did you mean pattern-unused?" in run("validate", "unused", "--ignore", "patern-unused", code=2).stderr
    unread = "error: --ignore: malformed cannot be ignored: nothing else is checked of such an adapter  [invalid-parameter]\n"
    assert run("validate", "unused", "--ignore", "malformed", code=2).stderr == unread


def test_the_project_has_defaults_and_the_command_line_comes_first(run: Run, two: None, tmp_path: Path) -> None:
    project = tmp_path / "adapterhub.toml"
    project.write_text(
        '[validate]\nbase = "base"\nruntimes = ["peft"]\nignore = ["pattern-unused"]\nmax_rank = 1\nstrict = true\n'
    )
    [report] = json.loads(run("validate", "unused", "--json", code=1).stdout)["reports"]
    assert (report["strict"], report["ignored"]) == (True, {"pattern-unused": 1})
    assert report["base"] == str(tmp_path / "base")
    assert {problem["code"] for problem in report["problems"]} == {"rank-above-max"}
    run("validate", "unused", "--max-rank", "2", "--no-strict")
    for line, words in (
        ('ignore = ["pickel"]', "validate.ignore: unknown code 'pickel'. Did you mean pickle?"),
        ('ignore = ["malformed"]', "validate.ignore: malformed cannot be ignored: nothing else is checked of such an adapter"),
        ('runtimes = ["vlm"]', "validate.runtimes: unknown runtime 'vlm'. One of "),
    ):
        project.write_text(f"[validate]\n{line}\n")
        result = run("validate", "good", code=2)
        assert f"adapterhub.toml: {words}" in result.stderr
        assert result.stderr.endswith("  [invalid-config]\n")


def test_a_project_sends_nobody_to_a_host_that_they_do_not_know(run: Run, two: None, tmp_path: Path) -> None:
    (tmp_path / "adapterhub.toml").write_text('[validate]\nbase = "https://elsewhere.example/model"\n')
    assert "names https://elsewhere.example" in run("validate", "good", code=6).stderr


def test_one_run_writes_several_formats(run: Run, two: None, tmp_path: Path) -> None:
    run("validate", "good", "unused", "--output-file", "junit=a.xml", "--output-file", "markdown=a.md")
    assert (tmp_path / "a.xml").read_text().startswith("<?xml")
    assert "| unused | ok |  | 1 | sglang |" in (tmp_path / "a.md").read_text()
    assert "is not FORMAT=PATH" in run("validate", "good", "--output-file", "a.xml", code=2).stderr


def test_one_bad_adapter_among_good_ones_fails_the_call(run: Run, two: None, tmp_path: Path) -> None:
    adapter(tmp_path / "bad", pairs(2), r=3)
    result = run("validate", "good", "bad", code=1)
    assert result.stdout.splitlines()[-1] == "2 adapters: 1 not ok: bad"


def test_strict_fails_on_a_warning_and_reports_it(run: Run, two: None) -> None:
    assert "ok: 1 warning" in run("validate", "unused").stdout
    assert "not ok (--strict): 1 warning" in run("validate", "unused", "--strict", code=1).stdout
    assert run("validate", "good", "--strict").stdout.endswith("ok: nothing to report\n")
    for style, sign in (("github", "::error file="), ("junit", "<failure"), ("json", '"ok": false')):
        assert sign in run("validate", "unused", "--strict", "--format", style, code=1).stdout


def test_max_rank_names_the_modules_above_it(run: Run, two: None) -> None:
    run("validate", "good", "--max-rank", "2")
    [document] = json.loads(run("validate", "good", "--max-rank", "1", "--json", code=1).stdout)["reports"]
    assert {problem["code"] for problem in document["problems"]} == {"rank-above-max"}
    assert (document["problems"][0]["expected"], document["problems"][0]["got"]) == ("1 at most", "2")


def test_files_of_one_folder_are_one_adapter(run: Run, two: None) -> None:
    files = ["good/adapter_config.json", "good/adapter_model.safetensors", "unused/adapter_config.json"]
    document = json.loads(run("validate", *files, "--json").stdout)
    assert [report["source"] for report in document["reports"]] == ["good", "unused"]


def test_a_git_lfs_pointer_is_called_one(run: Run, two: None, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "good/adapter_model.safetensors").write_text(pointer)
    assert "a Git LFS pointer, not the file itself" in run("validate", "good", code=1).stdout


def test_push_refuses_what_validate_calls_an_error_unless_forced(run: Run, two: None, tmp_path: Path) -> None:
    adapter(tmp_path / "bad", pairs(2), r=3)
    result = run("push", "bad", "team/bad", code=6)
    assert result.stderr.startswith("error: bad: rank-config: ")
    assert "--force" in result.stderr
    counted = "1 error in 2 places"  # in the same words by each command that checks
    assert f" ({counted}). " in result.stderr
    assert f" ({counted}). " in run("convert", "bad", "out", "--to", "mlx", code=6).stderr
    assert f"not ok: {counted}\n" in run("validate", "bad", code=1).stdout
    assert run("list", code=None).stdout == ""
    forced = run("push", "bad", "team/bad", "--force")
    assert forced.stdout.startswith("team/bad:v1")
    assert forced.stderr.splitlines()[1:] == ["stored despite 1 error in 2 places, the first rank-config"]


def test_a_folder_without_its_config_is_reported_and_no_missing_option_is_named(run: Run, two: None, tmp_path: Path) -> None:
    (tmp_path / "good/adapter_config.json").unlink()
    for output in (run("validate", "good", code=1).stdout, run("push", "good", "team/good", code=6).stderr):
        assert "adapter_config.json: is missing, and nothing else records its alpha" in output
        assert "`adapterhub fix good --alpha N`" in output
    assert "Pass --alpha N" in run("convert", "good", "x", "--to", "mlx", code=6).stderr


def test_a_whole_model_is_called_one(run: Run, two: None, tmp_path: Path) -> None:
    for output in (run("validate", "base", code=1).stdout, run("push", "base", "team/base", code=6).stderr):
        assert "is a whole model, not an adapter" in output
        assert "--force" not in output
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "base" / name).write_bytes(b"")
    assert run("push", "base", "team/base", code=4).stderr.endswith("[whole-model]\n")


def test_the_weights_file_stands_for_the_folder_with_its_config(run: Run, two: None) -> None:
    assert run("push", "good/adapter_model.safetensors", "team/good").stdout.startswith("team/good:v1")
    assert "already" in run("push", "good", "team/good").stdout


# --- the action and the hook


def step(name: str) -> dict[str, Any]:
    need_module("yaml")
    import yaml

    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    (matching_step,) = (item for item in steps if item.get("name") == name)
    assert isinstance(matching_step, dict)
    return matching_step


def acted(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """What the action's step does, with our sources for the installed package."""
    bash = need_program("bash")
    (folder / "bin").mkdir(exist_ok=True)
    write_program(folder / "bin/adapterhub", "-m", "adapterhub")
    validate_step = step("Validate")
    environment = {**dict.fromkeys(validate_step["env"], ""), **inputs, "PYTHONPATH": PATH}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [bash, "--noprofile", "--norc", "-eo", "pipefail", "-c", validate_step["run"]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_action_annotates_and_fails(two: None, tmp_path: Path) -> None:
    adapter(tmp_path / "bad one", pairs(2), r=3)
    assert acted(tmp_path, PATHS="good\nunused\n", BASE="base", RUNTIMES="peft vllm").returncode == 0
    result = acted(tmp_path, PATHS="good\nbad*\n", SARIF="out.sarif", GITHUB_STEP_SUMMARY="summary.md", RUNTIMES="peft")
    assert result.returncode == 1
    assert result.stdout.count("::error ") == 1  # and none for the runtime that refuses it for that reason
    assert "| bad one | **not ok** | 2 |" in (tmp_path / "summary.md").read_text()
    assert "::error file=bad one/adapter_model.safetensors" in result.stdout
    assert json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"]
    assert acted(tmp_path, PATHS="unused", STRICT="true").returncode == 1
    assert acted(tmp_path, PATHS="unused", STRICT="true", IGNORE="pattern-unused").returncode == 0
    assert acted(tmp_path, PATHS="good", MAX_RANK="1").returncode == 1


def test_the_action_takes_no_input_for_a_command_or_an_option(two: None, tmp_path: Path) -> None:
    result = acted(tmp_path, PATHS="$(touch hacked)\n--help", BASE="base; touch hacked")
    assert result.returncode == 3
    assert not (tmp_path / "hacked").exists()


def test_the_action_reports_a_missing_adapter(two: None, tmp_path: Path) -> None:
    result = acted(tmp_path, PATHS="nothing/*")
    assert (result.returncode, result.stdout) == (3, "::error::no adapter is at nothing/*\n")


@pytest.mark.parametrize(
    ("schema", "file"), [("vendor.github-actions", "action.yml"), ("vendor.github-workflows", "examples/ci/adapters.yml")]
)
def test_github_takes_the_action_and_the_workflow(schema: str, file: str) -> None:
    need_module("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    subprocess.run(command, check=True, capture_output=True)


def test_the_workflow_uses_inputs_that_the_action_has() -> None:
    need_module("yaml")
    import yaml

    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    steps = yaml.safe_load((ROOT / "examples/ci/adapters.yml").read_text())["jobs"]["validate"]["steps"]
    (ours,) = (item for item in steps if "adapterhub@" in item.get("uses", ""))
    assert set(ours["with"]) <= set(inputs)
    assert [name for name, value in inputs.items() if not value["description"]] == []


def test_pre_commit_takes_the_hook_and_runs_it_on_what_changed(two: None, tmp_path: Path) -> None:
    need_module("pre_commit")
    git = need_program("git")
    import yaml

    environment = {**os.environ, "PYTHONPATH": PATH, "PRE_COMMIT_HOME": str(tmp_path / "cache")}
    manifest = str(ROOT / ".pre-commit-hooks.yaml")
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-manifest", manifest], env=environment, check=True)
    (hook,) = yaml.safe_load(Path(manifest).read_text())
    repository = tmp_path / "repository"
    repository.mkdir()
    adapter(repository / "bad", pairs(2), r=3)
    shutil.copytree(tmp_path / "good", repository / "good")
    # The hook as it stands but for where it is installed: a local hook runs the sources.
    local = {**hook, "language": "system", "entry": f"{shlex.quote(sys.executable)} -m {hook['entry']}"}
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [{"repo": "local", "hooks": [local]}]}))

    def commit(*paths: str) -> subprocess.CompletedProcess[str]:
        subprocess.run([git, "add", ".pre-commit-config.yaml", *paths], cwd=repository, check=True)
        command = [sys.executable, "-m", "pre_commit", "run"]
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    subprocess.run([git, "init", "-q"], cwd=repository, check=True)
    assert "Passed" in commit("good").stdout
    failed = commit("bad")
    assert failed.returncode == 1
    assert "[rank-config]" in failed.stdout


# --- SARIF

_TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
_LEVEL = {"enum": ["none", "note", "warning", "error"]}


def strict(**properties: Any) -> dict[str, Any]:
    """An object that has these and no other; those whose name begins with _ are optional."""
    names = {name.lstrip("_"): value for name, value in properties.items()}
    required = [name for name in properties if not name.startswith("_")]
    return {"type": "object", "properties": names, "required": required, "additionalProperties": False}


def array_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


# The part of SARIF 2.1.0 (OASIS, sarif-schema-2.1.0.json) that is written, and nothing else allowed.
SARIF = {
    **strict(
        version={"const": "2.1.0"},
        runs=array_of(
            strict(
                tool=strict(
                    driver=strict(
                        name={"type": "string"},
                        version={"type": "string"},
                        rules={
                            **array_of(
                                strict(id={"type": "string"}, shortDescription=_TEXT, defaultConfiguration=strict(level=_LEVEL))
                            ),
                            "uniqueItems": True,
                        },
                    )
                ),
                columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                results=array_of(
                    strict(
                        ruleId={"type": "string"},
                        ruleIndex={"type": "integer", "minimum": -1},
                        level=_LEVEL,
                        message=_TEXT,
                        occurrenceCount={"type": "integer", "minimum": 1},
                        locations=array_of(
                            strict(
                                physicalLocation=strict(
                                    artifactLocation=strict(uri={"type": "string", "format": "uri-reference"}),
                                    region=strict(startLine={"type": "integer", "minimum": 1}),
                                ),
                                _logicalLocations=array_of(strict(fullyQualifiedName={"type": "string"})),
                            )
                        ),
                    )
                ),
            )
        ),
    )
}
SARIF["properties"]["$schema"] = {"type": "string", "format": "uri"}


def test_sarif_has_only_what_2_1_0_defines() -> None:
    problems = tuple(Problem(code, file, name, "x", "y") for code in CODES for file in ("", "a b.json") for name in ("", "n"))
    for report in (
        [],
        [Report("a b", "peft", "base", problems)],
        [Report("c:d", None, None, ()), Report("e", "gguf", None, problems)],
    ):
        jsonschema.validate(json.loads(report_documents.sarif(report)), SARIF)
