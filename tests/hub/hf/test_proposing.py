"""A proposal is a commit by who may read, which changes nothing until who may write accepts it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from adapterhub.hub import access_control, gates, proposals, quotas, webhooks
from adapterhub.hub.accounts import accounts
from adapterhub.hub.gates import Gate
from adapterhub.hub.hf import proposing
from adapterhub.hub.hub import Hub
from adapterhub.hub.storage.from_settings import open_database, open_storage
from adapterhub.hub.webhooks import Webhooks
from adapterhub.hub.workers import Workers
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry import repository_records
from adapterhub.registry.repository_records import Repositories
from adapterhub_converters.errors import LocalIOError
from tests.hub.conftest import Running, client, run_hf, serving
from tests.hub.sending import WEIGHTS, Answer, Sending, commit_of, lines_of
from tests.hub.web.conftest import hide


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with team/sql."""
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    return hub


@pytest.fixture
def reader(team: Running, tmp_path: Path) -> Any:
    """`HfApi` of an account that may read team/sql."""
    api = client(team, tmp_path)
    api.token = team.make_token("ada", "read")
    return api


def test_hf_upload_of_a_reader_is_a_proposal_and_the_version_stays(
    team: Running, reader: HfApi, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    proposed = reader.upload_folder(
        repo_id="team/sql", folder_path=adapter(2), create_pr=True, commit_message="Better", commit_description="By hand"
    )
    assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
    assert proposed.pr_url == f"{team.url}/team/sql/discussions/1"
    weights = reader.hf_hub_download(
        "team/sql", "adapter_model.safetensors", revision="refs/pr/1", cache_dir=tmp_path / "cache"
    )
    assert Path(weights).read_bytes() == (adapter(2) / "adapter_model.safetensors").read_bytes()
    refs = reader.list_repo_refs("team/sql", include_pull_requests=True)
    assert refs.pull_requests is not None
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert [branch.name for branch in refs.branches] == ["main"]
    with team.registry() as registry:
        assert [row.number for row in registry.list("team/sql")] == [1]


def test_the_calls_of_a_client_list_show_merge_and_close_proposals(
    team: Running, hf: HfApi, reader: HfApi, adapter: Callable[..., Path]
) -> None:
    for seed in (2, 3, 4):
        reader.upload_folder(repo_id="team/sql", folder_path=adapter(seed), create_pr=True, commit_message=f"Take {seed}")
    listed = list(hf.get_repo_discussions("team/sql", discussion_type="pull_request", discussion_status="open"))
    assert [(entry.num, entry.title, entry.author, entry.git_reference) for entry in listed] == [
        (3, "Take 4", "ada", "refs/pr/3"), (2, "Take 3", "ada", "refs/pr/2"), (1, "Take 2", "ada", "refs/pr/1"),
    ]  # fmt: skip
    assert list(hf.get_repo_discussions("team/sql", discussion_type="discussion")) == []
    assert list(hf.get_repo_discussions("team/sql", author="eve")) == []
    with pytest.raises(HfHubHTTPError, match="needs the role write"):
        reader.merge_pull_request("team/sql", 1)
    hf.merge_pull_request("team/sql", 1, comment="thanks")
    merged = hf.get_discussion_details("team/sql", 1)
    assert (merged.status, merged.target_branch) == ("merged", "refs/heads/main")
    assert merged.merge_commit_oid == hf.model_info("team/sql").sha
    assert hf.get_discussion_details("team/sql", 2).conflicting_files == ["adapter_model.safetensors"]
    assert hf.change_discussion_status("team/sql", 2, "closed", comment="worse").new_status == "closed"
    assert reader.change_discussion_status("team/sql", 3, "closed").new_status == "closed"
    with pytest.raises(HfHubHTTPError, match="open another one"):
        hf.change_discussion_status("team/sql", 2, "open")
    closed = list(hf.get_repo_discussions("team/sql", discussion_status="closed"))
    assert [(entry.num, entry.status) for entry in closed] == [(3, "closed"), (2, "closed"), (1, "merged")]


def test_the_answer_to_a_merge_names_the_commit(team: Running, reader: HfApi, adapter: Callable[..., Path]) -> None:
    reader.upload_folder(repo_id="team/sql", folder_path=adapter(2), create_pr=True)
    address, headers = f"{team.url}/api/models/team/sql/discussions/1/merge", {"authorization": f"Bearer {team.token}"}
    answer = requests.post(address, headers=headers, timeout=60)
    assert answer.json() == {"mergeCommitId": HfApi(team.url).model_info("team/sql").sha}


API = "/api/adapterhub/v1/names/team/sql/proposals"


@pytest.fixture
def maintainer(team: Running) -> Sending:
    return Sending(team.url, team.token)


@pytest.fixture
def ada(team: Running) -> Sending:
    return Sending(team.url, team.make_token("ada", "read"))


def propose(sending: Sending, folder: Path, name: str = "team/sql", **header: str) -> Answer:
    """Upload the weights of a folder as a client without write access, and propose a commit of all of it."""
    sent = sending.send(name, (folder / WEIGHTS).read_bytes())
    assert sent is None or sent.status == 200
    return sending.ask("POST", f"/api/models/{name}/commit/main?create_pr=1", commit_of(folder, **header))


def numbers_of(team: Running) -> list[int]:
    with team.registry() as registry:
        return [row.number for row in registry.list("team/sql")]


def rows_of(team: Running, sql: str) -> list[tuple[Any, ...]]:
    with closing(open_database(team.settings)) as database:
        return database.select(sql)


def test_an_accepted_proposal_is_the_next_version_of_who_proposed_it(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    assert propose(ada, adapter(2), summary="Better").status == 200
    proposal = maintainer.ask("GET", f"{API}/1").json()
    assert (proposal["state"], proposal["author"], proposal["title"], proposal["conflicts"]) == ("open", "ada", "Better", [])
    assert [file["path"] for file in proposal["files"]] == [WEIGHTS]
    accepted = maintainer.ask("POST", f"{API}/1/acceptance", {"commit": proposal["commit"], "reason": "good"})
    assert (accepted.status, accepted.json()["version"]) == (200, "team/sql:v2")
    assert sorted(numbers_of(team)) == [1, 2]
    listed = ada.ask("GET", API).json()["proposals"]
    assert [(entry["state"], entry["closed_by"], entry["reason"]) for entry in listed] == [("accepted", "alice", "good")]
    newest = ada.ask("GET", "/api/models/team/sql/commits/main").json()[0]
    assert (newest["title"], newest["authors"][0]["user"]) == ("Better", "ada")
    assert ada.ask("GET", f"/team/sql/resolve/refs%2Fpr%2F1/{WEIGHTS}").data == (adapter(2) / WEIGHTS).read_bytes()
    assert rows_of(team, "SELECT * FROM proposals") == []


def test_a_refused_proposal_has_its_reason_and_a_gc_has_its_bytes(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2))
    weights = f"sha256:{hashlib.sha256((adapter(2) / WEIGHTS).read_bytes()).hexdigest()}"
    nameless = maintainer.ask("POST", f"{API}/1/refusal", {"reason": ""})
    assert (nameless.status, nameless.json()["where"]) == (400, "reason")
    assert maintainer.ask("POST", f"{API}/1/refusal", {"reason": "worse"}).json()["state"] == "refused"
    assert ada.ask("GET", f"/team/sql/resolve/refs%2Fpr%2F1/{WEIGHTS}").status == 404
    again = maintainer.ask("POST", f"{API}/1/acceptance", {})
    assert (again.status, again.json()["code"]) == (409, "proposal-closed")
    assert maintainer.ask("POST", f"{API}/7/acceptance", {}).json()["code"] == "no-such-proposal"
    with team.registry() as registry:
        document = Repositories(registry).get("team/sql")
        assert document is not None
        assert weights not in repository_records.needed_blobs(registry.store, document)
    # They count until a gc has had its time.
    assert [size > 1000 for (size,) in rows_of(team, "SELECT size FROM proposals WHERE closed IS NOT NULL")] == [True]
    assert numbers_of(team) == [1]


def test_only_its_author_or_a_maintainer_withdraws_a_proposal(
    team: Running, ada: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2))
    other_member = Sending(team.url, team.make_token("eve", "read"))
    assert other_member.ask("DELETE", f"{API}/1").status == 403
    assert Sending(team.url).ask("DELETE", f"{API}/1").status == 401
    assert ada.ask("DELETE", f"{API}/1").json()["state"] == "withdrawn"
    rows = rows_of(team, "SELECT account, action, name, detail FROM audit WHERE detail LIKE 'proposal=%' ORDER BY id")
    assert rows == [
        ("ada", "hf.commit", "team/sql", "proposal=1 state=opened"),
        ("ada", "api.withdraw", "team/sql", "proposal=1 state=withdrawn"),
    ]


