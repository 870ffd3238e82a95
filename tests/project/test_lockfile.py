"""The lock file: pulled byte for byte whatever the tags say by then, or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.project import lockfile
from adapterhub.project.lockfile import LockedAdapter
from adapterhub_converters.errors import FormatError, RefusedError, UsageError
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs
from tests.support.proxy import Exchange, Proxy

Make = Callable[..., Path]
DIGEST = "sha256:" + "0" * 64
ONE = LockedAdapter("team/sql", "team/sql:v2", "oci://host/team/sql:v2", DIGEST, 12, {"repo": "org/base"})
TEXT = f"""\
{{
  "adapters": {{
    "team/sql": {{
      "base": {{
        "repo": "org/base"
      }},
      "digest": "{DIGEST}",
      "ref": "team/sql:v2",
      "size": 12,
      "source": "oci://host/team/sql:v2"
    }}
  }},
  "version": 1
}}
"""


def run_json(run: Run, *words: object, **options: Any) -> Any:
    return json.loads(run(*words, "--json", **options).stdout)


def test_a_lock_has_one_spelling_and_records_what_was_written() -> None:
    assert lockfile.dump({"team/sql": ONE}) == TEXT
    assert lockfile.parse(TEXT, "x") == {"team/sql": ONE}
    assert lockfile.parse("", "x") == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"team/sql":', '"../sql":'),
        ('"team/sql":', '"/etc/sql":'),
        ('"team/sql":', '"a//c":'),
        ('"team/sql":', '"team/nul":'),
        ('"team/sql":', '"team/.sql":'),
        ('"team/sql":', '"":'),
        (DIGEST, "sha256:12"),
        ("12,", "-1,"),
        ("12,", "true,"),
        ('"source"', '"sauce"'),
        ('"repo"', '"repos"'),
        ('"org/base"', "3"),
        ('"version": 1', '"version": 2'),
        ("}\n", "}}\n"),
        ('"ref": "team/sql:v2"', '"ref": 2'),
        ('"base": {\n        "repo": "org/base"\n      }', '"base": []'),
    ],
)
def test_a_hostile_or_broken_lock_is_refused(old: str, new: str) -> None:
    with pytest.raises(FormatError):
        lockfile.parse(TEXT.replace(old, new, 1), "adapters.lock")


def test_names_that_would_become_one_folder_are_refused() -> None:
    with pytest.raises(FormatError, match="collides"):
        lockfile.parse(
            lockfile.dump({name: LockedAdapter(name, "x", "registry", DIGEST, 1) for name in ("team/sql", "Team/sql")}), "x"
        )
    with pytest.raises(FormatError, match="collides"):
        lockfile.parse(
            lockfile.dump({name: LockedAdapter(name, "x", "registry", DIGEST, 1) for name in ("team", "team/sql")}), "x"
        )


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("oci://host/team/sql", "team/sql"),
        ("oci://host/a/b/team/sql", "team/sql"),
        ("oci://host:5000/sql", "sql"),
        ("hf://team/sql", "team/sql"),
        ("s3://bucket/team/sql", "team/sql"),
    ],
)
def test_an_address_has_a_name(address: str, name: str) -> None:
    assert lockfile.name_of(address) == name


def test_only_what_is_locked_is_found() -> None:
    locked, path = {"team/sql": ONE}, Path("adapters.lock")
    for ref in ("team/sql", "team/sql:v2", f"team/sql@{DIGEST}", "oci://host/team/sql:v2"):
        assert lockfile.find(locked, ref, path) == ONE
    for ref, hint in (
        ("team/sql:v3", "Lock this one instead"),
        ("team/other", "Lock it"),
        ("sql", "Lock it"),
        (f"team/sql@{DIGEST[:-1]}1", "Lock this one instead"),
        ("oci://host/team/sql:v3", "Lock it"),
    ):
        with pytest.raises(RefusedError, match=rf"adapters\.lock.* {hint}$") as error:
            lockfile.find(locked, ref, path)
        assert (error.value.code, error.value.fields) == ("not-locked", {"ref": ref})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"version": 1', '"version": 2', "not a lock file of version 1"),
        ('"source"', '"sauce"', 'is not an object with "ref", "source", "digest", "size" and "base". Lock it again'),
        ('"repo"', '"repos"', '"ref", "source" and "base" are not strings. Lock it again'),
        ('"org/base"', '"org\\nbase"', '"ref", "source" and "base" are not strings. Lock it again'),
        ('"ref": "team/sql:v2"', '"ref": "team/\\u001b"', '"ref", "source" and "base" are not strings. Lock it again'),
        ("12,", "-1,", '"size" is not a number of bytes. Lock it again'),
        ("12,", f"{2**63},", '"size" is not a number of bytes. Lock it again'),
        ("12,", "12.0,", '"size" is not a number of bytes. Lock it again'),
        ('"team/sql":', '"team/-sql":', "'team/-sql' is not a valid name in adapters.lock"),
    ],
)
def test_what_a_lock_is_refused_for_is_told(old: str, new: str, says: str) -> None:
    with pytest.raises(FormatError, match=re.escape(says)):
        lockfile.parse(TEXT.replace(old, new, 1), "adapters.lock")


@pytest.mark.parametrize("size", [0, 2**63 - 1])
def test_a_lock_has_any_size_that_a_file_can_have(size: int) -> None:
    assert lockfile.parse(TEXT.replace("12,", f"{size},"), "x")["team/sql"].size == size


def manifest(**annotations: str) -> Manifest:
    layer = Descriptor("application/octet-stream", DIGEST, 7, "adapter_model.safetensors")
    return Manifest(DIGEST, b"{}", layer, (layer, dataclasses.replace(layer, path="x", size=5)), annotations)


def test_an_entry_has_the_base_of_the_manifest_as_far_as_it_is_known() -> None:
    locked_manifest = manifest(**{"io.adapterhub.base.repo": "org/base", "io.adapterhub.base.revision": "abc", "other": "x"})
    entry = lockfile.entry("team/sql", "team/sql:v2", lockfile.LOCAL_REGISTRY, locked_manifest)
    assert entry == LockedAdapter(
        "team/sql", "team/sql:v2", "registry", locked_manifest.digest, 12, {"repo": "org/base", "revision": "abc"}
    )
    with pytest.raises(FormatError, match="unprintable text about its base"):
        lockfile.entry("team/sql", "team/sql:v2", "registry", manifest(**{"io.adapterhub.base.repo": "a\x1b"}))
    with pytest.raises(FormatError, match="is not a valid name"):
        lockfile.entry("../sql", "team/sql:v2", "registry", locked_manifest)


def test_a_lock_is_recorded_next_to_what_it_has_and_only_if_it_changes(tmp_path: Path) -> None:
    path, other_entry = tmp_path / "adapters.lock", dataclasses.replace(ONE, name="team/other", ref="team/other")
    assert lockfile.record(path, {"team/sql": ONE})
    assert not lockfile.record(path, {"team/sql": ONE})
    assert lockfile.record(path, {"team/other": other_entry})
    assert lockfile.read(path) == {"team/sql": ONE, "team/other": other_entry}
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RefusedError):
        lockfile.read(tmp_path / "link")
    with pytest.raises(RefusedError):
        lockfile.record(tmp_path / "link", {"team/sql": ONE})


def test_a_lock_has_its_spelling_in_any_language(tmp_path: Path) -> None:
    assert '"repo": "größe"' in lockfile.dump({"team/sql": dataclasses.replace(ONE, base={"repo": "größe"})})


def test_of_a_locked_name_with_another_version_the_lock_tells_which_it_has() -> None:
    with pytest.raises(RefusedError, match=r"team/sql:v3: adapters\.lock has team/sql:v2 \(sha256:0{12}\)"):
        lockfile.find({"team/sql": ONE}, "team/sql:v3", Path("adapters.lock"))
    with pytest.raises(RefusedError, match=r"x: is not in adapters\.lock, which has no adapters"):
        lockfile.find({}, "x", Path("adapters.lock"))
    elsewhere = dataclasses.replace(ONE, name="other/name")
    assert lockfile.find({"other/name": elsewhere}, "team/sql:v2", Path("adapters.lock")) == elsewhere
    assert lockfile.find({"other/name": elsewhere}, ONE.source, Path("adapters.lock")) == elsewhere


def test_entries_of_a_lock_are_chosen_by_name() -> None:
    lock = {"team/sql": ONE, "team/other": ONE}
    assert lockfile.select(lock, (), Path("l")) == lock
    assert lockfile.select(lock, ("team/other",), Path("l")) == {"team/other": ONE}
    with pytest.raises(UsageError, match="x: is not a name in l. It has team/sql, team/other"):
        lockfile.select(lock, ("team/sql", "x"), Path("l"))


def test_a_link_on_the_way_to_what_is_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    lockfile.check_no_link(tmp_path / "real" / "deep" / "new", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RefusedError) as caught:
        lockfile.check_no_link(tmp_path / "link" / "deep", tmp_path)
    assert (caught.value.where, caught.value.code) == (str(tmp_path / "link"), "link-in-project")


@pytest.fixture
def team(run: Run, host: str, tmp_path: Path) -> str:
    """A remote of that name, a namespace of its own on it, and two versions of an adapter in folders."""
    run("remote", "add", "team", f"oci://{host}/{tmp_path.name.lower().replace('_', '-')}", "--default")
    base(tmp_path / "base")
    adapter(tmp_path / "one", pairs(2))
    adapter(tmp_path / "two", pairs(2), lambda _, array: array * 2)
    return host


def test_what_was_locked_is_pulled_though_the_tag_has_moved(run: Run, team: str, tmp_path: Path) -> None:
    run("push", "one", "team/sql:prod", "--remote", "--base", "base")
    run("push", "two", "team/local:prod")
    result = run("lock", "team/sql:prod", "--remote")
    assert result.stderr == "locked in adapters.lock\n"
    run("lock", "team/local:prod")
    text = (tmp_path / "adapters.lock").read_text()
    document = json.loads(text)["adapters"]
    assert document["team/sql"]["base"]["fingerprint"].startswith("sha256:")
    assert (document["team/sql"]["ref"], document["team/local"]["source"]) == ("team/sql:prod", "registry")
    assert run("lock", "team/sql:prod", "--remote").stderr == "already locked in adapters.lock\n"
    assert (tmp_path / "adapters.lock").read_text() == text

    assert run("lock", "--check").stdout == "ok: 2 adapters, none moved\n"
    digest = run_json(run, "push", "two", "team/sql:prod", "--remote")["digest"]
    run("push", "one", "team/local:prod")
    checked = run_json(run, "lock", "--check", code=1)
    assert [(row["name"], row["moved"]) for row in checked["adapters"]] == [("team/local", True), ("team/sql", True)]
    assert checked["adapters"][1]["now"] == digest
    assert "team/sql: team/sql:prod is now sha256:" in run("lock", "--check", "team/sql", code=1).stdout

    run("pull", "--locked")
    for name in ("team/sql", "team/local"):
        assert oci_manifest.build(tmp_path / "adapters" / name).digest == document[name]["digest"]
    assert run_json(run, "pull", "--locked", "team/sql", "-o", "alone")["adapters"][0]["new"] is True
    assert [adapter["new"] for adapter in run_json(run, "pull", "--locked")["adapters"]] == [False, False]

    run("lock", "--update", "team/sql")
    after = json.loads((tmp_path / "adapters.lock").read_text())["adapters"]
    assert (after["team/sql"]["digest"], after["team/local"]) == (digest, document["team/local"])
    assert [adapter["new"] for adapter in run_json(run, "pull", "--locked")["adapters"]] == [False, True]
    assert oci_manifest.build(tmp_path / "adapters/team/sql").digest == digest
    run("lock", "--update")
    assert run("lock", "--check").stdout == "ok: 2 adapters, none moved\n"
    assert "team/sql    team/sql:prod" in run("lock").stdout


def test_pull_records_what_it_pulled(run: Run, team: str, tmp_path: Path) -> None:
    run("push", "one", "team/sql:prod", "--remote")
    run("push", "one", "team/here")
    run("pull", "team/sql:prod", "--remote", "-o", "a", "--lock")
    run("pull", "team/here", "-o", "b", "--lock")
    adapters = json.loads((tmp_path / "adapters.lock").read_text())["adapters"]
    assert {name: locked_entry["digest"] for name, locked_entry in adapters.items()} == dict.fromkeys(
        ("team/sql", "team/here"), oci_manifest.build(tmp_path / "one").digest
    )
    address = adapters["team/sql"]["source"]
    run("pull", address, "-o", "c", "--lock")
    assert json.loads((tmp_path / "adapters.lock").read_text())["adapters"]["team/sql"]["ref"] == address
    error = (
        "error: --lock: records the version, not a conversion of it. Lock it with `adapterhub lock`  [conflicting-options]\n"
    )
    assert run("pull", "team/here", "--to", "mlx", "--lock", code=2).stderr == error


def test_the_lock_is_next_to_the_project_s_file(run: Run, team: str, tmp_path: Path) -> None:
    deep = tmp_path / "p/deep"
    deep.mkdir(parents=True)
    run("init", "--project", tmp_path / "p")
    run("push", "one", "team/sql")
    run("lock", "team/sql", cwd=deep)
    assert (tmp_path / "p/adapters.lock").exists()
    run("pull", "--locked", cwd=deep)
    assert (deep / "adapters/team/sql/adapter_config.json").exists()


def test_what_is_there_already_is_not_asked_for(run: Run, team: str, tmp_path: Path) -> None:
    with Proxy(team) as server:
        run("remote", "add", "counted", f"oci://{server.address}/counted")
        run("push", "one", "team/sql:v1", "--remote", "counted")
        run("lock", "team/sql:v1", "--remote", "counted")
        run("pull", "--locked")
        server.exchanges.clear()
        assert run("pull", "--locked").stdout.startswith("already there: adapters/team/sql: ")
        assert server.exchanges == []


def test_a_missing_digest_other_bytes_and_an_unlocked_ref_each_have_their_exit_code(
    run: Run, team: str, tmp_path: Path
) -> None:
    with Proxy(team) as server:
        run("remote", "add", "odd", f"oci://{server.address}/odd-{tmp_path.name.lower().replace('_', '-')}")
        run("push", "one", "team/sql:v1", "--remote", "odd")
        assert run("pull", "--locked", code=3).stderr.endswith("[no-lock-file]\n")
        run("lock", "team/sql:v1", "--remote", "odd")
        path = tmp_path / "adapters.lock"
        text = path.read_text()
        digest = json.loads(text)["adapters"]["team/sql"]["digest"]

        error_line = (
            f"error: team/other: is not in {path}, which has team/sql. Run `adapterhub lock team/other`  [not-locked]\n"
        )
        assert run("pull", "--locked", "team/other", code=6).stderr == error_line
        newer = run("pull", "--locked", "team/sql:v2", code=6).stderr
        assert f"error: team/sql:v2: {path} has team/sql:v1 (sha256:" in newer
        assert "). Run `adapterhub lock team/sql:v2`  [not-locked]" in newer
        run("pull", "--locked", "--remote", "odd", code=2)
        run("pull", code=2)

        path.write_text(text.replace(digest, "sha256:" + "0" * 64))
        assert "no such version" in run("pull", "--locked", code=3).stderr
        path.write_text(text)

        def error_line(exchange: Exchange) -> None:
            if "/blobs/" in exchange.path and exchange.method == "GET":
                exchange.data = bytes([exchange.data[0] ^ 1]) + exchange.data[1:]

        server.after = error_line
        run("pull", "--locked", code=4)

        def another(exchange: Exchange) -> None:
            if "/manifests/" in exchange.path:
                exchange.data = exchange.data.replace(b"application/vnd.cncf", b"application/vnd.cncg")
                exchange.answer.pop("docker-content-digest", None)

        server.after = another
        run("pull", "--locked", code=4)
        assert not (tmp_path / "adapters").exists() or not any((tmp_path / "adapters").rglob("*.safetensors"))
        server.after = lambda _: None
        run("pull", "--locked")

        # A tag that is gone is a finding, a registry that is gone an error.
        server.before = lambda exchange: setattr(exchange, "status", 404 if "/manifests/v1" in exchange.path else 0)
        assert "team/sql:v1 no longer exists" in run("lock", "--check", code=1).stdout
    run("lock", "--check", code=5)


def test_a_folder_that_was_changed_is_never_called_right(run: Run, team: str, tmp_path: Path) -> None:
    run("push", "one", "team/sql", "--remote")
    run("lock", "team/sql", "--remote")
    run("pull", "--locked")
    folder = tmp_path / "adapters/team/sql"
    weights = folder / "adapter_model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    run("pull", "--locked", code=2)
    weights.write_bytes(right)
    (folder / "more.txt").write_text("more")
    run("pull", "--locked", code=2)
    shutil.rmtree(folder)
    run("pull", "--locked")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lock", "--check", "--update"], "cannot be combined with --update"),
        (["lock", "--check", "--remote"], "is recorded in the lock file"),
        (["lock", "--update", "team/x"], "is not a name in"),
        (["pull", "--locked", "--lock"], "takes refs and addresses from the lock file"),
    ],
)
def test_words_that_make_no_sense_are_one_line(run: Run, tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "adapters.lock").write_text(TEXT)
    assert expected in run(*words, code=2).stderr


def test_a_missing_lock_is_one_line_with_how_to_make_one(run: Run) -> None:
    for words in (["lock"], ["lock", "--check"], ["lock", "--update"], ["pull", "--locked"]):
        assert "Run `adapterhub lock REF…`" in run(*words, code=3).stderr
