"""No table of a hub or of a gateway grows for ever by what a member does again and again.

The tables are those that the databases have: a new one needs a line here that says what bounds it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from adapterhub.hub import webhooks
from adapterhub.hub.accounts import access_tokens, device_logins, sessions
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.webhooks import Webhooks
from adapterhub.serve.usage import answer_log
from adapterhub.serve.usage.answer_log import AnswerRecord, Feedback
from adapterhub.serve.usage.usage_database import UsageDatabase
from adapterhub.store.ref_log import RefLog
from adapterhub.store.store import Entry, Store
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

ROUNDS, MOST = 12, 5
BOUNDED_OTHERWISE = {
    "accounts": "made by admins, or at a first sign-in at a provider",
    "identities": "one for each of those",
    "members": "made by admins of a namespace, of accounts that exist",
    "namespaces": "one for each namespace, by its admins",
    "publishers": "50 of a namespace",
    "webhooks": "50 of a namespace",
    "admissions": "made by admins of the hub",
    "quota_requests": "one of a namespace",
    "secrets": "the hub's own",
    "jobs": "removed when the work ends",
    "moves": "removed when a repository has moved",
    "announced": "one of a repository, whose log counts",
    "downloads": "one of a version, a day and a protocol, and after 400 days of a year (tests/hub/test_downloads)",
    "mirrored": "what a mirror may fetch (test_hub_upstream, tests/hub/test_mirror)",
    "upstream_cache": "what the cache may hold (tests/hub/upstream)",
    "audit": "200,000 rows (test_hub_audit)",
    "audit_cuts": "one for 100,000 of those",
    "devices": "1,000 (tests/hub/accounts/test_devices)",
    "gates": "one of a name, with 10,000 characters",
    "access_requests": "500 of an account, and 10,000 that a namespace gives unasked (tests/hub/test_gated)",
    "stars": "10,000 of an account, one for a name",
    "reads": "200,000 (tests/hub/test_read_log)",
    "batches": "one of a gateway that was killed, for 400 days",
    "arriving": "20,000 of a namespace (test_hub_refusals)",
    "proposals": "100 open ones of a namespace, 30 an hour of an account; closed ones are forgotten after two days",
    "replications": "one of a target of the operator",
    "replicated": "one of a name and a target",
    "uploaded": "forgotten after two days; each counts as a file",
    "xet_epochs": "one of a repository",
    "exchanged": "until the token of a job expires",
    "answers": "the newest million (tests/serve/usage)",
    "usage": "10,000 of an hour, for 400 days",
    "key_days": "one of a key and a day",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path / "hub") as running:
        yield running


def again_and_again(hub: Running, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    red = Tenant(hub, "red", "admin")
    with closing(HubDatabase(hub.folder)) as database:
        FLOODS[table](hub, red, database, monkeypatch)
        assert 0 < database.select(f"SELECT count(*) FROM {table.partition(' ')[0]}")[0][0] <= MOST + 1


def sign_in(hub: Running, red: Tenant, _database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MAX_SESSIONS", MOST)
    for _ in range(ROUNDS):
        fields = {"token": red.token}
        assert requests.post(f"{hub.url}/-/sign-in", data=fields, timeout=20, allow_redirects=False).status_code == 303


def revoke_tokens(_hub: Running, red: Tenant, _database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_tokens, "_MAX_ENDED", MOST - 3)  # beside the two that the hub has, and the last one
    for _ in range(ROUNDS):
        answer = red.post("/api/adapterhub/v1/account/tokens", json={"name": "x", "role": "read"})
        ident = answer.json()["token"]["id"] if "id" not in answer.json() else answer.json()["id"]
        assert red.request("DELETE", f"/api/adapterhub/v1/account/tokens/{ident}").ok


def exchange_tokens(_hub: Running, _red: Tenant, database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each job of a CI system does, whose token then expires."""
    monkeypatch.setattr(access_tokens, "_MAX_ENDED", MOST - 3)
    for _ in range(ROUNDS):
        access_tokens.create(database, "ci", "write", kind=access_tokens.EXCHANGE, lifetime=60.0)
        database.execute("UPDATE tokens SET expires = expires - 3600 WHERE kind = ?", access_tokens.EXCHANGE)


def renew_login(_hub: Running, red: Tenant, database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_logins, "_MAX_USED", MOST)
    device, code = device_logins.begin(database, "")
    device_logins.approve(database, code, Identity(red.name, "admin", roles={}))
    grant = device_logins.collect(database, device)
    for _ in range(ROUNDS):
        grant = device_logins.renew(database, grant.refresh)