def test_changes_of_main_to_other_files_are_kept_and_those_to_the_same_are_a_conflict(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2))
    card = lines_of({"README.md": b"# Another card\n"})
    assert maintainer.commit("team/sql", lines_of({"NOTES.md": b"notes\n"})).status == 200
    assert maintainer.ask("GET", f"{API}/1").json()["conflicts"] == []
    ada.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", card)
    assert maintainer.commit("team/sql", lines_of({"README.md": b"# Its own card\n"})).status == 200
    refused = maintainer.ask("POST", f"{API}/2/acceptance", {})
    assert (refused.status, refused.json()["code"]) == (409, "proposal-conflict")
    assert maintainer.push("team/sql", adapter(3)).status == 200
    refused = maintainer.ask("POST", f"{API}/1/acceptance", {})
    assert (refused.status, refused.json()["code"]) == (409, "proposal-conflict")


def test_an_acceptance_keeps_what_main_has_got_since(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2))
    assert maintainer.commit("team/sql", lines_of({"NOTES.md": b"notes\n"})).status == 200
    assert maintainer.ask("POST", f"{API}/1/acceptance", {}).status == 200
    assert maintainer.ask("GET", "/team/sql/resolve/main/NOTES.md").data == b"notes\n"
    assert maintainer.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}").data == (adapter(2) / WEIGHTS).read_bytes()


