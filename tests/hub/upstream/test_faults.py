"""An upstream that lies, is slow or ends, a hub that is killed, a full disk: no client gets a whole file with wrong bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import urllib3

from adapterhub.hub.git_objects import GitFile
from adapterhub.hub.settings import ModelUpstream
from adapterhub.hub.upstream import fills, models
from adapterhub.hub.upstream.cached_files import CachedFiles
from adapterhub.hub.upstream.listing_cache import ListingCache
from adapterhub.hub.upstream.model_client import ModelClient, NoModelError, NoRevisionError
from tests.hub.killing import killable_hub
from tests.hub.sending import Answer, Sending
from tests.hub.test_faults import small_disk
from tests.hub.upstream.conftest import anonymous, hub_of
from tests.hub.upstream.faulty import NAME, PATH, Faulty, faulty_hub

DATA = random.Random(1).randbytes(2_000_000)
FILE = f"/{NAME}/resolve/main/{PATH}"


@pytest.fixture
def upstream() -> Iterator[Faulty]:
    """A hub with a file of 2 MB."""
    with faulty_hub(DATA) as hub:
        yield hub


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file be sent while it arrives, as larger ones are."""
    monkeypatch.setattr(models, "_SMALL", 0)
    monkeypatch.setattr(models, "_PATIENCE", 0.05)


def get(sending: Sending, **headers: str) -> Answer:
    return sending.ask("GET", FILE, **headers)


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    while not condition():
        time.sleep(0.01)


def begin(url: str) -> urllib3.BaseHTTPResponse:
    """The answer with the file, of which nothing has been read."""
    answer = urllib3.PoolManager().request("GET", url + FILE, preload_content=False, retries=False)
    assert answer.status == 200
    return answer


def read_until_cut(answer: urllib3.BaseHTTPResponse) -> bytes:
    """What a client gets of the file until its connection is cut."""
    data = bytearray()
    with pytest.raises(urllib3.exceptions.HTTPError):
        _extend(data, answer)
    return bytes(data)


def _extend(data: bytearray, answer: urllib3.BaseHTTPResponse) -> None:
    for piece in answer.stream(1 << 14):
        data += piece


def kept_sizes(folder: Path) -> list[int]:
    """The sizes of the whole files that a hub keeps of its upstream."""
    return [path.stat().st_size for path in (folder / "upstream/files").iterdir()]


LIES = {"another digest": DATA[:-1] + b"?", "fewer bytes": DATA[:-1], "more bytes": DATA + b"?"}


@pytest.mark.parametrize("sent", LIES.values(), ids=LIES)
def test_what_is_not_as_listed_is_refused_in_words_and_not_kept(tmp_path: Path, upstream: Faulty, sent: bytes) -> None:
    upstream.sent = sent
    with hub_of(tmp_path, upstream.url) as hub:
        answer = get(anonymous(hub))
        assert answer.status == 400
        assert "the upstream" in answer.json()["error"]
        assert kept_sizes(tmp_path) == []


