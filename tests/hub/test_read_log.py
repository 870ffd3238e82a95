"""Reads are logged: all of private and gated names, some of others, in a bounded table that admins read."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.hub import read_log, request_context
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.read_log import ReadLog, ReadPosition
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.ref import Ref
from adapterhub_converters.errors import LocalIOError, UsageError
from tests.hub.conftest import Running
from tests.hub.web.conftest import database, hide
from tests.support.hub_tenants import Tenant

__all__ = ["database"]
API = "/api/adapterhub/v1/reads"


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with a public adapter and a private one."""
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/open"))
        registry.push(adapter(2), Ref("team/secret"))
    hide(hub, "team/secret")
    return hub


def rows(hub: Running) -> dict[tuple[str, str], int]:
    with closing(open_database(hub.settings)) as tables:
        return {(row.name, row.protocol): row.count for row in read_log.reads(tables)}


def test_a_read_of_a_private_name_is_logged_before_its_bytes_and_others_by_sample(
    team: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Tenant(team, "team", "read")
    monkeypatch.setattr(random, "randrange", lambda _: 1)
    for name in ("open", "secret"):
        member.get(f"/team/{name}/resolve/main/README.md")
        member.get(f"/team/{name}/resolve/main/adapter_config.json", headers={"range": "bytes=5-"}).raise_for_status()
        member.request("HEAD", f"/team/{name}/resolve/main/adapter_config.json")
    assert rows(team) == {("team/secret", "hf"): 1}
    member.get("/v2/team/secret.v1/manifests/latest").raise_for_status()
    # The second file was counted in the same minute, and is written with what comes next.
    assert rows(team) == {("team/secret", "hf"): 2, ("team/secret", "oci"): 1}
    monkeypatch.setattr(random, "randrange", lambda _: 0)
    monkeypatch.setattr(read_log, "_MAX_PENDING", 1)
    member.get("/team/open/resolve/main/adapter_config.json").raise_for_status()
    assert rows(team)["team/open", "hf"] == 1


def test_admins_of_a_namespace_see_who_read_which_digest(team: Running) -> None:
    member, admin = Tenant(team, "team", "read"), Tenant(team, "team", "admin")
    for _ in range(3):
        member.get("/team/secret/resolve/main/adapter_config.json").raise_for_status()
    with team.registry() as registry:
        digest = registry.row(Ref("team/secret")).digest
    (row,) = admin.get(f"{API}?name=team/secret").json()["reads"]
    assert (row["account"], row["digest"], row["count"], row["protocol"]) == ("team", digest, 3, "hf")
    assert admin.get(f"{API}?name=team&before={row['time']}").json()["reads"] == []
    assert [
        tenant.get(f"{API}?name={name}").status_code for tenant, name in ((member, "team"), (admin, ""), (admin, "other"))
    ] == [403] * 3
    assert [admin.get(f"{API}?name=team&before={text}").status_code for text in ("x", "-1", "1e9", "9" * 400)] == [400] * 4


def test_pages_go_on_within_the_rows_of_one_time(team: Running, database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the time at which a page ended were on no page."""
    monkeypatch.setattr("adapterhub.hub.read_log.time.time", lambda: 1_000_000.5)
    log = ReadLog(database)
    for name in ("team/a", "team/b", "team-x/a", "other/a"):
        for digest in ("sha256:x", "sha256:y"):
            for protocol in ("hf", "oci"):
                log.record(name, digest, protocol, always=True)
    log.write()
    admin = Tenant(team, "team", "admin")
    pages, before = [], ""
    while page := (answer := admin.get(f"{API}?name=team&limit=3&before={before}").json())["reads"]:
        pages.append(page)
        before = answer["next"]
    listed = [(row["name"], row["digest"], row["protocol"]) for page in pages for row in page]
    assert [len(page) for page in pages] == [3, 3, 2]
    assert listed == [(f"team/{name}", f"sha256:{digest}", kind) for name in "ab" for digest in "xy" for kind in ("hf", "oci")]
    with pytest.raises(UsageError, match="neither a time"):
        ReadPosition.parse("1,team/a")


def test_what_could_not_be_written_is_written_later_and_as_the_hub_ends(team: Running) -> None:
    settings = team.settings
    with closing(open_database(settings)) as tables:
        log = ReadLog(tables)
        tables.execute("ALTER TABLE reads RENAME TO hidden_reads")
        for _ in range(2):
            with pytest.raises(LocalIOError):
                log.record("team/secret", "sha256:x", "hf", always=True)
        tables.execute("ALTER TABLE hidden_reads RENAME TO reads")
        log.write()
        assert [(row.name, row.count) for row in read_log.reads(tables)] == [("team/secret", 2)]
    with closing(Hub(settings)) as hub:
        hub.read_log.record("team/secret", "sha256:x", "hf", always=True)
        hub.read_log.record("team/secret", "sha256:x", "hf", always=True)
    assert rows(team) == {("team/secret", "hf"): 4}


def test_rows_are_bounded_and_the_oldest_go(database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_log, "MAX_ROWS", 3)
    clock = iter(range(1_000_000_000, 2_000_000_000, 1000))
    monkeypatch.setattr("adapterhub.hub.read_log.time.time", lambda: float(next(clock)))
    log = ReadLog(database)
    for number in range(5):
        log.record(f"team/{number}", "sha256:x", "hf", always=True)
    log.trim()
    assert [row.name for row in read_log.reads(database)] == ["team/4", "team/3", "team/2"]


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("203.0.113.77", "203.0.113.0/24"),
        ("::ffff:203.0.113.77", "203.0.113.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("somewhere", "somewhere"),
    ],
)
def test_only_the_network_of_a_stranger_is_kept(database: HubDatabase, address: str, stored: str) -> None:
    for account in ("", "ada"):
        call = request_context.begin(address)
        call.account = account
        log = ReadLog(database)
        log.record("team/sql", "sha256:x", "hf", always=True)
        log.write()
    assert {row.account: row.address for row in read_log.reads(database)} == {"": stored, "ada": address}


def test_who_reads_much_in_one_namespace_pushes_out_no_read_of_another(
    database: HubDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had read what they should not have hid it by reading files of their own until the row was the oldest."""
    monkeypatch.setattr(read_log, "MAX_ROWS", 12)
    log = ReadLog(database)
    log.record("victim/secret", "sha256:0", "hf", always=True)
    for number in range(30):
        log.record(f"{'eve' if number % 3 else 'mallory'}/own", f"sha256:{number}", "hf", always=True)
    log.trim()
    names = [read.name for read in read_log.reads(database)]
    assert {name: names.count(name) for name in sorted({*names})} == {"eve/own": 5, "mallory/own": 5, "victim/secret": 1}


@pytest.mark.parametrize(
    ("counts", "share"), [([], 0), ([5], 5), ([20], 12), ([4, 4, 4], 4), ([1, 9, 9], 5), ([2, 3, 9], 7), ([100] * 24, 0)]
)
def test_a_fair_share_is_the_most_that_all_may_keep(counts: list[int], share: int) -> None:
    assert read_log._fair_share(counts, 12) == share
