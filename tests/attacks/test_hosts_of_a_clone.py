"""A repository that was cloned brings adapterhub.toml and adapters.lock: nobody whom they alone name is asked anything."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import adapterhub
from adapterhub import training
from adapterhub.operations.workspace import Workspace
from adapterhub.training.artifacts import tracking
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.attacks.test_credentials import docker, helper
from tests.attacks.test_hostile_servers import one_line
from tests.conftest import ROOT, Run
from tests.support.adapters import Make
from tests.support.merge_recipes import Q, write_base
from tests.support.web_server import Web

DIGEST = f"sha256:{'1' * 64}"
ALLOW = "ADAPTERHUB_ALLOW_HOSTS"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


Clone = Callable[[str], Path]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A project whose files name a remote and a locked adapter there; its folder."""

    def call(url: str) -> Path:
        folder = tmp_path / "clone"
        folder.mkdir()
        (folder / "adapterhub.toml").write_text(f'remote = "team"\n[remotes.team]\nurl = "{url}"\n')
        entry = {"ref": "team/sql", "source": f"{url}/team/sql:latest", "digest": DIGEST, "size": 1, "base": {}}
        (folder / "adapters.lock").write_text(json.dumps({"version": 1, "adapters": {"team/sql": entry}}))
        return folder

    return call