@pytest.mark.usefixtures("streamed")
def test_a_client_that_reads_while_wrong_bytes_arrive_never_gets_a_whole_file(
    tmp_path: Path, upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.sent, upstream.slow_after = DATA[:-1] + b"?", 1_000_000
    with hub_of(tmp_path, upstream.url) as hub:
        answer = begin(hub.url)
        upstream.go.set()
        received = read_until_cut(answer)
        assert len(received) <= len(DATA) - fills.HELD_BACK
        assert kept_sizes(tmp_path) == []
        # It may have the first of the wrong bytes: what comes next must not be put behind those.
        assert get(anonymous(hub), range=f"bytes={len(received)}-").status == 400
        monkeypatch.setattr(fills, "_BAD_TTL", 0.0)
        upstream.sent = None
        answer = get(anonymous(hub), range=f"bytes={len(received)}-")
        assert (answer.status, answer.data) == (200, DATA)  # all of it, with which clients begin anew


@pytest.mark.usefixtures("streamed")
def test_a_download_is_one_for_all_who_read_and_goes_on_after_a_cut(tmp_path: Path, upstream: Faulty) -> None:
    upstream.slow_after = upstream.cut = 1_000_000
    with hub_of(tmp_path, upstream.url) as hub, ThreadPoolExecutor(10) as pool:
        readers = [pool.submit(get, anonymous(hub)) for _ in range(8)]
        part = pool.submit(get, anonymous(hub), range="bytes=100-199")
        assert part.result().data == DATA[100:200]  # before the rest has come
        upstream.go.set()
        assert all(reader.result().data == DATA for reader in readers)
        first, second = upstream.downloads
        assert first == ""
        assert second.endswith(f"-{len(DATA) - 1}")
        assert int(second.removeprefix("bytes=").partition("-")[0]) > 900_000
        assert kept_sizes(tmp_path) == [len(DATA)]


def test_what_was_read_once_is_here_when_the_upstream_is_not(tmp_path: Path) -> None:
    with faulty_hub(DATA) as upstream, hub_of(tmp_path, upstream.url, age=0.0) as hub:
        assert get(anonymous(hub)).data == DATA
        commit = upstream.commit
        upstream.refuses = 500
        answer = get(anonymous(hub))
        assert (answer.data, answer.headers["x-repo-commit"]) == (DATA, commit)
        assert "the upstream does not answer; this is what it was" in answer.headers["x-hf-warning"]
        upstream.refuses = 404
        assert get(anonymous(hub)).data == DATA
    with hub_of(tmp_path, upstream.url, age=0.0) as hub:  # started again, and the upstream is away
        assert get(anonymous(hub)).data == DATA
        assert anonymous(hub).ask("GET", f"/api/models/{NAME}/revision/{commit}").json()["sha"] == commit
        missing = anonymous(hub).ask("GET", "/api/models/org/other")
        assert (missing.status, missing.json()["error"]) == (503, "the hub cannot do that now: the upstream does not answer")


def test_an_upstream_that_hangs_holds_up_nobody_who_can_have_what_is_here(
    tmp_path: Path, upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_LISTING_PATIENCE", 0.05)
    with hub_of(tmp_path, upstream.url, age=0.0) as hub, ThreadPoolExecutor(20) as pool:
        commit = get(anonymous(hub)).headers["x-repo-commit"]
        upstream.hangs = True
        waiting = [pool.submit(anonymous(hub).ask, "GET", f"/api/models/org/other{number}") for number in range(16)]
        until(lambda: len(upstream.requests) >= 10)
        for _ in range(3):
            answer = get(anonymous(hub))
            assert (answer.data, answer.headers["x-repo-commit"]) == (DATA, commit)
            assert "the upstream takes long; this is what it was" in answer.headers["x-hf-warning"]
        upstream.go.set()
        assert {answer.result().status for answer in waiting} == {404}


def test_the_upstream_is_not_asked_for_a_revision_that_cannot_be(tmp_path: Path, upstream: Faulty) -> None:
    with hub_of(tmp_path, upstream.url) as hub:
        answer = anonymous(hub).ask("GET", f"/api/models/{NAME}/revision/{'x' * 300}")
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")
        assert upstream.requests == []


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("small", [0, 1_000_000], ids=["large", "small"])
def test_a_file_that_waits_for_others_to_arrive_is_passed_on_meanwhile(
    tmp_path: Path, upstream: Faulty, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(fills, "_THREADS", 1)
    monkeypatch.setattr(models, "_SMALL", small)
    upstream.other_files, upstream.slow_after = {"config.json": DATA[:100_000]}, 0
    with hub_of(tmp_path, upstream.url) as hub:
        arriving = begin(hub.url)
        answer = anonymous(hub).ask("GET", f"/{NAME}/resolve/main/config.json")
        assert (answer.status, answer.data) == (200, DATA[:100_000])
        upstream.go.set()
        assert arriving.read() == DATA


def test_readers_of_a_branch_that_moves_get_whole_commits(tmp_path: Path, upstream: Faulty) -> None:
    with hub_of(tmp_path, upstream.url, age=0.0) as hub, ThreadPoolExecutor(4) as pool:
        new_data = DATA[::-1]
        commits = {upstream.commit: DATA}

        def read(number: int) -> tuple[str, bytes]:
            if number == 10:
                upstream.listed = new_data
                commits[upstream.commit] = new_data
            answer = get(anonymous(hub))
            return answer.headers.get("x-repo-commit", ""), answer.data if answer.status == 200 else b""

        answers = list(pool.map(read, range(20)))
        # What was listed just before the move is refused, and never sent under the other commit.
        assert all(data in (b"", commits.get(commit)) for commit, data in answers)
        assert answers[-1] == (upstream.commit, new_data)


def test_a_killed_hub_goes_on_where_it_was_and_sends_nothing_half_written(tmp_path: Path, upstream: Faulty) -> None:
    upstream.slow_after = 1_000_000
    with killable_hub(tmp_path, upstream=upstream.url) as killable, ThreadPoolExecutor() as pool:
        reader = pool.submit(suppressed_get, killable.url)
        part = tmp_path / "upstream/parts"
        until(lambda: part.is_dir() and sum(path.stat().st_size for path in part.iterdir()) >= 900_000)
        killable.kill()
        assert reader.result() != DATA
        assert kept_sizes(tmp_path) == []
        upstream.slow_after = None
        upstream.go.set()
        killable.start()
        assert get(Sending(killable.url)).data == DATA
        assert int(upstream.downloads[-1].removeprefix("bytes=").partition("-")[0]) >= 900_000


def suppressed_get(url: str) -> bytes:
    with suppress(urllib3.exceptions.HTTPError):
        return get(Sending(url)).data
    return b""


def test_what_a_full_disk_cannot_keep_is_passed_on_verified(tmp_path: Path, upstream: Faulty) -> None:
    upstream.listed = random.Random(2).randbytes(20_000_000)
    with small_disk(tmp_path / "disk", 16), hub_of(tmp_path / "disk" / "hub", upstream.url) as hub:
        for _ in range(2):
            assert get(anonymous(hub)).data == upstream.listed
        assert get(anonymous(hub), range="bytes=7-9").data == upstream.listed[7:10]
        assert kept_sizes(hub.folder) == []
        upstream.sent = upstream.listed[:-1] + b"?"
        assert len(read_until_cut(begin(hub.url))) <= len(upstream.listed) - fills.HELD_BACK


def test_the_files_used_last_stay_within_the_limit(tmp_path: Path, upstream: Faulty) -> None:
    with hub_of(tmp_path, upstream.url, age=0.0, max_bytes=3_000_000) as hub:
        assert get(anonymous(hub)).data == DATA
        upstream.listed = DATA[::-1]
        assert get(anonymous(hub)).data == DATA[::-1]
        assert kept_sizes(tmp_path) == [len(DATA)]
        total = sum(path.stat().st_size for path in (tmp_path / "upstream").rglob("*") if path.is_file())
        assert total <= 3_000_000
        upstream.listed = random.Random(3).randbytes(3_000_001)
        assert get(anonymous(hub)).data == upstream.listed
        assert kept_sizes(tmp_path) == [len(DATA)]
        assert len(upstream.downloads) == 3


def test_each_error_of_the_upstream_has_a_code_of_its_own(tmp_path: Path, upstream: Faulty) -> None:
    settings = ModelUpstream(upstream.url, "cache", max_bytes=1_000_000)
    cached, client = CachedFiles(tmp_path / "cache", settings.max_bytes), ModelClient.of(settings)
    listings = ListingCache(settings, client, cached)
    with pytest.raises(NoModelError) as caught:
        listings.find("org/none", "main")
    assert caught.value.code == "no-upstream-model"
    upstream.refuses, upstream.code = 404, "RevisionNotFound"
    with pytest.raises(NoRevisionError) as no_revision:
        listings.find(NAME, "none")
    assert no_revision.value.code == "no-upstream-revision"
    file = GitFile(PATH, "", 1_000_001, "", "0" * 64)
    with pytest.raises(fills.NotKeptError) as not_kept:
        fills.Fills(client, cached).start(file, upstream.url, PATH)
    assert not_kept.value.code == "not-kept"
