"""Commits, tags and uploads as raw requests: what a client should not send is refused in words."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.hf import commit_requests
from tests.hub.hf.conftest import Ask
from tests.hub.sending import WEIGHTS


def size_of(adapter: Callable[..., Path]) -> int:
    return (adapter(1) / WEIGHTS).stat().st_size


def test_creating_what_exists_is_a_conflict_with_the_same_body(ask: Ask) -> None:
    first = ask(
        "POST", "/api/repos/create", {"name": "My-SQL", "organization": "Team", "type": "model", "visibility": "private"}
    )
    again = ask("POST", "/api/repos/create", {"name": "team/my-sql", "private": True})
    assert (first.status, again.status) == (200, 409)
    assert first.json() == again.json()
    assert first.json()["url"].endswith("/team/my-sql")
    assert ask("GET", "/api/models/Team/My-SQL").json()["private"]
    assert ask("POST", "/api/repos/create", {"name": "sql"}, token="").status == 401


def test_a_tag_that_exists_is_a_conflict_in_words(ask: Ask, sql: str) -> None:
    for _ in range(2):
        answer = ask("POST", "/api/models/team/sql/tag/main", {"tag": "stable"})
    assert (answer.status, "exists already" in answer.json()["error"]) == (409, True)
    assert ask("DELETE", "/api/models/team/sql/tag/stable").status == 200
    assert ask("DELETE", "/api/models/team/sql/tag/stable").status == 404


def test_a_commit_on_another_parent_says_where_the_branch_is(ask: Ask, sql: str) -> None:
    lines = [
        {"key": "header", "value": {"summary": "x", "parentCommit": sql}},
        {"key": "deletedFile", "value": {"path": "README.md"}},
    ]
    assert ask("POST", "/api/models/team/sql/commit/main", "\n".join(map(json.dumps, lines))).status == 200
    lines[1] = {
        "key": "file",
        "value": {"path": "notes.json", "content": base64.b64encode(b"{}").decode(), "encoding": "base64"},
    }
    answer = ask("POST", "/api/models/team/sql/commit/main", "\n".join(map(json.dumps, lines)))
    assert (answer.status, "has moved to" in answer.json()["error"]) == (412, True)


def test_front_matter_is_checked_before_anything_is_sent(read: Ask) -> None:
    good = read(
        "POST", "/api/validate-yaml", {"repoType": "model", "content": "---\nlicense: mit\nbase_model: org/base\n---\n"}
    )
    assert (good.status, good.json()) == (200, {"errors": [], "warnings": []})
    silent = read("POST", "/api/validate-yaml", {"repoType": "model", "content": "# Title"}).json()
    assert len(silent["warnings"]) == 2
    open_ended = read("POST", "/api/validate-yaml", {"repoType": "model", "content": "---\nlicense: mit\n"})
    assert (open_ended.status, len(open_ended.json()["errors"])) == (400, 1)


def test_a_batch_is_answered_to_every_client_that_negotiates(ask: Ask, sql: str, adapter: Callable[..., Path]) -> None:
    data = (adapter(2) / WEIGHTS).read_bytes()
    oid = hashlib.sha256(data).hexdigest()
    stored_oid = hashlib.sha256((adapter(1) / WEIGHTS).read_bytes()).hexdigest()
    batch = {
        "operation": "upload", "transfers": ["basic", "multipart", "xet"], "hash_algo": "sha_256",
        "objects": [{"oid": oid, "size": len(data)}, {"oid": stored_oid, "size": size_of(adapter)}],
    }  # fmt: skip
    answer = ask("POST", "/team/sql.git/info/lfs/objects/batch", batch).json()
    assert answer["transfer"] == "basic"
    new, stored_object = answer["objects"]
    assert "actions" not in stored_object
    href = new["actions"]["upload"]["href"]
    assert ask("POST", href, {"oid": oid, "size": len(data)}, token="").status == 404
    assert ask("PUT", href, data[:-1], token="").status == 400
    assert ask("PUT", href, data[:-1] + b"x", token="").status == 400
    assert ask("PUT", f"{href[:-1]}é", data, token="").status == 403
    assert ask("PUT", href, data, token="").status == 200
    assert ask("POST", href, {"oid": oid, "size": len(data)}, token="").status == 200
    down = ask("POST", "/team/sql.git/info/lfs/objects/batch", {**batch, "operation": "download"}, token="").json()
    # What is only uploaded, and in no version yet, is nobody's to read but those who may write.
    assert down["objects"][1]["actions"]["download"]["href"]


def test_main_and_what_is_no_branch_are_not_deleted(read: Ask) -> None:
    for branch, status, words in (("main", 400, "the main branch cannot be deleted"), ("none", 404, "no such branch")):
        answer = read("DELETE", f"/api/models/team/sql/branch/{branch}")
        assert (answer.status, answer.json()["error"]) == (status, f"team/sql@{branch}: {words}")


def test_lines_that_are_no_commit_are_refused(read: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_requests, "_MAX_LINE", 1000)
    for line, status, words in (
        (b'{"key": "header", "value": 1}', 400, "commit: the value of a line is not an object"),
        (b'{"key": "file"}', 400, "commit: the value of a line is not an object"),
        (b" " * 1001, 413, "a line of more than 1,000 bytes: upload large files on their own"),
    ):
        answer = read("POST", "/api/models/team/sql/commit/main", line)
        assert (answer.status, answer.json()["error"]) == (status, words)


def commit_of(key: str, **value: Any) -> str:
    return json.dumps({"key": key, "value": value})


REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/api/repos/create", {"name": "x", "type": "space"}, 501, "this hub has adapters (type model), no spaces"),
    ("POST", "/api/repos/move", {"fromRepo": "team/sql", "toRepo": "Team/SQL"}, 409,
     "team/sql: exists already. Choose another name"),
    ("POST", "/api/models/team/sql/branch/-x", {}, 400,
     "-x: cannot be the name of a branch or a tag. Use letters, digits and . _ -"),
    ("POST", "/api/models/team/sql/tag/main", {"tag": "latest"}, 400,
     "latest: cannot be the name of a branch or a tag. Use letters, digits and . _ -"),
    ("POST", "/api/models/team/sql/preupload/main", {"files": [{"path": "a.txt", "size": 10**15}]}, 400,
     "team/sql: a.txt: a file may have at most 1,099,511,627,776 bytes"),
    ("POST", "/api/models/team/sql/commit/main", commit_of("x"), 400, "commit: a line of the unknown kind 'x'"),
    ("POST", "/api/models/team/sql/commit/main", commit_of("deletedFile", path="x" * 5000), 400,
     f"team/sql: {'x' * 80}: a path of more than 1024 characters. Rename the file"),
    ("POST", "/api/models/team/sql/commit/main", commit_of("file", path="a.md", encoding="utf-8"), 400,
     "commit: a.md: the encoding 'utf-8' is not known"),
    ("POST", "/api/models/team/sql/commit/main", commit_of("lfsFile", path="a.md", oid="x"), 400,
     "commit: a.md: 'x' is not a sha256"),
    ("POST", "/api/models/team/sql/commit/main", commit_of("lfsFile", path="a.md", oid="0" * 64), 400,
     f"team/sql: a.md: sha256:{'0' * 64} was not uploaded. Upload it again"),
    ("POST", "/api/models/team/sql/commit/none", commit_of("header"), 404, "team/sql@none: no such branch"),
    ("POST", "/api/models/team/sql/commit/v1", commit_of("header"), 400,
     "team/sql@v1: is not a branch. Commit to main, or create a branch first"),
    ("POST", "/team/sql.git/info/lfs/objects/batch", {"objects": 1}, 400, "objects: not a list of at most 1000 objects"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "sent", "status", "words"), REFUSED)
def test_what_a_client_should_not_send_is_refused_in_words(
    read: Ask, method: str, path: str, sent: Any, status: int, words: str
) -> None:
    answer = read(method, path, sent)
    assert (answer.status, answer.headers["x-error-message"]) == (status, words)


def test_a_commit_is_bounded(read: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_requests, "MAX_FILES", 1)
    lines = "\n".join(commit_of("deletedFile", path=path) for path in "ab")
    monkeypatch.setattr(commit_requests, "_MAX_COMMIT", len(lines))
    for sent, status, words in (
        (lines, 400, "team/sql: more than 1 files"),
        (f"{lines}\n", 413, f"A body has at most {len(lines)} bytes here"),
    ):
        answer = read("POST", "/api/models/team/sql/commit/main", sent)
        assert (answer.status, answer.json()["error"]) == (status, words)


def test_a_removed_name_is_given_to_nothing_else_and_only_a_version_gets_a_tag(ask: Ask, sql: str) -> None:
    ask("POST", "/api/repos/create", {"name": "team/soon"})
    card = commit_of("file", path="README.md", content=base64.b64encode(b"# Soon").decode(), encoding="base64")
    assert ask("POST", "/api/models/team/soon/commit/main", card).status == 200
    tagged = ask("POST", "/api/models/team/soon/tag/main", {"tag": "x"})
    reason = "team/soon@main: is not a whole adapter, and only versions have tags. Upload the rest first"
    assert (tagged.status, tagged.json()["error"]) == (400, reason)
    assert ask("DELETE", "/api/repos/delete", {"name": "team/sql"}).status == 200
    for path, fields in (
        ("/api/repos/create", {"name": "team/sql"}),
        ("/api/repos/move", {"fromRepo": "team/soon", "toRepo": "team/sql"}),
    ):
        refused = ask("POST", path, fields)
        reason = "team/sql: this name was removed. Ask the operator to restore it, or choose another name"
        assert (refused.status, refused.json()["error"]) == (400, reason)


@pytest.mark.parametrize("object_entry", [{}, {"oid": "x", "size": 1}, {"oid": "0" * 64}, {"oid": "0" * 64, "size": -1}, 5])
def test_an_object_of_a_batch_has_a_sha256_and_a_size(read: Ask, object_entry: Any) -> None:
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [object_entry]}
    answer = read("POST", "/team/sql.git/info/lfs/objects/batch", batch)
    assert (answer.status, answer.headers["x-error-message"]) == (
        400,
        "objects: an object has no sha256 as its oid, or no size in bytes",
    )


@pytest.mark.parametrize("text", ["-", "ø"])
def test_bytes_that_are_not_base64_are_refused(ask: Ask, text: str) -> None:
    ask("POST", "/api/repos/create", {"organization": "team", "name": "sql"})
    line = {"key": "file", "value": {"path": "README.md", "content": text, "encoding": "base64"}}
    refused = ask("POST", "/api/models/team/sql/commit/main", json.dumps(line).encode())
    assert (refused.status, refused.json()["error"]) == (400, "commit: README.md: not base64")
    offered = {"files": [{"path": "README.md", "size": 1, "sample": text}]}
    assert ask("POST", "/api/models/team/sql/preupload/main", offered).status == (400 if text == "ø" else 200)


def test_a_line_break_in_a_path_is_refused_as_any_unknown_name(read: Ask) -> None:
    folder = read("GET", "/api/models/team/sql/tree/main/a%0Ab")
    assert (folder.status, folder.headers["x-error-code"]) == (404, "EntryNotFound")
    assert read("GET", "/team/sql/resolve/main/a%0Ab").headers["x-error-code"] == "EntryNotFound"
    assert read("GET", "/v2/team/a%0Ab/tags/list").json()["errors"][0]["code"] == "NAME_UNKNOWN"