COMMANDS = [
    ["pull", "team/sql", "--remote"],
    ["pull", "--locked"],
    ["pull", "--locked", "team/sql"],
    ["list", "--remote"],
    ["list", "team/sql", "--remote"],
    ["lock", "--check"],
    ["lock", "--update"],
    ["lock", "team/chat", "--remote"],
    ["remote", "test", "team"],
    ["login", "team", "--username", "ada", "--password-stdin"],
    ["push", "../adapter", "team/sql", "--remote"],
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_host_that_only_a_project_names_is_not_asked(
    run: Run, tmp_path: Path, make: Make, web: Web, clone: Clone, words: list[str]
) -> None:
    """Nor is a credential helper, which is a program."""
    make()
    path = helper(tmp_path) / "asked"
    folder, host = clone(f"oci://{web.url[7:]}"), web.url[7:]
    env = docker(tmp_path, {"credsStore": "generous"})
    result = run(*words, cwd=folder, env=env, code=6)
    one_line(result, f"names http://{host}, which you have not used before", f"{ALLOW}=http://{host}")
    assert web.requests == []
    assert not path.exists()
    run(*words, cwd=folder, env={**env, ALLOW: f"other.example, {host}"}, code=None)
    assert bool(web.requests) == (words[0] != "login")


@pytest.mark.parametrize(
    "url",
    ["oci://registry.example/x", "oci+http://registry.example/x", "hub+https://hub.example/org", "hub+http://hub.example/org",
     "s3://bucket/x", "file:///srv/adapters", "layout:///srv/x.tar", "layout://../x.tar"],
)  # fmt: skip
def test_this_holds_for_every_kind_of_remote(run: Run, clone: Clone, url: str) -> None:
    one_line(run("pull", "org/sql", "--remote", cwd=clone(url), code=6), "adapterhub.toml: names ", "not used before")


@pytest.mark.parametrize("known_by", ["remote add", "a user's remote", "docker login", "a helper for it", "lock"])
def test_a_host_that_the_user_has_used_is_asked(run: Run, tmp_path: Path, web: Web, clone: Clone, known_by: str) -> None:
    host, env = web.url[7:], docker(tmp_path, {})
    helper(tmp_path)
    if known_by == "remote add":
        (tmp_path / "mine").mkdir()
        run("remote", "add", "x", f"oci://{host}/elsewhere", "--project", cwd=tmp_path / "mine")
    elif known_by == "a user's remote":
        run("remote", "add", "mine", f"oci://{host}/mine")
    elif known_by == "docker login":
        env = docker(tmp_path, {"auths": {host: {}}})
    elif known_by == "a helper for it":
        env = docker(tmp_path, {"credHelpers": {host: "generous"}})
    else:
        run("lock", f"oci://{host}/team/sql", code=3)
    before = len(web.requests)
    run("pull", "team/sql", "--remote", cwd=clone(f"oci://{host}"), env=env, code=3)
    assert len(web.requests) > before


def test_without_tls_a_host_is_another_one(run: Run, clone: Clone) -> None:
    folder = clone("oci+http://registry.example")
    env = {ALLOW: "registry.example,https://registry.example"}
    one_line(run("pull", "team/sql", "--remote", cwd=folder, env=env, code=6), "names http://registry.example,")


def test_what_is_typed_is_asked(run: Run, web: Web, clone: Clone) -> None:
    run("pull", f"oci://{web.url[7:]}/team/sql", cwd=clone("oci://registry.example"), code=3)
    assert web.requests


def test_the_user_s_own_hub_is_asked(run: Run, web: Web, clone: Clone) -> None:
    run("pull", "org/sql", "--remote", cwd=clone("hf://"), env={"HF_ENDPOINT": web.url}, code=3)
    assert web.requests


def answering(words: list[str], answer: str, folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run a command on a terminal, where every question gets an answer; its exit code and what was seen."""
    child, terminal_fd = pty.fork()
    if not child:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-m", "adapterhub", *words], env)
    screen, answered_count = "", 0
    while True:
        try:
            screen += os.read(terminal_fd, 4096).decode()
        except OSError:
            break
        while screen.count("[y/N]") > answered_count:
            answered_count += 1
            os.write(terminal_fd, answer.encode() + b"\n")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), screen


def test_a_terminal_is_asked_once(tmp_path: Path, web: Web, clone: Clone) -> None:
    folder, host = clone(f"oci://{web.url[7:]}"), web.url[7:]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas")))
    env = {**os.environ, "PYTHONPATH": path, "XDG_CONFIG_HOME": str(tmp_path / "config"), **docker(tmp_path, {})}
    words = ["pull", "team/sql", "--remote"]
    question = f"adapterhub.toml names http://{host}, which you have not used before. Connect?"
    for _ in range(2):
        code, screen = answering(words, "n", folder, env)
        assert (code, question in " ".join(screen.split()), web.requests) == (6, True, [])
    code, screen = answering(words, "y", folder, env)
    assert (code, "[y/N]" in screen) == (3, True)
    code, screen = answering(words, "n", folder, env)
    assert (code, "[y/N]" in screen) == (3, False)
    assert f"http://{host}\n" in (tmp_path / "config/adapterhub/known_hosts").read_text()


@pytest.mark.parametrize("registry", ["../elsewhere", "{outside}", "link"])
def test_a_registry_outside_of_a_project_is_not_used(run: Run, make: Make, tmp_path: Path, registry: str) -> None:
    outside, folder = tmp_path / "elsewhere", tmp_path / "clone"
    run("push", make(), "team/sql", env={"ADAPTERHUB_REGISTRY": str(outside)})
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "adapterhub.toml").write_text(f'registry = "{registry.format(outside=outside)}"\n')
    for words in (["list"], ["push", tmp_path / "adapter", "team/other"], ["pull", "team/sql"], ["gc"]):
        one_line(run(*words, cwd=folder, code=6), "adapterhub.toml: names file://", "elsewhere", "or name it with an option")
    assert "team/sql" in run("list", cwd=folder, env={ALLOW: f"file://{outside}"}).stdout
    assert "team/sql" in run("list", "--registry", outside, cwd=folder).stdout


def test_a_recipe_of_somebody_else_s_has_its_adapter_fetched_from_nowhere(run: Run, tmp_path: Path, host: str) -> None:
    write_base(tmp_path / "base")
    rng = np.random.default_rng(2)
    factors = LowRank(rng.normal(size=(4, 64)).astype(np.float32), rng.normal(size=(64, 4)).astype(np.float32), alpha=4)
    (tmp_path / "a").mkdir()
    peft.write(Adapter({Q: factors}), tmp_path / "a")
    address = f"oci://{host}/attacks/recipe"
    run("push", "./a", address)
    run("merge", address, "--into", "base", "--recipe-only", "-o", "a.json")
    stranger = {"XDG_CONFIG_HOME": str(tmp_path / "other"), "XDG_DATA_HOME": str(tmp_path / "other")}
    result = run("rebuild", "a.json", "-o", "out", env=stranger, code=6)
    one_line(result, f"the recipe: names http://{host}, which you have not used before")
    assert "byte for byte" in run("rebuild", "a.json", "-o", "out").stdout


@pytest.mark.parametrize("source", ["javascript:1", "x", "", "http://x/y", "\\\\host\\share", "ada:secret@host/x"])
def test_a_source_that_is_no_address_is_one_line(run: Run, clone: Clone, source: str) -> None:
    folder = clone("oci://registry.example")
    text = (folder / "adapters.lock").read_text()
    (folder / "adapters.lock").write_text(text.replace('"oci://registry.example/team/sql:latest"', json.dumps(source)))
    for words in (["pull", "--locked"], ["lock", "--check"], ["lock", "--update"]):
        result = run(*words, cwd=folder, code=2)
        one_line(result, "not the address of a registry or a hub")
        assert "secret" not in result.stderr


def test_python_refuses_unless_its_workspace_trusts_them(
    run: Run, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", make(), "team/sql", env={"ADAPTERHUB_REGISTRY": str(tmp_path / "elsewhere")})
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "adapterhub.toml").write_text('registry = "../elsewhere"\n')
    monkeypatch.chdir(folder)
    with pytest.raises(RefusedError, match="adapterhub.toml: names file://.*/elsewhere, which you have not used before"):
        adapterhub.pull("team/sql", tmp_path / "out")
    questions: list[tuple[str, Path]] = []
    trusting = Workspace(trusts=lambda owner, file: not questions.append((owner, file)))
    assert trusting.folder() == tmp_path / "clone/../elsewhere"
    assert questions == [(f"file://{tmp_path / 'elsewhere'}", folder / "adapterhub.toml")]
    with pytest.raises(RefusedError, match=r"adapters\.lock: names https://registry\.example, "):
        Workspace().admitted_address("oci://registry.example/team/sql", folder / "adapters.lock")
    assert (
        trusting.admitted_address("oci://registry.example/team/sql", folder / "adapters.lock")
        == "oci://registry.example/team/sql"
    )


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
@pytest.mark.parametrize("text", ["[default]\nbase_url = http://127.0.0.1:9\n", "base_url = x", "[default]\nproject = sql\n"])
def test_the_key_of_wandb_goes_to_no_server_that_a_clone_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_text(text)
    path = tmp_path / "train.toml"
    path.write_text('[base]\npath = "base"\n[data]\ntrain = ["data.jsonl"]\n[train]\nlog_to = ["wandb"]\n')
    message = rf"log_to: {folder}/settings is in the working folder, and W&B would follow it with your key. Remove the file; "
    with (
        pytest.raises(RefusedError, match=message),
        tracking.with_trackers(training.read_config(path), tmp_path / "out", print),
    ):
        pass