def test_a_proposal_that_has_been_changed_since_is_not_accepted(
    ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2))
    assert maintainer.ask("POST", f"{API}/1/acceptance", {"commit": "0" * 40}).status == 409


def test_the_same_proposal_sent_again_is_the_one_that_is_open(ada: Sending, adapter: Callable[..., Path]) -> None:
    urls = {propose(ada, adapter(2)).json()["pullRequestUrl"] for _ in range(2)}
    assert len(urls) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": b"{}"}, "adapter_config"),
        ({"README.md": pickle.dumps({"a": 1}, protocol=4)}, "pickle"),
        ({"model.bin": b"1"}, "changes no file of an adapter"),
    ],
)
def test_what_no_push_could_bring_is_no_proposal(team: Running, ada: Sending, files: dict[str, bytes], message: str) -> None:
    answer = ada.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines_of(files))
    assert answer.status == 400
    assert message in answer.json()["error"]
    assert ada.ask("GET", API).json() == {"proposals": []}
    assert rows_of(team, "SELECT * FROM proposals") == []


def test_a_proposal_is_for_main_of_a_repository_that_its_author_sees(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    with team.registry() as registry:
        registry.push(adapter(3), Ref("secret/plans"))
    hide(team, "secret/plans")
    stranger = Sending(team.url)
    other_member = Sending(team.url, team.make_token("eve", "write", namespaces=("eve",)))
    card = lines_of({"README.md": b"# New\n"})
    path = "/api/models/{}/commit/main?create_pr=1"
    missing = other_member.ask("POST", path.format("no/where"), card)
    hidden = other_member.ask("POST", path.format("secret/plans"), card)
    assert (hidden.status, hidden.json()["error"]) == (404, missing.json()["error"].replace("no/where", "secret/plans"))
    digest = hashlib.sha256(b"x").hexdigest()
    assert other_member.batch("secret/plans", digest, 1)["error"].endswith("no such repository")
    assert other_member.ask("GET", "/api/adapterhub/v1/names/secret/plans/proposals").status == 404
    assert other_member.ask("GET", "/api/models/secret/plans/xet-write-token/main?create_pr=1").status == 404
    assert stranger.ask("POST", path.format("team/sql"), card).status == 401
    assert ada.ask("POST", "/api/models/team/sql/commit/v1?create_pr=1", card).status == 400
    # Without create_pr, it is refused as ever.
    assert ada.commit("team/sql", card).status == 403
    assert ada.ask("POST", "/api/models/team/sql/preupload/main", {"files": []}).status == 403
    assert ada.ask("POST", "/api/models/team/sql/preupload/main?create_pr=1", {"files": []}).status == 200
    assert other_member.ask("POST", path.format("team/sql"), card).status == 403  # its token is limited to other names
    eve = Sending(team.url, team.make_token("eve", "write", kind="personal"))
    assert eve.ask("POST", path.format("team/sql"), card).status == 200
    assert maintainer.ask("GET", API).json()["proposals"][0]["author"] == "eve"


def test_a_version_of_a_gated_name_is_proposed_by_accounts_with_access(team: Running) -> None:
    ada = Sending(team.url, team.make_token("ada", "read", kind="personal"))
    with closing(open_database(team.settings)) as database:
        gates.set_gate(database, "team/sql", Gate(gates.MANUAL))
    card, path = lines_of({"README.md": b"# New\n"}), "/api/models/team/sql/commit/main?create_pr=1"
    assert (ada.ask("POST", path, card).status, ada.ask("GET", API).json()) == (403, {"proposals": []})
    digest = hashlib.sha256(b"x").hexdigest()
    assert "is gated" in str(ada.batch("team/sql", digest, 1))
    assert ada.ask("GET", "/api/models/team/sql/xet-write-token/main?create_pr=1").status == 403
    with closing(open_database(team.settings)) as database:
        gates.decide(database, "team/sql", "ada", gates.ACCEPTED, decider="team", unasked=True)
    assert ada.ask("POST", path, card).status == 200


def test_the_proposals_of_an_account_and_of_a_namespace_are_bounded(
    team: Running, ada: Sending, maintainer: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    def propose_card(sending: Sending, text: str) -> Answer:
        return sending.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines_of({"README.md": text.encode()}))

    monkeypatch.setattr(proposals, "_MAX_OPEN_OF_ACCOUNT", 1)
    assert propose_card(ada, "one").status == 200
    refused = propose_card(ada, "two")
    assert (refused.status, "1 open proposals" in refused.json()["error"]) == (400, True)
    monkeypatch.setattr(proposals, "_MAX_OPEN", 1)
    assert "the most there may be" in propose_card(maintainer, "three").json()["error"]
    ada.ask("DELETE", f"{API}/1")
    monkeypatch.setattr(proposals, "_MAX_HOURLY", 1)
    assert "within an hour" in propose_card(ada, "four").json()["error"]
    monkeypatch.setattr(proposals, "_MAX_BYTES", 10)
    assert "its proposals may hold 10 bytes" in propose_card(maintainer, "five").json()["error"]
    assert len(rows_of(team, "SELECT * FROM proposals")) == 1


def test_a_few_accounts_do_not_fill_a_namespace_with_proposals(
    team: Running, ada: Sending, maintainer: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten accounts with ten proposals each left no room for anybody else."""
    monkeypatch.setattr(proposals, "_MAX_OPEN", 4)
    people = [ada, *(Sending(team.url, team.make_token(name, "read")) for name in ("eve", "bob"))]

    def propose_card(sending: Sending, text: str) -> str:
        answer = sending.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines_of({"README.md": text.encode()}))
        return str(answer.json().get("error", ""))

    assert [propose_card(ada, f"of ada {number}") for number in range(2)] == ["", ""]
    assert "ada has 2 open proposals, and more than half of the room is taken" in propose_card(ada, "of ada 2")
    parts = "/api/models/team/sql/commit/refs%2Fpr%2F1"
    assert ada.ask("POST", parts, lines_of({"README.md": b"changed"})).status == 200
    assert [propose_card(sending, "one more") for sending in people[1:]] == ["", ""]
    assert "the most there may be" in propose_card(maintainer, "a fifth")


def test_a_few_accounts_do_not_fill_a_namespace_with_the_bytes_of_proposals(
    team: Running, ada: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "_MAX_BYTES", 64_000)
    path, eve = "/api/models/team/sql/commit/main?create_pr=1", Sending(team.url, team.make_token("eve", "read"))
    assert ada.ask("POST", path, lines_of({"README.md": b"a" * 40_000})).status == 200
    refused = ada.ask("POST", path, lines_of({"README.md": b"b" * 1000}))
    assert "ada: may hold 2,000 bytes of its proposals while more than half of the room is taken" in refused.json()["error"]
    assert eve.ask("POST", path, lines_of({"README.md": b"e" * 1000})).status == 200
    assert eve.ask("POST", path, lines_of({"README.md": b"f" * 1000})).status == 400


def test_the_commits_of_a_proposal_are_bounded(team: Running, ada: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account could change its proposals as often as it liked, which each time writes a document."""
    monkeypatch.setattr(proposals, "_MAX_COMMITS", 3)
    ada.ask("POST", "/api/models/team/sql/discussions", {"title": "Again", "pullRequest": True})
    parts = "/api/models/team/sql/commit/refs%2Fpr%2F1"
    answers = [ada.ask("POST", parts, lines_of({"README.md": text})) for text in (b"one", b"two", b"three")]
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert "proposal 1: has 3 commits, the most of a proposal" in answers[-1].json()["error"]
    assert rows_of(team, "SELECT commits FROM proposals") == [(3,)]


def test_the_commits_of_an_account_to_its_proposals_in_an_hour_are_bounded(
    team: Running, ada: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten proposals with a hundred commits each could be withdrawn and opened again, three times an hour."""
    monkeypatch.setattr(proposals, "_MAX_HOURLY_COMMITS", 4)

    def commit(revision: str, text: str) -> str:
        answer = ada.ask("POST", f"/api/models/team/sql/commit/{revision}", lines_of({"README.md": text.encode()}))
        return str(answer.json().get("error", ""))

    assert [commit("main?create_pr=1", "one"), commit("refs%2Fpr%2F1", "two"), commit("refs%2Fpr%2F1", "three")] == [""] * 3
    assert ada.ask("DELETE", f"{API}/1").status == 200
    assert commit("main?create_pr=1", "four") == ""
    for revision in ("refs%2Fpr%2F2", "main?create_pr=1"):
        assert "ada: has made 4 commits to proposals in team within an hour" in commit(revision, f"more on {revision}")
    with closing(open_database(team.settings)) as database:
        database.execute("UPDATE proposals SET hour = hour - 3601")
    assert commit("refs%2Fpr%2F2", "five") == ""
    assert rows_of(team, "SELECT hourly_commits FROM proposals WHERE closed IS NULL") == [(1,)]


def test_a_proposal_that_is_changed_was_opened_when_it_was_opened(
    team: Running, ada: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "_MAX_HOURLY", 1)

    def commit(revision: str, text: str) -> str:
        answer = ada.ask("POST", f"/api/models/team/sql/commit/{revision}", lines_of({"README.md": text.encode()}))
        return str(answer.json().get("error", ""))

    assert commit("main?create_pr=1", "one") == ""
    with closing(open_database(team.settings)) as database:
        database.execute("UPDATE proposals SET opened = opened - 3601, hour = hour - 3601")
    assert [commit("refs%2Fpr%2F1", "changed"), commit("main?create_pr=1", "two")] == ["", ""]
    assert commit("refs%2Fpr%2F2", "changed, too") == ""
    assert "has opened 1 proposals within an hour" in commit("main?create_pr=1", "three")


def test_uploads_for_proposals_are_bounded_in_a_namespace_without_a_quota_and_those_of_maintainers_are_not(
    team: Running, ada: Sending, maintainer: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "_MAX_PROPOSED_BYTES", 1000)
    digest = hashlib.sha256(b"x" * 1001).hexdigest()
    assert "proposals of ada: may hold 1,000 bytes" in ada.batch("team/sql", digest, 1001)["error"]
    assert "actions" in maintainer.batch("team/sql", digest, 1001)
    large = lines_of({"README.md": b"y" * 1001})
    refused = ada.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", large)
    assert "proposals of ada: may hold 1,000 bytes" in refused.json()["error"]
    assert list((team.folder / ".adapterhub").rglob("*.staged")) == []


def test_an_address_for_a_proposal_sends_no_file_of_a_version(ada: Sending, maintainer: Sending) -> None:
    data = b"z" * 100
    assert ada.send("team/sql", data).status == 200  # type: ignore[union-attr]
    file = {"x.txt": (hashlib.sha256(data).hexdigest(), len(data))}
    refused = maintainer.commit("team/sql", lines_of({}, file))
    assert (refused.status, "was not uploaded" in refused.json()["error"]) == (400, True)
    assert ada.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines_of({}, file)).status == 200


def test_hf_upload_by_xet_is_a_proposal_too(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    run_hf(team, tmp_path, "upload", "team/sql", str(adapter(2)), "--create-pr", HF_TOKEN=ada.token)
    assert rows_of(team, "SELECT name FROM xet_epochs") == [("~ada/team/sql",)]
    assert rows_of(team, "SELECT name FROM uploaded") == []
    assert maintainer.ask("POST", f"{API}/1/acceptance", {}).status == 200
    assert maintainer.ask("GET", f"/team/sql/resolve/v2/{WEIGHTS}").data == (adapter(2) / WEIGHTS).read_bytes()


def test_a_proposal_of_several_commits_need_not_be_whole_in_between(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    draft = ada.ask("POST", "/api/models/team/sql/discussions", {"title": "Parts", "pullRequest": True})
    assert (draft.status, draft.json()["num"]) == (200, 1)
    assert ada.ask("POST", "/api/models/team/sql/discussions", {"title": "Talk"}).status == 501
    assert "changes nothing yet" in maintainer.ask("POST", f"{API}/1/acceptance", {}).json()["error"]
    parts = "/api/models/team/sql/commit/refs%2Fpr%2F1"
    config = json.loads((adapter(2) / "adapter_config.json").read_bytes()) | {"r": 3}
    first = ada.ask("POST", parts, lines_of({"adapter_config.json": json.dumps(config).encode()}))
    assert (first.status, "x-hf-warning" in first.headers) == (200, True)
    eve = Sending(team.url, team.make_token("eve", "read"))
    assert eve.ask("POST", parts, lines_of({"README.md": b"hers"})).status == 403
    assert eve.ask("POST", parts.replace("F1", "F9"), lines_of({"README.md": b"hers"})).status == 403
    stale = ada.ask("POST", parts, lines_of({"README.md": b"his"}, parentCommit="0" * 40))
    assert stale.status == 412
    assert ada.send("team/sql", (adapter(2) / WEIGHTS).read_bytes()).status == 200  # type: ignore[union-attr]
    second = ada.ask("POST", parts, commit_of(adapter(2)))
    assert (second.status, "x-hf-warning" in second.headers) == (200, False)
    assert ada.ask("POST", parts, commit_of(adapter(2))).json()["commitOid"] == second.json()["commitOid"]
    assert len(rows_of(team, "SELECT ident FROM proposals")) == 1
    assert maintainer.ask("POST", f"{API}/1/acceptance", {"commit": first.json()["commitOid"]}).status == 409
    assert maintainer.ask("POST", f"{API}/1/acceptance", {"commit": second.json()["commitOid"]}).status == 200
    assert ada.ask("POST", parts, lines_of({"README.md": b"late"})).status == 409


def test_proposals_take_at_most_a_quarter_of_what_a_namespace_may_hold(
    team: Running, ada: Sending, maintainer: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    with closing(open_database(team.settings)) as database:
        accounts.change_namespace(database, "team", max_bytes=100_000)
    path = "/api/models/team/sql/commit/main?create_pr=1"
    refused = ada.ask("POST", path, lines_of({"README.md": b"z" * 30_000}))
    assert "its proposals may hold 25,000 bytes" in refused.json()["error"]
    assert ada.ask("POST", path, lines_of({"README.md": b"z" * 20_000})).status == 200
    assert "hold 2" in ada.ask("POST", path, lines_of({"README.md": b"y" * 20_000})).json()["error"]
    assert maintainer.commit("team/sql", lines_of({"README.md": b"x" * 50_000})).status == 200


def test_what_later_commits_of_a_proposal_leave_behind_counts_until_a_gc_has_had_its_time(
    team: Running, ada: Sending, maintainer: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "_MAX_BYTES", 100_000)
    ada.ask("POST", "/api/models/team/sql/discussions", {"title": "Again", "pullRequest": True})
    parts, notes = "/api/models/team/sql/commit/refs%2Fpr%2F1", {"NOTES.md": b"n" * 30_000}
    for text in (b"a" * 30_000, b"b" * 10_000, b"b" * 10_000):  # the notes count once
        assert ada.ask("POST", parts, lines_of(notes | {"README.md": text})).status == 200
    refused = ada.ask("POST", parts, lines_of(notes | {"README.md": b"c" * 30_000}))
    assert (refused.status, "its proposals may hold 100,000 bytes" in refused.json()["error"]) == (400, True)
    assert ada.ask("DELETE", f"{API}/1").status == 200
    refused = ada.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines_of({"README.md": b"d" * 30_000}))
    assert "hold 7" in refused.json()["error"]


def test_who_has_proposed_an_accepted_version_is_not_forgotten(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a hundred proposals, opened and withdrawn, and a squash, its author approved it as somebody else would."""
    monkeypatch.setattr(proposals, "_MAX_CLOSED", 1)
    propose(ada, adapter(2))
    assert maintainer.ask("POST", f"{API}/1/acceptance", {}).status == 200
    for number in range(2, 6):
        ada.ask("POST", "/api/models/team/sql/discussions", {"title": f"Empty {number}", "pullRequest": True})
        assert ada.ask("DELETE", f"{API}/{number}").status == 200
    assert maintainer.ask("POST", "/api/models/team/sql/super-squash/main", {}).status == 200
    assert [proposal["proposal"] for proposal in ada.ask("GET", API).json()["proposals"]] == [5, 4, 1]
    with closing(open_storage(team.settings)) as storage, closing(Workers(storage)) as workers:
        worker = workers.worker()
        assert "ada" in proposals.authors(worker, "team/sql", worker.registry.resolve(Ref("team/sql")).digest)


def test_many_proposals_of_an_account_delay_a_push_by_one(team: Running) -> None:
    """Each waited for the repository's lock before the push, and had all of its weights checked under it."""
    order: list[str] = []

    async def propose_again(hub: Hub, number: int) -> None:
        async with proposing.turn_of_account(hub, "ada", "team/sql", "~ada/team/sql"):
            order.append(f"proposal {number}")

    async def push(hub: Hub) -> None:
        async with hub.change("team/sql"):
            order.append("push")

    async def all_at_once(hub: Hub) -> None:
        await asyncio.gather(*(propose_again(hub, number) for number in range(3)), push(hub))

    with closing(Hub(team.settings)) as hub:
        asyncio.run(all_at_once(hub))
    assert order == ["proposal 0", "push", "proposal 1", "proposal 2"]


def test_of_two_decisions_at_the_same_time_one_holds(team: Running, ada: Sending, adapter: Callable[..., Path]) -> None:
    propose(ada, adapter(2))

    def decide(path: str) -> tuple[str, int]:
        return path, Sending(team.url, team.token).ask("POST", f"{API}/1/{path}", {"reason": "so"}).status

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(decide, ["acceptance", "refusal", "acceptance", "refusal"]))
    won = [path for path, status in answers if status == 200]
    assert (len(won), {status for _, status in answers}) == (1, {200, 409})
    assert sorted(numbers_of(team)) == ([1, 2] if won == ["acceptance"] else [1])


@pytest.mark.parametrize("step", ["close", "settle"])
def test_an_acceptance_that_was_cut_off_is_finished_by_another_one(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose(ada, adapter(2))
    with monkeypatch.context() as patched:
        patched.setattr(proposals, step, lambda *_args, **_options: (_ for _ in ()).throw(LocalIOError("disk", "is full")))
        assert maintainer.ask("POST", f"{API}/1/acceptance", {}).status == 507
    assert sorted(numbers_of(team)) == [1, 2]
    again = maintainer.ask("POST", f"{API}/1/acceptance", {})
    assert again.status == (200 if step == "close" else 409)
    assert sorted(numbers_of(team)) == [1, 2]
    assert maintainer.ask("GET", API).json()["proposals"][0]["state"] == "accepted"


def test_a_policy_keeps_proposals_back_and_decides_again_when_they_are_accepted(
    tmp_path: Path, adapter: Callable[..., Path]
) -> None:
    policy = Policy("policy.toml", licenses=("mit",))
    with serving(tmp_path / "strict", policy=policy) as strict:
        with strict.registry() as registry:
            registry.push(adapter(1), Ref("team/sql"))
        author, other_member = (Sending(strict.url, strict.make_token(name, "read")) for name in ("ada", "eve"))
        maintainer = Sending(strict.url, strict.token)
        proposed = propose(author, adapter(2))
        assert "license" in proposed.headers["x-hf-warning"]
        path = f"/team/sql/resolve/refs%2Fpr%2F1/{WEIGHTS}"
        assert [sending.ask("GET", path).status for sending in (author, maintainer, other_member)] == [200, 200, 403]
        assert "license" in maintainer.ask("GET", f"{API}/1").json()["objection"]
        refused = maintainer.ask("POST", f"{API}/1/acceptance", {})
        assert (refused.status, refused.json()["code"]) == (400, "against-policy")
        assert maintainer.ask("GET", f"{API}/1").json()["state"] == "open"


def test_proposals_are_told_to_webhooks_and_what_a_killed_process_has_left_is_too(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_database(team.settings)) as database:
        webhooks.add(database, "team", "http://127.0.0.1:9/hook", private=True)
    propose(ada, adapter(2))
    propose(ada, adapter(3))
    maintainer.ask("POST", f"{API}/1/acceptance", {})
    with monkeypatch.context() as patched:
        patched.setattr(proposals, "settle", lambda *_: None)
        maintainer.ask("POST", f"{API}/2/refusal", {"reason": "no"})
    with closing(open_storage(team.settings)) as storage, closing(Workers(storage)) as workers:
        hooks = Webhooks(storage.database, storage.store().log)
        proposals.settle_all(workers.worker(), hooks)
        proposals.settle_all(workers.worker(), hooks)
    events = [
        json.loads(body) for (body,) in rows_of(team, "SELECT body FROM deliveries WHERE event LIKE 'proposal%' ORDER BY id")
    ]
    assert [(event["event"], event["proposal"], event["author"]) for event in events] == [
        ("proposal.opened", 1, "ada"), ("proposal.opened", 2, "ada"),
        ("proposal.accepted", 1, "alice"), ("proposal.refused", 2, "alice"),
    ]  # fmt: skip


def test_a_proposal_moves_with_its_repository_and_outlives_a_squash(
    ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2))
    assert maintainer.commit("team/sql", lines_of({"NOTES.md": b"notes\n"})).status == 200
    assert maintainer.ask("POST", "/api/models/team/sql/super-squash/main", {}).status == 200
    assert maintainer.ask("POST", "/api/repos/move", {"fromRepo": "team/sql", "toRepo": "team/new"}).status == 200
    assert maintainer.ask("POST", f"{API.replace('/sql/', '/new/')}/1/acceptance", {}).status == 200


def test_no_proposal_is_in_the_history_of_main(
    team: Running, ada: Sending, maintainer: Sending, adapter: Callable[..., Path]
) -> None:
    propose(ada, adapter(2), summary="proposed")
    with team.registry() as registry:
        registry.push(adapter(3), Ref("team/sql"))
    titles = [commit["title"] for commit in maintainer.ask("GET", "/api/models/team/sql/commits/main").json()]
    assert titles == ["Version v2", "Version v1"]


def test_nobody_proposes_on_top_of_the_proposal_of_another(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with serving(tmp_path / "strict", policy=Policy("policy.toml", licenses=("mit",))) as strict:
        with strict.registry() as registry:
            registry.push(adapter(1), Ref("team/sql"))
        author, other_member = (Sending(strict.url, strict.make_token(name, "read")) for name in ("ada", "eve"))
        proposed = propose(author, adapter(2)).json()["commitOid"]
        for parent in (proposed, "refs/pr/1"):
            lines = lines_of({"README.md": b"# mine\n"}, parentCommit=parent)
            answer = other_member.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines)
            read = other_member.ask("GET", f"/team/sql/resolve/refs%2Fpr%2F2/{WEIGHTS}")
            assert (answer.status, read.status) == (412, 404)


def test_a_policy_keeps_back_the_lines_of_a_proposal_too(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with serving(tmp_path / "strict", policy=Policy("policy.toml", licenses=("mit",))) as strict:
        with strict.registry() as registry:
            registry.push(adapter(1), Ref("team/sql"))
        author, other_member = (Sending(strict.url, strict.make_token(name, "read")) for name in ("ada", "eve"))
        lines = lines_of({"NOTES.md": b"unread words\n"})
        assert author.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", lines).status == 200
        commit = author.ask("GET", f"{API}/1").json()["commit"]
        paths = (f"{API}/1", "/api/models/team/sql/discussions/1")
        for path in (*paths, "/team/sql/discussions/1", f"/team/sql/commit/{commit}"):
            is_shown = [b"unread words" in sending.ask("GET", path).data for sending in (author, other_member)]
            assert is_shown == [True, False], path
        by_digest = {
            "key": "lfsFile",
            "value": {"path": "NOTES.md", "algo": "sha256", "oid": hashlib.sha256(b"unread words\n").hexdigest()},
        }
        body = b"\n".join(json.dumps(line).encode() for line in ({"key": "header", "value": {"summary": "x"}}, by_digest))
        answer = other_member.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", body)
        assert (answer.status, "was not uploaded" in answer.data.decode()) == (400, True)
