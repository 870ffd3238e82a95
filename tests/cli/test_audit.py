"""`adapterhub audit`: what is printed, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Run
from tests.support.adapters import Make


def test_a_registry_is_verified_and_noted(run: Run, make: Make, tmp_path: Path) -> None:
    run("push", make("sql"), "team/sql", "--registry", "r")
    run("tag", "team/sql:v1", "prod", "--registry", "r")
    run("key", "generate", "audit")
    alone = run("audit", "verify", "--registry", "r").stdout
    assert alone == (
        "r: 2 entries of 1 log follow each from the one before; without a checkpoint, nothing shows what is missing at an end\n"
    )
    signed = run("audit", "checkpoint", "-o", "c.json", "--key", "audit.key", "--registry", "r").stdout
    assert signed == "c.json: 2 entries of 1 log signed\n"
    assert (
        "already exists" in run("audit", "checkpoint", "-o", "c.json", "--key", "audit.key", "--registry", "r", code=2).stderr
    )

    words = ("audit", "verify", "--registry", "r", "--checkpoint", "c.json", "--key", "audit.pub")
    assert "and go on from the checkpoint of 20" in run(*words).stdout
    (tmp_path / "r/.adapterhub/refs/team/sql/00000002.json").unlink()
    cut = run(*words, code=1).stdout
    assert "error[truncated] refs/team/sql/00000002.json: is missing, and the checkpoint has 2 entries" in cut
    document = json.loads(run(*words, "--json", code=1).stdout)
    assert [(finding["code"], finding["where"]) for finding in document["findings"]] == [
        ("truncated", "refs/team/sql/00000002.json")
    ]


def test_a_checkpoint_needs_a_key(run: Run) -> None:
    assert "--checkpoint and --key: require each other" in run("audit", "verify", "--checkpoint", "c.json", code=2).stderr
