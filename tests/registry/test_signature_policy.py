"""What a policy requires to be signed is stored with signatures, each for the files of that version alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.trust import keys
from tests.conftest import Run
from tests.support.adapters import Make
from tests.trust.test_signed_versions import described


@pytest.fixture
def team(tmp_path: Path) -> tuple[Path, Path]:
    secret, public = keys.generate(tmp_path / "keys" / "team")
    return secret, Path(public.source)


@pytest.fixture
def required(run: Run, team: tuple[Path, Path], tmp_path: Path) -> None:
    """A project in which what is in `team/` must be signed."""
    run("init")
    (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"team/*" = ["keys/team.pub"]\n')


def test_the_signature_in_a_folder_becomes_that_of_the_version(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = described(run, make("sql"))
    run("sign", folder, "--key", team[0])
    assert "model.sig" not in run("push", folder, "team/sql").stderr
    assert "signed as sql" in run("verify", "team/sql", "--key", team[1]).stdout
    run("push", "team/sql", "layout://x:team/sql:v1")
    run("verify", "layout://x:team/sql:v1", "--key", team[1])
    run("push", folder, "layout://y:team/sql:v1")
    run("pull", "layout://y:team/sql:v1", "-o", "out", "--require-signature", "--key", team[1])
    run("push", "out", "team/again")
    run("verify", "team/again", "--key", team[1], "--signed-as", "sql")


def test_a_signature_of_other_files_is_left_out_and_named(run: Run, make: Make, team: tuple[Path, Path]) -> None:
    folder = make("sql")  # to which a push adds adapter.json
    run("sign", folder, "--key", team[0])
    assert "model.sig is not about the files of this version" in run("push", folder, "team/sql").stderr
    assert "is not signed" in run("verify", "team/sql", "--key", team[1], code=1).stdout
    assert "model.sig is not about the files" in run("push", folder, "layout://x:team/sql:v1").stderr


def test_a_policy_requires_signatures_of_what_is_pushed(
    run: Run, make: Make, team: tuple[Path, Path], required: None, tmp_path: Path
) -> None:
    folder = described(run, make("sql"))
    for target in ("team/sql", "layout://x:team/sql:v1"):
        if target.startswith("layout"):  # which the policy knows by its whole address
            (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"*" = ["keys"]\n')
        result = run("push", folder, target, code=6)
        assert "against the policy of" in result.stderr
        assert "is not signed" in result.stderr
    assert json.loads(run("list", "--json").stdout)["adapters"] == []
    run("sign", folder, "--key", team[0])
    run("push", folder, "team/sql")
    run("push", folder, "layout://x:team/sql:v1")


def test_each_matching_pattern_must_be_met(run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path) -> None:
    other_key = keys.generate(tmp_path / "others" / "ci")[0]
    run("init")
    (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"team/*" = ["keys"]\n"*" = ["others"]\n')
    run("push", described(run, make("sql")), "free/sql", code=6)
    (tmp_path / "adapterhub.toml").rename(tmp_path / "policy")
    run("push", "sql", "team/sql")
    (tmp_path / "policy").rename(tmp_path / "adapterhub.toml")
    run("sign", "team/sql", "--key", team[0])
    assert "which is not accepted" in run("pull", "team/sql", "-o", "out", code=6).stderr
    run("sign", "team/sql", "--key", other_key)
    run("pull", "team/sql", "-o", "out")


def test_gc_removes_the_signatures_of_versions_that_are_gone(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path
) -> None:
    run("init")
    for seed, name in enumerate(("sql", "bad")):
        run("push", make(name, seed), f"team/{name}")
        run("sign", f"team/{name}", "--key", team[0])
    run("rm", "team/bad")
    run("gc", "--grace", "0")
    run("gc", "--grace", "0")  # which finds that the first one removed the manifest
    (leftover,) = (tmp_path / ".adapterhub" / "signatures" / "sha256").glob("*/*")
    digest = json.loads(run("show", "team/sql", "--json").stdout)["digest"]
    assert f"sha256:{leftover.parent.name}" == digest
    run("fsck")
