"""`adapterhub tag`, and the other commands on refs: what is protected, restored and deprecated."""

from __future__ import annotations

import json
from typing import Any

from adapterhub.registry.registry import Registry
from tests.conftest import Run
from tests.store.test_ref_log import registry

__all__ = ["registry"]


def test_the_commands_on_refs(run: Run, registry: Registry) -> None:
    registry.close()
    at = ("--registry", registry.root)

    def document(*args: str) -> Any:
        return json.loads(run(*args, "--json", *at).stdout)

    assert "team/sql:prod is team/sql:v1, protected" in run("tag", "team/sql:prod", "--protect", *at).stdout
    assert "is protected" in run("tag", "team/sql:v2", "prod", *at, code=6).stderr
    assert "is protected" in run("rm", "team/sql:prod", *at, code=6).stderr
    assert document("tag", "team/sql:v2", "prod", "--unprotect")["number"] == 2
    assert document("tag", "team/sql:prod", "--restore")["number"] == 1
    assert document("tag", "team/sql:prod", "--restore", "5")["number"] == 1
    assert "it is sha256:" in run("tag", "team/sql:v3", "prod", "--expect", "sha256:" + "0" * 64, *at, code=7).stderr
    assert "it is sha256:" in run("rm", "team/sql:prod", "--expect", "absent", *at, code=7).stderr
    entries = document("log", "team/sql:prod")["entries"]
    assert [(entry["seq"], entry["op"], entry["number"]) for entry in entries] == [
        (7, "tag", 1), (6, "tag", 2), (5, "unprotect", None), (4, "protect", None), (1, "push", 1)
    ]  # fmt: skip
    run("deprecate", "team/sql:v1", "use\nv3", *at)
    assert document("show", "team/sql:prod")["deprecated"] == "use\nv3"
    assert [row["deprecated"] for row in document("list")["adapters"]] == [None, None, "use\nv3"]
    for args in (["list"], ["show", "team/sql:v1"], ["pull", "team/sql:v1", "-o", "out"], ["validate", "team/sql:v1"]):
        assert run(*args, *at, code=None).stderr.count("warning: team/sql:v1 is deprecated: use v3\n") == 1
    assert "deprecate  v1" in run("log", "team/sql", *at).stdout
    run("deprecate", "team/sql:v1", "--undo", *at)
    assert run("list", *at).stderr == ""


def test_a_tag_that_pushes_set_is_refused(run: Run, registry: Registry) -> None:
    registry.close()
    for name, code in (("latest", "[latest-tag]"), ("v3", "[version-number]")):
        result = run("tag", "team/sql:v1", name, "--registry", registry.root, code=None)
        assert result.returncode
        assert result.stderr.endswith(f"{code}\n")
