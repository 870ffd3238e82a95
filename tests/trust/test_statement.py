"""The statement that is signed: its files come back, any other form is refused, and differences of files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.trust import statement
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
SQL = Statement("team/sql/v1", {"adapter_model.safetensors": A, "docs/README.md": B})


def test_a_statement_is_read_as_it_was_written() -> None:
    assert statement.parse(SQL.dump(), "sql") == SQL


def test_files_are_in_the_order_of_model_signing_whatever_order_they_came_in() -> None:
    files = {"a.txt": A, "a/b": B}
    assert Statement("sql", files).dump() == Statement("sql", dict(reversed(files.items()))).dump()
    assert list(statement.parse(Statement("sql", files).dump(), "sql").files) == ["a/b", "a.txt"]  # by parts of paths


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("_type",), "https://in-toto.io/Statement/v0.1", "does not sign a statement of the type"),
        (("predicateType",), "https://slsa.dev/provenance/v1", "not https://model_signing/signature"),
        (("subject",), [], "exactly one subject"),
        (("subject", 0, "name"), "", "a subject without a name"),
        (("subject", 0, "digest"), {"sha256": "0" * 64}, "is not that of its files"),
        (("predicate", "serialization", "method"), "shards", "not whole files"),
        (("predicate", "serialization", "hash_type"), "blake2b", "not sha256"),
        (("predicate", "resources"), [], "signs no files"),
        (("predicate", "resources", 1, "name"), "adapter_model.safetensors", "twice"),
        (("predicate", "resources", 0, "digest"), "A" * 64, "not a sha256 digest"),
    ],
)
def test_another_form_is_refused_by_its_reason(path: tuple[Any, ...], value: object, problem: str) -> None:
    document = json.loads(SQL.dump())
    *above, last = path
    parent = document
    for key in above:
        parent = parent[key]
    parent[last] = value
    with pytest.raises(FormatError, match=problem):
        statement.parse(json.dumps(document).encode(), "sql")


def test_every_file_that_differs_is_named() -> None:
    SQL.check_files(SQL.files, "sql")
    with pytest.raises(IntegrityError) as caught:
        SQL.check_files({"adapter_model.safetensors": B, "more.txt": A}, "sql")
    assert all(
        words in str(caught.value) for words in ("safetensors (changed)", "README.md (missing)", "more.txt (not signed)")
    )
    assert caught.value.code == "signature"


@pytest.mark.parametrize("name", ["team/sql:v1", "https://hub.example/team/sql:v1"])
def test_a_name_is_that_which_was_signed_or_ends_in_it(name: str) -> None:
    SQL.check_name(name, "sql")
    with pytest.raises(IntegrityError, match="the signature is for 'team/sql/v1'") as caught:
        SQL.check_name(name.replace("sql", "nosql"), "sql")
    assert caught.value.code == "signature-name"


def test_files_of_a_folder_are_those_that_are_signed_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", ".hidden", "sub/b.txt", SIGNATURE, ".gitignore"):
        (tmp_path / name).write_text("x")
    assert sorted(statement.files_in(tmp_path)) == [".hidden", "a.txt", "sub/b.txt"]
    (tmp_path / "link").symlink_to("a.txt")
    with pytest.raises(RefusedError, match="link"):
        statement.files_in(tmp_path)
    with pytest.raises(NotFoundError, match="no such folder"):
        statement.files_in(tmp_path / "none")


@pytest.mark.parametrize(
    ("repo", "revision", "purl"),
    [
        (None, "abc", ""),
        ("gpt2", None, "pkg:huggingface/gpt2"),
        ("Qwen/Qwen3-0.6B", "C1899DE2", "pkg:huggingface/Qwen/Qwen3-0.6B@c1899de2"),
        ("a/b c", "x@y", "pkg:huggingface/a/b%20c@x%40y"),
    ],
)
def test_a_base_has_the_package_url_of_its_repository(repo: str | None, revision: str | None, purl: str) -> None:
    assert statement.hub_purl(repo, revision) == purl
