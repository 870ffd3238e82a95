"""Around every request: limits of rates as hf reads them, failed logins, and the audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.http_server.rate_windows import Windows
from adapterhub.hub.accounts import audit_log
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.middleware import class_of
from tests.conftest import Run
from tests.hub.conftest import Running, client, serving


def get(hub: Running, path: str, token: str = "") -> Any:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return urllib3.request("GET", hub.url + path, headers=headers, retries=False)


# ---- rates


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Running]:
    """A hub that allows three requests of its API in a minute."""
    with serving(tmp_path / "limited", limits={"api": (3, 60)}) as running:
        yield running


def test_a_window_ends() -> None:
    now = 0.0
    windows = Windows(2, 10, clock=lambda: now)
    assert [windows.count("a").over for _ in range(3)] == [False, False, True]
    assert not windows.count("b").over
    assert windows.count("b", 0) == windows.count("b", 0)  # a look counts nothing
    assert (windows.count("b", 7).over, windows.count("b", 0).over) == (False, True)
    now = 10.0
    window = windows.count("a")
    assert (window.over, window.remaining, window.seconds) == (False, 1, 10)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/models", "api"), ("/team/sql.git/info/lfs/objects/batch", "api"), ("/v2/team/sql/manifests/v1", "api"),
        ("/oauth/token", "api"), ("/team/sql/resolve/main/a", "resolvers"), ("/lfs/team/sql/00", "resolvers"),
        ("/v2/team/sql/blobs/sha256:00", "resolvers"), ("/", "pages"), ("/team/sql", "pages"), ("/health", ""),
    ],
)  # fmt: skip
def test_the_class_of_a_request(path: str, kind: str) -> None:
    assert class_of(path) == kind


def test_a_rate_is_limited_in_the_headers_that_hf_reads(limited: Running) -> None:
    from huggingface_hub.utils import parse_ratelimit_headers

    answers = [get(limited, "/api/models") for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    rate_limit = parse_ratelimit_headers(answers[-1].headers)
    assert rate_limit
    assert (rate_limit.resource_type, rate_limit.remaining, rate_limit.limit, rate_limit.window_seconds) == ("api", 0, 3, 60)
    assert int(answers[-1].headers["retry-after"]) <= 60
    assert get(limited, "/health").status == 200
    assert get(limited, "/api/models", limited.token).status == 200  # a token has a window of its own


def test_bad_tokens_are_throttled_and_a_good_one_is_not(hub: Running) -> None:
    status = [get(hub, "/api/whoami-v2", "hf_no").status for _ in range(25)]
    assert status == [401] * 20 + [429] * 5
    assert get(hub, "/api/whoami-v2", hub.token).status == 200


# ---- the audit log


def recorded(hub: Running) -> list[tuple[str, str, str]]:
    with closing(HubDatabase(hub.folder)) as database:
        return [(event.account, event.action, event.name) for event in reversed(audit_log.events(database))]


def test_every_change_is_recorded_and_reading_is_not(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    hf.create_repo("team/sql")
    hf.upload_folder(folder_path=adapter(1), repo_id="team/sql")
    hf.create_tag("team/sql", tag="prod")
    hf.model_info("team/sql")
    hf.move_repo("team/sql", "team/new")
    hf.delete_repo("team/new")
    assert recorded(hub) == [
        ("alice", "hf.create", "team/sql"),
        ("alice", "hf.commit", "team/sql"),
        ("alice", "hf.create_tag", "team/sql"),
        ("alice", "hf.move", "team/sql team/new"),
        ("alice", "hf.delete", "team/new"),
    ]


def test_refusals_are_recorded_without_the_token(hub: Running, hf: Any) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    get(hub, "/api/whoami-v2", "hf_secretsecret")
    reader = client(Running(hub.url, hub.settings, hub.make_token("bob", "read")), hub.folder)
    with pytest.raises(HfHubHTTPError):
        reader.create_repo("team/sql")
    assert recorded(hub) == [("", "refused", ""), ("bob", "refused", "team/sql")]
    with closing(HubDatabase(hub.folder)) as database:
        assert "secret" not in str(audit_log.events(database))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit SET account = 'eve' WHERE id = 2",
        "DELETE FROM audit WHERE id = 2",
        "UPDATE audit SET id = id + 1 WHERE id = 3",
    ],
)
def test_a_changed_row_breaks_the_chain(run: Run, tmp_path: Path, change: str) -> None:
    for name in ("ada", "bob", "eve"):
        run("hub", "user", "add", name, "--registry", tmp_path / "hub")
    verified = run("hub", "log", "--verify", "--registry", tmp_path / "hub").stderr
    assert verified == "verified: each row up to 3 follows from the one before\n"
    with closing(HubDatabase(tmp_path / "hub")) as database:
        database.execute(change)
    assert "audit row" in run("hub", "log", "--verify", "--registry", tmp_path / "hub", code=4).stderr
