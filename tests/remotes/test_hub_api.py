"""The API of a hub: its errors are ours about an address, a change is not sent twice, and hubs without it are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import Ref
from adapterhub.remotes.hub.hub_catalog import HubCatalog
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    RemoteError,
    UsageError,
)
from tests.conftest import Run
from tests.support.hub_answers import answering, connect

DIGEST = "sha256:" + "a" * 64
MANIFEST = Manifest(DIGEST, b"{}", Descriptor("", DIGEST, 2), (), {})


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("not-found", NotFoundError),
        ("conflict", ConflictError),
        ("refused", RefusedError),
        ("integrity", IntegrityError),
        ("usage", UsageError),
        ("bug", RemoteError),
        (["x"], RemoteError),
    ],
)
def test_an_error_of_the_hub_is_one_of_ours_about_an_address(kind: Any, error: type[AdapterhubError]) -> None:
    document = {
        "kind": kind, "where": "team/sql:v9", "what": "no such\nversion\x1b[2J", "hint": "x" * 5000, "code": "no-such-tag",
        "fields": {"repository": "team/sql", "n": 1},
    }  # fmt: skip
    with answering(document, status=400) as address, connect(address) as catalog:
        with pytest.raises(error) as caught:
            catalog.show(Ref("team/sql", number=9))
        if error is not RemoteError:
            assert caught.value.where == f"{catalog.location}/team/sql@v9"
            assert caught.value.fields == {"repository": f"{catalog.location}/team/sql", "registry": catalog.location}
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


def test_an_unknown_code_or_one_without_its_fields_still_prints_a_line(run: Run) -> None:
    for code in ("no-such-tag", "made-up", "internal-error"):
        document = {"kind": "not-found", "where": "team/sql", "what": "gone", "code": code, "fields": {}}
        with answering(document, status=404) as address:
            lines = run("log", address.repository, code=3).stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: hub+http://")


def test_a_hub_does_not_fill_in_the_host_of_a_login_that_a_hint_shows(run: Run) -> None:
    error = {"kind": "refused", "what": "no", "code": "login-required", "fields": {"host": "evil.example"}}
    with answering(error, status=403) as address:
        assert "evil.example" not in run("log", address.repository, code=6).stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda hub: hub.tag(Ref("team/sql"), "prod", expect=DIGEST),
        lambda hub: hub.rm(Ref("team/sql", tag="prod"), expect=DIGEST),
        lambda hub: hub.publish("team/sql", MANIFEST, tags=["prod"], expect=DIGEST, message="", metrics={}),
        lambda hub: hub.restore("team/sql"),
    ],
    ids=("tag", "rm", "publish", "restore"),
)
def test_a_change_that_would_not_be_made_twice_is_not_sent_again(change: Callable[[HubCatalog], object]) -> None:
    with answering({}, status=503) as address, connect(address) as hub, pytest.raises(RemoteError, match="may have been made"):
        change(hub)


def test_another_hub_an_older_hub_and_one_with_another_api_are_told_apart(run: Run) -> None:
    with answering({}, status=404, about=None) as address:
        assert "[local-only]" in run("lineage", address.repository, code=2).stderr
        assert "[local-only]" in run("deprecate", address.repository, code=2).stderr
        run("remote", "add", "other", address.login, "--default")
        for words in (["search", "sql"], ["du"], ["search", "--sha256", "a" * 64]):
            assert f"{address.login}: has no " in (line := run(*words, "--remote", code=2).stderr)
            assert "[hub-only]" in line
    for about in (None, {"program": "adapterhub", "api": [2]}, {"program": "adapterhub", "api": "1"}):
        with answering({"info": {"title": "adapterhub"}}, about=about) as address:
            result = run("log", address.repository, code=5)
            assert "runs an adapterhub without the API that this command needs" in result.stderr
            assert "[older-hub]" in result.stderr