def cause_events(hub: Running, _red: Tenant, database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_MAX_EVENTS", MOST)
    webhooks.add(database, "red", "https://hooks.example/x")
    log = RefLog(Store(hub.folder / ".adapterhub").files)
    sender = Webhooks(database, log)
    head = ""
    for number in range(1, ROUNDS + 1):
        entry = Entry("red/sql", number, "delete", "9999-01-01T00:00:00Z", previous=head)
        head = append(log, entry)
        sender.announce(entry)


def append(log: RefLog, entry: Entry) -> str:
    """Write an entry of a log as it is; its digest."""
    path = log.path(entry.name, entry.seq)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(entry.dump())
    return f"sha256:{hashlib.sha256(entry.dump()).hexdigest()}"


def send_by_sha512(hub: Running, red: Tenant, _database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(ROUNDS):
        data = str(number).encode()
        digest = hashlib.sha512(data).hexdigest()
        assert red.post(f"/v2/red/open/blobs/uploads/?digest=sha512:{digest}", data=data).status_code == 201
    blobs = sorted((hub.folder / ".adapterhub/blobs/sha256").iterdir())
    for path in blobs[MOST:]:  # as a gc does, once a day has gone by
        path.chmod(0o600)
        path.unlink()
    opened = Hub(HubSettings(registry=hub.folder))
    try:
        opened._forget_sha512()
    finally:
        opened.close()


def convert(hub: Running, _red: Tenant, database: HubDatabase, _monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions that are removed later, as their conversions are by a gc."""
    with hub.registry() as registry:
        kept_digests = [registry.store.put_bytes(str(number).encode())[0] for number in range(MOST)]
    missing_digests = [f"sha256:{number:064x}" for number in range(ROUNDS)]
    for number, digest in enumerate([*kept_digests, *missing_digests]):
        database.execute("INSERT INTO forms (source, form, digest) VALUES (?, 'mlx', ?)", f"sha256:{number:064}", digest)
    opened = Hub(HubSettings(registry=hub.folder))
    try:
        opened.conversions.forget_removed()
    finally:
        opened.close()


Flood = Callable[[Running, Tenant, HubDatabase, pytest.MonkeyPatch], None]
FLOODS: dict[str, Flood] = {
    "sessions": sign_in, "tokens": revoke_tokens, "tokens of jobs": exchange_tokens, "refreshes": renew_login,
    "deliveries": cause_events, "sha512": send_by_sha512, "forms": convert,
}  # fmt: skip


def tables_of(database: HubDatabase | UsageDatabase) -> set[str]:
    return {name for (name,) in database.select("SELECT name FROM sqlite_master WHERE type = 'table'")} - {"sqlite_sequence"}


def test_every_table_has_a_bound(tmp_path: Path) -> None:
    with closing(HubDatabase(tmp_path)) as hub_database, closing(UsageDatabase(tmp_path / "usage.db")) as usage_database:
        tables = tables_of(hub_database) | tables_of(usage_database)
    assert tables == {*BOUNDED_OTHERWISE, *(table.partition(" ")[0] for table in FLOODS), "feedback"}


@pytest.mark.parametrize("table", FLOODS)
def test_what_a_member_does_again_and_again_leaves_a_bounded_number_of_rows(
    hub: Running, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """A session for each sign-in, a row for each token ever made, and each event of a webhook that answers nobody stayed."""
    again_and_again(hub, monkeypatch, table)


def test_feedback_ends_with_the_answers_that_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "MAX_ANSWERS", MOST)
    with closing(UsageDatabase(tmp_path / "usage.db")) as database:
        for number in range(ROUNDS):
            now = time.time() + number
            shared = {"key": "ci", "version": "v", "route": "", "arm": ""}
            answer = AnswerRecord(f"r{number}", "", now, **shared, engine="e", path="/", status=200, seconds=1.0,
                                  prompt_tokens=1, answer_tokens=1)  # fmt: skip
            with database.transaction():
                database.add_answers([answer], [Feedback(f"r{number}", **shared, time=now + 0.5, score=1.0)])
        assert database.select("SELECT count(*) FROM feedback")[0][0] == MOST
        assert database.select("SELECT min(request) FROM feedback") == database.select("SELECT min(request) FROM answers")


def test_the_id_of_a_token_is_never_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended with a token would come back with the next one of its id."""
    monkeypatch.setattr(access_tokens, "_MAX_ENDED", 0)
    with closing(HubDatabase(tmp_path)) as database:
        idents = []
        for _ in range(3):
            token = access_tokens.create(database, "ada", "read")
            identity = access_tokens.identify(database, token)
            assert identity
            idents.append(identity.token)
            access_tokens.revoke(database, identity.token)
        assert len(set(idents)) == 3
