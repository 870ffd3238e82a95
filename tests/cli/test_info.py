"""`adapterhub info`: what is in use, why, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import Run
from tests.support.folders import adapter, pairs

REMOTE = '[remotes.team]\nurl = "oci://registry.example/adapters"\n'


def document(run: Run, *args: str, code: int = 0, **options: Any) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(run("info", "--json", *args, code=code, **options).stdout)
    return info


def test_it_names_the_registry_and_what_chose_it(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    run("push", "sql", "team/sql", "--registry", "named")
    (inner := tmp_path / "named/deep").mkdir()
    chosen = [
        document(run, "--registry", "named")["registry"],
        document(run, env={"ADAPTERHUB_REGISTRY": str(tmp_path / "named")})["registry"],
        document(run, cwd=tmp_path / "named")["registry"],
        document(run, cwd=inner)["registry"],
    ]
    assert [registry_info["chosen_by"] for registry_info in chosen] == [
        "--registry",
        "$ADAPTERHUB_REGISTRY",
        "found here",
        "found above this folder",
    ]
    assert {tmp_path / registry_info["path"] for registry_info in chosen} == {tmp_path / "named"}
    assert all(
        (registry_info["exists"], registry_info["adapters"], registry_info["versions"], registry_info["writable"])
        == (True, 1, 1, True)
        for registry_info in chosen
    )
    (tmp_path / "adapterhub.toml").write_text('registry = "named"\n')
    assert document(run)["registry"]["chosen_by"] == str(tmp_path / "adapterhub.toml")
    assert not document(run, "--registry", "nowhere")["registry"]["exists"]
    assert not (tmp_path / "nowhere").exists()


def test_it_lists_remotes_with_the_default_one_and_the_project(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapterhub.toml").write_text(f'remote = "team"\n\n{REMOTE}\n[policy]\nmax_rank = 4\n')
    info = document(run)
    assert [(remote["name"], remote["default"]) for remote in info["remotes"]] == [("team", True)]
    assert (info["settings"]["project"], info["settings"]["policy"]) == (str(tmp_path / "adapterhub.toml"), True)
    stdout = run("info").stdout
    assert "team oci://registry.example/adapters (default)" in stdout
    assert "(has a policy)" in stdout


def test_logins_are_hosts_and_never_secrets(run: Run, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/config.json").write_text('{"auths": {"registry.example": {"auth": "bWU6c2VjcmV0"}}}')
    for args in (("info",), ("info", "--json")):
        stdout = run(*args, env={"DOCKER_CONFIG": str(tmp_path / "docker"), "HF_TOKEN": "hf_secret"}).stdout
        assert "registry.example" in stdout
        assert "bWU6" not in stdout
        assert "hf_secret" not in stdout


def test_everything_that_is_wrong_is_a_problem_and_exits_with_1(run: Run, tmp_path: Path) -> None:
    env = {"ADAPTERHUB_REMOTE": "nowhere", "HF_TOKEN": "\x01"}
    problems = document(run, code=1, env=env)["problems"]
    assert ["nowhere" in problem or "HF_TOKEN" in problem for problem in problems] == [True, True]
    for table in ('ignore = ["shapes"]', 'runtimes = ["pefd"]'):
        (tmp_path / "adapterhub.toml").write_text(f"[validate]\n{table}\n")
        (problem,) = document(run, code=1)["problems"]
        assert "adapterhub.toml: validate." in problem
    (tmp_path / "adapterhub.toml").write_text("[remotes.team\n")
    (problem,) = document(run, code=1)["problems"]
    assert "adapterhub.toml: not valid TOML" in problem
    (tmp_path / "adapterhub.toml").write_text("[remotes.team\n")
    stdout = run("info", code=1).stdout
    assert "problem: " in stdout
    assert "None" not in stdout
    assert "unknown, for the problem below" in stdout
    assert str(tmp_path / "adapterhub.toml") in stdout.partition("problem: ")[0]


def test_a_damaged_registry_is_a_problem(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    run("push", "sql", "team/sql", "--registry", "named")
    (tmp_path / "named/registry.db").write_bytes(b"no database")
    (problem,) = document(run, "--registry", "named", code=1)["problems"]
    assert "`adapterhub fsck --rebuild-index --registry named` rebuilds it" in problem
