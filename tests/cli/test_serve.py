"""`adapterhub serve` with options that cannot be: one line each, and the address is free again."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cli import engines
from adapterhub.cli.options import Settings
from tests.conftest import Run
from tests.support import folders

NOBODY = "http://127.0.0.1:9"  # the port of the discard protocol, on which nothing listens


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folders.base(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--key", "key.pem"), 2, "key.pem: a certificate and its private key belong together"),
        (("--certificate", "no.pem", "--key", "no.pem"), 8, "no.pem: No such file"),
        (("--certificate", "text.pem", "--key", "text.pem"), 8, "text.pem: "),
        (("",), 2, "patterns of names: none was given"),
        (("--route", "none.toml"), 3, "none.toml: no such file"),
        ((), 8, "vllm: does not answer"),
        (("--engine-url", "nonsense"), 2, "nonsense: is not the URL of a server"),
        (("--engine-url", NOBODY, "--engine", "auto"), 2, "does not report which engine it is"),
        (("--engine-url", NOBODY, "--engine-url", f"{NOBODY}/"), 2, "http://127.0.0.1:9: is given more than once"),
        (("--context", 512), 2, "context 512: the engine at http://127.0.0.1:9 is already running"),
        (("--dtype", "float32"), 2, "dtype float32: the engine at http://127.0.0.1:9 is already running"),
        (("--program", "vllm"), 2, "program vllm: the engine at http://127.0.0.1:9 is already running"),
        (("--one-process",), 2, "one process: the engine at http://127.0.0.1:9 is already running"),
        (("--nf4",), 2, "NF4: the engine at http://127.0.0.1:9 is already running"),
        (("--", "--seed", "1"), 2, "--seed 1: the engine at http://127.0.0.1:9 is already running"),
    ],
)
def test_options_that_cannot_be(run: Run, base: Path, tmp_path: Path, options: tuple[Any, ...], code: int, words: str) -> None:
    (tmp_path / "text.pem").write_text("not a certificate\n")
    usual = () if "--engine-url" in options else ("--engine-url", NOBODY)
    result = run("serve", "--base", base, "--engine", "vllm", *usual, "--port", 0, *options, code=code, cwd=tmp_path)
    assert words in result.stderr
    assert "bug" not in result.stderr


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        (f'url = "{NOBODY}"', 8, "vllm: does not answer"),
        (
            f'url = "{NOBODY}"\nname = "left"\nkey_variable = "NO_KEY"',
            2,
            "left: its key should be in $NO_KEY, which is not set",
        ),
        (f'url = "{NOBODY}"\nwidth = 2', 2, "engines.toml: engines[0]: width: unknown"),
    ],
)
def test_engines_of_the_route_file_are_used_without_a_url(
    run: Run, base: Path, tmp_path: Path, table: str, code: int, words: str
) -> None:
    (tmp_path / "engines.toml").write_text(f"[[engines]]\n{table}\n")
    result = run("serve", base, "--engine", "vllm", "--route", tmp_path / "engines.toml", "--port", 0, code=code)
    assert words in result.stderr


def test_names_at_a_hub_that_may_not_be_asked_are_refused_at_the_start(run: Run, base: Path) -> None:
    words = ("serve", "--base", base, "--engine", "vllm", "--engine-url", NOBODY, "--port", 0, "--remote", "hf://")
    result = run(*words, env={"HF_HUB_OFFLINE": "1"}, code=6)
    assert "HF_HUB_OFFLINE: is set, so nothing is fetched" in result.stderr


def test_a_base_does_not_answer_for_an_adapter_of_its_name(run: Run, base: Path, tmp_path: Path) -> None:
    folders.adapter(tmp_path / "adapter", folders.pairs(1, size=(8, 8)))
    run("push", tmp_path / "adapter", "team/sql", "--registry", tmp_path / "registry")
    words = (
        "serve",
        "--base",
        base,
        "--registry",
        tmp_path / "registry",
        "--engine",
        "vllm",
        "--engine-url",
        NOBODY,
        "--port",
        0,
    )
    result = run(*words, "--base-name", "team/sql", code=6)
    assert "team/sql: is the name of the base and of an adapter. Pass another one as --base-name" in result.stderr
    for arguments in (("--base-name", "team/other"), ("--base-name", "team/sql", "other/*")):
        assert "does not answer" in run(*words, *arguments, code=8).stderr


def test_a_port_in_use(run: Run, base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = run("serve", base, "--engine", "vllm", "--engine-url", NOBODY, "--port", port, code=8)
    assert f"127.0.0.1:{port}: Address already in use. Choose another port" in result.stderr


def test_threads_of_torch_wait_shortly_in_a_gateway_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    chosen: dict[str, Any] = {"urls": (), "program": "", "name": None, "max_rank": 8, "nf4": False}
    chosen |= {"context": None, "dtype": None}
    engine_options: dict[str, Any] = {"max_adapters": 1, "one_process": False, "has_plugin": False, "extra_words": ()}
    with engines.open_engine(str(base), Settings(), engine="torch", **chosen, **engine_options) as opened:
        assert opened.engine.name == "torch"
        assert os.environ["GOMP_SPINCOUNT"] in ("0", "1000")


def test_an_adapter_in_the_place_of_the_base_is_told_apart(run: Run, tmp_path: Path) -> None:
    folders.adapter(tmp_path / "adapter", folders.pairs(1, size=(8, 8)))
    error = run("serve", "--base", tmp_path / "adapter", code=3).stderr
    assert "adapter: is an adapter, not a base model. Name the folder or the .gguf file of the base" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--base: is missing, and so is a SRC that records one. Pass --base with its folder"),
        (["team/*"], "team/*: is a pattern of names, which records no base. Pass --base with its folder"),
        (["base", "team/*"], "Did you mean `adapterhub serve 'team/*' --base base`?"),
        (
            ["./base", "--base", "base"],
            "Push it first: `adapterhub push ./base team/base`; `adapterhub run ./base Hello --base base` tries it",
        ),
        (["oci://host/team/sql", "--base", "base"], "`adapterhub copy oci://host/team/sql NAMESPACE/NAME` copies it here"),
        (["sql", "--base", "base"], "sql: 'sql' is not namespace/name. Write it like team/sql"),
        (["team/sql:v2", "--base", "base"], "names a version, and each request chooses its own as `model`. Write team/sql"),
        (["team/sql@sha256:0a", "--base", "base"], "each request chooses its own as `model`. Write team/sql"),
    ],
)
def test_names_that_cannot_be_served_are_told_apart(run: Run, base: Path, words: list[str], message: str) -> None:
    error = run("serve", *words, code=2, cwd=base.parent).stderr
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["adapters/a00", "--base", "base"], 3, "adapters/a00: no such adapter. It is a path here. Push it first"),
        (["adapters/a00"], 2, "adapters/a00: is a path, and no adapter in the registry has this name. Push it first"),
        (
            ["./adapters/a00"],
            2,
            "`adapterhub push ./adapters/a00 team/a00`; `adapterhub run ./adapters/a00 Hello` tries it without  [not-stored]",
        ),
        (["other/legal,adapters/a00", "--base", "base"], 3, "adapters/a00: no such adapter. It is a path here"),
        (["adapters/*", "--base", "base"], 2, "adapters/a00: is a path, and no adapter in the registry matches adapters/*"),
        (["team/none", "--base", "base"], 3, "team/none: no such adapter. Run `adapterhub list`"),
        (["team/none"], 3, "team/none: no adapter in the registry, and no base on this machine. `adapterhub list` shows"),
        (["other/lega"], 3, "other/lega: no such adapter. Did you mean other/legal?"),
        (["--base", "other/legal"], 3, "other/legal: is an adapter in the registry, not a base model"),
    ],
)
def test_what_is_not_in_the_registry_is_never_served_as_the_base_alone(
    run: Run, base: Path, words: list[str], code: int, message: str
) -> None:
    folders.adapter(base.parent / "pushed", folders.pairs(1))
    folders.adapter(base.parent / "adapters/a00", folders.pairs(1))
    run("push", "pushed", "other/legal")
    error = run("serve", *words, "--engine", "vllm", "--engine-url", NOBODY, "--port", 0, code=code).stderr
    assert message in error
    assert error.count("\n") == 1


def test_a_pulled_folder_at_the_path_of_its_name_is_the_version(run: Run, base: Path) -> None:
    folders.adapter(base.parent / "other/legal", folders.pairs(1))
    run("push", "other/legal", "other/legal")
    for pattern in ("other/legal", "other/*"):
        result = run("serve", pattern, "--base", "base", "--engine", "vllm", "--engine-url", NOBODY, "--port", 0, code=8)
        assert "no adapter matches" not in result.stderr


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["team/*"], "no adapter matches team/*; until one is pushed, the base alone is served\n"),
        (["team/*", "other/*"], "no adapter matches team/*\n"),
    ],
)
def test_a_pattern_without_a_match_is_told_at_the_start(run: Run, base: Path, patterns: list[str], message: str) -> None:
    folders.adapter(base.parent / "adapter", folders.pairs(1))
    run("push", "adapter", "other/legal")
    result = run("serve", *patterns, "--base", "base", "--engine", "vllm", "--engine-url", NOBODY, "--port", 0, code=8)
    assert message in result.stderr


def test_an_adapter_is_served_on_the_base_that_it_records(run: Run, tmp_path: Path) -> None:
    folders.adapter(tmp_path / "adapter", folders.pairs(1, size=(8, 8)), base_model_name_or_path="acme/tiny")
    run("push", tmp_path / "adapter", "team/sql", "--registry", tmp_path / "registry")
    words = ("serve", "team/sql", "--registry", tmp_path / "registry", "--engine", "vllm", "--engine-url", NOBODY, "--port", 0)
    error = run(*words, code=None, env={"HF_ENDPOINT": NOBODY}).stderr
    assert error.startswith("base: acme/tiny, which the adapter records\nerror: acme/tiny")
    assert "Pass --base FOLDER, or --base hf://acme/tiny, which downloads it from the Hub" in error


def test_a_mistyped_engine_names_the_one_that_was_meant(run: Run) -> None:
    assert "Did you mean vllm?" in run("serve", "base", "--engine", "vlm", code=2).stderr
