"""Commands at addresses and on remotes: what works there, and the one line about what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.ref import Ref, RefError
from tests.conftest import Run

Folder = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("docker://ghcr.io/team/sql:v2", "oci://ghcr.io/team/sql:v2"),
        ("ghcr.io/team/sql", "oci://ghcr.io/team/sql"),
        ("localhost:5000/team/sql:v1", "oci://localhost:5000/team/sql:v1"),
        ("https://huggingface.co/team/sql", "hf://team/sql"),
        ("https://huggingface.co/team/sql/tree/prod", "hf://team/sql@prod"),
        ("huggingface.co/team/sql/tree/main", "hf://team/sql"),
        ("hf.co/team/sql", "hf://team/sql"),
    ],
)
def test_a_name_of_another_tool_leads_to_the_address(run: Run, text: str, address: str) -> None:
    with pytest.raises(RefError) as caught:
        Ref.parse(text)
    assert caught.value.hint == f"Write {address}"
    for words in (["pull", text], ["push", ".", text], ["validate", text]):
        result = run(*words, code=None)
        assert result.returncode in (2, 3)
        assert f"Write {address}" in result.stderr


def test_a_password_in_such_a_name_is_not_repeated(run: Run) -> None:
    for text in ("docker://me:s3cr3t@host/team/sql", "https://me:s3cr3t@huggingface.co/team/sql"):
        assert "s3cr3t" not in run("pull", text, code=2).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["log", "oci://registry.example/team/sql"],
        ["deprecate", "oci://registry.example/team/sql"],
        ["lineage", "oci://registry.example/team/sql"],
        ["tag", "oci://registry.example/team/sql:prod", "--protect"],
        ["keep", "oci://registry.example/team/sql"],
    ],
)
def test_what_only_the_local_registry_supports_is_refused_in_one_line(run: Run, words: list[str]) -> None:
    result = run(*words, code=2)
    assert "the local registry" in result.stderr
    assert "Copy it here first: `adapterhub copy oci://registry.example/team/sql" in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("address", ["oci://registry.example", "oci://registry.example/team/sql", "s3://bucket/adapters"])
def test_a_search_elsewhere_is_refused_and_leads_to_the_list(run: Run, address: str) -> None:
    error = run("search", "sql", address, code=2).stderr
    reason = "is an address, not a word; --remote names a hub to search"
    assert f"error: {address}: {reason}. List its names with `adapterhub list {address}`  [" in error
    run("remote", "add", "team", "oci://registry.example")
    hint = "List its names with `adapterhub list --remote team`"
    reason = "has no index to search, which the local registry and hubs of adapterhub have"
    assert f"error: oci://registry.example: {reason}. {hint}  [" in run("search", "sql", "--remote", "team", code=2).stderr
    assert "without --remote" in run("search", "sql", "--remote", address, code=2).stderr


@pytest.mark.peer
def test_a_ref_on_the_default_remote(run: Run, host: str, make: Folder, tmp_path: Path) -> None:
    run("remote", "add", "team", f"oci://{host}/elsewhere", "--default")
    run("push", make(), "team/sql")
    assert f"oci://{host}/elsewhere/team/sql:latest (v1)" in run("push", "team/sql", "--remote").stdout
    assert run("push", "team/sql", "--remote").stdout.startswith("already there: ")
    tagged = run("push", "team/sql", "team/sql:prod", "--remote").stdout
    assert tagged.startswith(f"tagged prod (its bytes were there): oci://{host}/elsewhere/team/sql:prod (v1)")
    assert run("push", "team/sql", "team/sql:prod").stdout.startswith("tagged prod (its bytes were there): team/sql:v1")
    assert "is not a ref" in run("push", tmp_path / "adapter", "--remote", code=2).stderr
    assert "REF" in run("push", "team/sql", code=2).stderr

    run("push", make("other", 1), "team/sql", "--remote")
    run("tag", "team/sql:v1", "stable", "--remote")
    versions = json.loads(run("list", "team/sql", "--remote", "--json").stdout)["adapters"]
    assert [version["tags"] for version in versions] == [["v2", "latest"], ["v1", "prod", "stable"]]
    assert {version["kind"] for version in versions} == {"adapter"}
    run("show", "team/sql:v1", "--headers-only", "--remote")
    assert run("diff", "team/sql:v1", "team/sql:v2", "--exit-code", "--remote", code=1)
    run("validate", "team/sql:^1", "--remote", code=3)
    run("validate", "team/sql:v1", "--remote")
    assert "cannot remove a tag" in run("rm", "team/sql:stable", "--remote", code=6).stderr
    assert f"{host}" in run("remote", "test").stdout
    assert "elsewhere/team/sql" in run("list", f"oci://{host}").stdout
    moved = run("push", "team/sql", "--remote").stdout
    assert moved.startswith("tagged latest (its bytes were there): ")


def test_tags_in_a_store_and_a_layout_are_moved_and_removed(run: Run, make: Folder, tmp_path: Path) -> None:
    store, layout, archive = f"file://{tmp_path}/store/team/sql", f"layout://{tmp_path}/box", f"layout://{tmp_path}/box.tar"
    for address in (store, layout, archive):
        run("push", make(), address)
        run("tag", address, "prod")
        assert "prod" in run("list", address).stdout
        run("rm", f"{address}:prod")
        assert "prod" not in run("list", address).stdout
        run("rm", f"{address}:prod", code=3)
        run("rm", f"{address}:latest", code=6)
        assert "has no removal of names from here" in run("rm", address, code=2).stderr
        run("pull", f"{address}:latest", "-o", f"out-{address.rpartition('/')[2]}-{address[:2]}")
    ops = [entry["op"] for entry in json.loads(run("log", store, "--json").stdout)["entries"]]
    assert ops == ["untag", "tag", "push"]
    assert "an image layout has no log" in run("log", layout, code=2).stderr


def test_an_offline_hub_and_an_absent_one_are_named(run: Run) -> None:
    assert "use a local copy" in run("pull", "hf://org/x", env={"HF_HUB_OFFLINE": "1"}, code=5).stderr
    result = run("pull", "hf://org/x", env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": ""}, code=5)
    assert "hf://org/x" in result.stderr
    assert "127.0.0.1" in result.stderr
