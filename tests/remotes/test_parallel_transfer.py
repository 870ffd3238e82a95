"""How bytes move: several blobs at once, held back, told of, gone on with after a kill, and not at all where they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.adapter_folders import MIN_SENT_AHEAD, AdapterFolder, download
from adapterhub.remotes.download import NOTE_INTERVAL
from adapterhub.remotes.oci.blob_upload import PIECE
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.parallel_transfer import RateLimit, Transfer
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import IntegrityError, NotFoundError, OutputExistsError
from tests.cli.test_process import PATH
from tests.conftest import Run
from tests.support import uploads
from tests.support.adapters import write_adapter
from tests.support.proxy import Exchange, Proxy

pytestmark = pytest.mark.peer
MIB = 1 << 20
KILLS = 6


def remote(host: str, name: str, notes_folder: Path | None = None, *, piece: int = MIB) -> OciRepository:
    return OciRepository(
        OciAddress.parse(f"oci://{host}/moving/{name}"), pauses=(0.0,), piece=piece, largest=piece, uploads=notes_folder
    )


def write_large(folder: Path, size: int, seed: int = 0) -> Path:
    write_adapter(folder)
    (folder / "README.md").write_bytes(random.Random(seed).randbytes(size // 2).hex().encode())
    return folder


class Program:
    """`adapterhub ARGS…` as a process that can be killed."""

    def __init__(self, tmp_path: Path, *args: str) -> None:
        self._cwd = tmp_path
        self._command = [sys.executable, "-m", "adapterhub", *args]
        self._env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": PATH, "XDG_DATA_HOME": str(tmp_path / "xdg")}

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=self._cwd, env=self._env, stdout=subprocess.DEVNULL)

    def killed_when(self, far: Callable[[], bool]) -> bool:
        """Run it until `far`; False when it had ended before."""
        process = self.start()
        while process.poll() is None and not far():
            time.sleep(0.002)
        process.kill()
        return process.wait() != 0

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command, cwd=self._cwd, env=self._env, check=True, capture_output=True, text=True)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Later:
    """Some time after the first request."""

    def __init__(self, proxy: Proxy, seconds: float) -> None:
        self._proxy, self._seconds = proxy, seconds
        self._began, self._seen_count = 0.0, len(proxy.exchanges)

    def __call__(self) -> bool:
        if not self._began and len(self._proxy.exchanges) > self._seen_count:
            self._began = time.monotonic()
        return bool(self._began) and time.monotonic() > self._began + self._seconds


# ---- killed


def test_a_pull_killed_6_times_receives_at_most_8_MiB_again_each_time(host: str, tmp_path: Path) -> None:
    folder, dice = write_large(tmp_path / "sql", 6 * NOTE_INTERVAL), random.Random(1)
    with remote(host, "killed") as to:
        manifest = copy_version(AdapterFolder(folder), "latest", to, "latest").manifest
    big = max(manifest.layers, key=lambda layer: layer.size)
    part = tmp_path / f".out.pull-{manifest.digest[7:19]}" / f"{big.digest[7:]}.part"
    partial_sizes = []
    with Proxy(host) as proxy:
        pull = Program(tmp_path, "pull", f"oci://{proxy.address}/moving/killed", "-o", "out", "--limit-rate", "60M")
        for _ in range(KILLS):
            goal = size_of(part) + dice.randrange(4 * MIB)
            assert pull.killed_when(lambda goal=goal: size_of(part) > goal)  # type: ignore[misc]
            assert not (tmp_path / "out").exists()
            partial_sizes.append(size_of(part))
        pull.run()
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if big.digest in exchange.path]
    starts = [int(text[6:-1]) if text else 0 for text in ranges]
    assert len(starts) == KILLS + 1
    assert all(start > size - NOTE_INTERVAL for start, size in zip(starts[1:], partial_sizes, strict=True))
    assert (tmp_path / "out/README.md").read_bytes() == (folder / "README.md").read_bytes()


def test_a_push_killed_6_times_resumes_where_the_registry_keeps_partial_uploads(tmp_path: Path) -> None:
    folder, upload_registry, dice = write_large(tmp_path / "sql", MIN_SENT_AHEAD + 5000), uploads.Uploads(), random.Random(2)
    with Proxy() as proxy:
        proxy.before = upload_registry.answer
        address = f"oci://{proxy.address}/moving/killed"
        slow = Program(tmp_path, "push", "sql", address, "--limit-rate", "20M")
        for _ in range(KILLS):
            slow.killed_when(Later(proxy, dice.uniform(0, 0.2)))
        Program(tmp_path, "push", "sql", address).run()
    assert upload_registry.manifests["latest"] == oci_manifest.build(folder).raw
    for layer in oci_manifest.build(folder).layers:
        assert hashlib.sha256(upload_registry.blobs[layer.digest]).hexdigest() == layer.digest[7:]
    assert (
        0 <= upload_registry.sent - sum(map(len, upload_registry.blobs.values())) <= PIECE
    )  # the first piece of a file not yet hashed
    assert list((tmp_path / "xdg").rglob("*.json")) == []


def test_a_killed_push_to_docker_registry_sends_no_finished_blob_again(host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", MIN_SENT_AHEAD + 5000)
    (folder / "second.md").write_bytes(random.Random(9).randbytes(MIN_SENT_AHEAD // 2 + 5000).hex().encode())
    with Proxy(host) as proxy:
        push = Program(tmp_path, "push", "sql", f"oci://{proxy.address}/moving/finished", "--jobs", "1", "--json")

        def finished(exchange: Exchange) -> bool:
            return exchange.method == "PUT" and "digest=" in exchange.path and exchange.status == 201

        assert push.killed_when(lambda: any(map(finished, list(proxy.exchanges))))
        sent = json.loads(push.run().stdout)["sent"]
    assert sent < 2 * MIN_SENT_AHEAD
    with remote(host, "finished") as repository:
        assert repository.manifest("latest").digest == oci_manifest.build(folder).digest


# ---- gone on with


@pytest.fixture
def fixed() -> Iterator[tuple[Proxy, uploads.Uploads]]:
    upload_registry = uploads.Uploads()
    with Proxy() as proxy:
        proxy.before = upload_registry.answer
        yield proxy, upload_registry


# ---- several at once


def test_what_is_sent_while_it_is_hashed_has_the_right_digest(run: Run, host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", MIN_SENT_AHEAD + 5000)
    with Proxy(host) as proxy:
        document = json.loads(run("push", folder, f"oci://{proxy.address}/moving/ahead", "--json").stdout)
        first = [exchange.method for exchange in proxy.exchanges if "/blobs/" in exchange.path][:3]
        assert first == ["POST", "PATCH", "PATCH"]
        assert (document["digest"], document["sent"] > document["size"] - 1) == (oci_manifest.build(folder).digest, True)
        proxy.exchanges.clear()
        again = json.loads(run("push", folder, f"oci://{proxy.address}/moving/ahead:two", "--json").stdout)
        assert (again["sent"], [exchange for exchange in proxy.exchanges if exchange.method == "PATCH"]) == (0, [])


def test_of_what_becomes_an_image_no_file_is_sent_by_itself(run: Run, host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", MIN_SENT_AHEAD + 5000)
    document = json.loads(run("push", folder, f"oci://{host}/moving/image", "--to", "image", "--json").stdout)
    assert MIN_SENT_AHEAD < document["sent"] < 2 * MIN_SENT_AHEAD


def test_what_the_policy_refuses_is_not_sent_ahead(run: Run, host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", MIN_SENT_AHEAD + 5000)
    (tmp_path / "adapterhub.toml").write_text("[policy]\nmax_rank = 1\n")
    with Proxy(host) as proxy:
        assert "rank 2 is over 1" in run("push", folder, f"oci://{proxy.address}/moving/refused", code=6).stderr
        assert [exchange.method for exchange in proxy.exchanges if exchange.method not in ("GET", "HEAD")] == []


def test_the_first_error_ends_the_others_and_keeps_what_they_have(host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", 4 * MIB)
    with remote(host, "first") as to:
        manifest = copy_version(AdapterFolder(folder), "latest", to, "latest").manifest
    big = max(manifest.layers, key=lambda layer: layer.size)
    weights = next(layer for layer in manifest.layers if layer.path.endswith(".safetensors"))
    half = threading.Event()
    with Proxy(host) as proxy:

        def after(exchange: Exchange) -> None:
            if big.digest in exchange.path and not half.is_set():
                exchange.cut, exchange.wait = 2 * MIB, threading.Event()  # says no more, and nobody wakes it
                half.set()
            if weights.digest in exchange.path:
                half.wait(60)
                exchange.data = b"x" * len(exchange.data)

        proxy.after = after
        with remote(proxy.address, "first") as source:
            with pytest.raises(IntegrityError, match="safetensors"):
                download(source, "latest", tmp_path / "out", jobs=4)
            assert not (tmp_path / "out").exists()
            proxy.after = lambda _: None
            download(source, "latest", tmp_path / "out")
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if big.digest in exchange.path]
    assert ranges[0] is None
    assert (tmp_path / "out/README.md").read_bytes() == (folder / "README.md").read_bytes()


def test_who_interrupts_need_not_wait_as_long_as_a_server_asks(tmp_path: Path, fixed: tuple[Proxy, uploads.Uploads]) -> None:
    proxy, upload_registry = fixed
    write_adapter(tmp_path / "sql")

    def before(exchange: Exchange) -> None:
        upload_registry.answer(exchange)
        if exchange.method == "POST":
            exchange.status, exchange.answer = 429, {"retry-after": "100"}

    proxy.before = before
    program = Program(tmp_path, "push", "sql", f"oci://{proxy.address}/moving/wait")
    process = program.start()
    while not any(exchange.method == "POST" for exchange in list(proxy.exchanges)):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


class Waiting:
    """A place with something to wait for."""

    def __init__(self) -> None:
        self.started, self.ended = threading.Event(), threading.Event()

    def stop(self, *, on: bool) -> None:
        (self.ended.set if on else self.ended.clear)()

    def work(self, _blob: Descriptor) -> bool:
        self.started.set()
        return self.ended.wait(60)


class Interrupted(list[Descriptor]):
    """Blobs with a signal after the first, once work has begun on it."""

    def __init__(self, place: Waiting) -> None:
        super().__init__([Descriptor("", "sha256:a", 0), Descriptor("", "sha256:b", 0)])
        self._place = place

    def __iter__(self) -> Iterator[Descriptor]:
        yield self[0]
        assert self._place.started.wait(60)
        raise KeyboardInterrupt


def test_a_signal_while_the_first_begin_ends_those_that_wait() -> None:
    place: Any = Waiting()  # a source that is only waited for
    with pytest.raises(KeyboardInterrupt):
        Transfer([], None).run_all(place.work, Interrupted(place), place)
    assert place.ended.is_set()  # still: a thread of which the pool was not told in time may be about to wait


def test_a_place_waits_again_after_a_signal_once_it_is_used_again() -> None:
    place: Any = Waiting()
    waited: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        Transfer([], None).run_all(place.work, Interrupted(place), place)
    Transfer([], None).run_all(lambda _: waited.append(not place.ended.is_set()), [Descriptor("", "sha256:a", 0)] * 2, place)
    assert waited == [True, True]


def test_progress_never_goes_back_and_ends_at_the_end(host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", 5 * MIB)
    for job in (1, 4):
        reports: list[tuple[int, int]] = []
        with remote(host, f"progress-{job}") as to:
            copy_version(AdapterFolder(folder), "latest", to, "latest", lambda *pair: reports.append(pair), jobs=job)  # noqa: B023
            download(to, "latest", tmp_path / f"out-{job}", lambda *pair: reports.append(pair), jobs=job)  # noqa: B023
        halves = [n for n in range(1, len(reports)) if reports[n][1] != reports[n - 1][1]]
        for part in (reports[: halves[0]], reports[halves[0] :]):
            assert [bytes_done for bytes_done, _ in part] == sorted(bytes_done for bytes_done, _ in part)
            assert part[-1][0] == part[-1][1]
            assert len(part) > 5


def test_a_pace_asks_for_as_much_time_as_its_rate_takes() -> None:
    pace = RateLimit(1000.0)
    assert [round(pace.delay_after(500), 1) for _ in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert RateLimit().delay_after(10**9) == 0.0


def test_what_is_not_wanted_any_more_is_not_begun(host: str) -> None:
    blobs = [Descriptor("", f"sha256:{n:064}", 1) for n in range(50)]
    started_digests: list[str] = []

    def work(blob: Descriptor) -> None:
        started_digests.append(blob.digest)
        raise NotFoundError("here", "no")

    with pytest.raises(NotFoundError):
        Transfer(blobs, None, 2).run_all(work, blobs)
    assert len(started_digests) < 50


# ---- told of


def test_events_are_JSON_lines_and_a_pipe_gets_nothing_else(run: Run, host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", 2 * MIB)
    assert run("push", folder, f"oci://{host}/moving/events").stderr == ""
    result = run("pull", f"oci://{host}/moving/events", "-o", "out", "--events", "--json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "done"]
    assert events[-1]["done"] == events[-1]["total"] == json.loads(result.stdout)["size"]
    assert {event["event"] for event in events[1:-1]} == {"progress"}
    failed = run("pull", f"oci://{host}/moving/nothing", "-o", "no", "--events", code=3)
    assert [line[:9] for line in failed.stderr.splitlines()] == ['{"event":', '{"event":', "error: oc"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_bytes_speed_and_time_left_unless_it_is_to_be_quiet(host: str, tmp_path: Path, quiet: bool) -> None:
    folder = write_large(tmp_path / "sql", 2_000_000)
    with remote(host, f"terminal-{int(quiet)}") as to:
        copy_version(AdapterFolder(folder), "latest", to, "latest")
    ours, theirs = pty.openpty()
    words = ["pull", f"oci://{host}/moving/terminal-{int(quiet)}", "-o", "out", "--limit-rate", "3M"]
    command = [sys.executable, "-m", "adapterhub", *words, *(["-q"] if quiet else [])]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": PATH}, stderr=theirs, stdout=-3, check=True)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(ours, 1 << 16):
            output += piece
    os.close(ours)
    text = output.decode()
    assert (not text) if quiet else ("MB/s" in text and " left" in text and "/2.0 MB" in text)


@pytest.mark.parametrize("rate", ["0", "-1", "fast", "1T", "1e3", ""])
def test_an_invalid_rate_is_a_usage_error(run: Run, rate: str) -> None:
    assert "like 500k or 10M" in run("pull", "oci://localhost/a/b", "--limit-rate", rate, code=2).stderr


# ---- there already


def test_a_pull_of_existing_files_sends_one_request_and_reports_it(run: Run, host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", 2 * MIB)
    run("push", folder, f"oci://{host}/moving/there")
    with Proxy(host) as proxy:
        words = ("pull", f"oci://{proxy.address}/moving/there", "-o", "out")
        run(*words)
        proxy.exchanges.clear()
        result = run(*words)
        assert result.stdout.startswith("already there: ")
        assert [exchange.method for exchange in proxy.exchanges] == ["GET"]
        assert json.loads(run(*words, "--json").stdout)["new"] is False
        for change in ("README.md", "more.txt", "adapter.json"):
            path = tmp_path / "out" / change
            before = path.read_bytes() if path.exists() else None
            path.write_bytes(b"x" * len(before or b"x"))
            assert f"{change} (" in run(*words, code=2).stderr
            assert path.read_bytes() == b"x" * len(before or b"x")
            path.write_bytes(before) if before else path.unlink()
        run(*words)


def test_what_others_made_without_a_manifest_is_there_with_the_one_that_follows(host: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")
    with remote(host, "plain") as to:
        source = AdapterFolder(folder)
        manifest = source.manifest("latest")
        document = json_file.parse_object(manifest.raw, "")
        document["layers"] = [layer for layer in document["layers"] if ADAPTER_JSON not in str(layer)]
        plain = oci_manifest.parse(json_file.canonical_bytes(document), "")
        for blob in (*plain.layers, plain.config):
            to.put_blob(blob, source)
        to.put_manifest(plain, "latest")
        unchanged: list[bool] = []
        for _ in range(2):
            download(to, "latest", tmp_path / "out", on_unchanged=lambda: unchanged.append(True))
        assert unchanged == [True]
        (tmp_path / "out/adapter.json").write_text("{}")
        with pytest.raises(OutputExistsError):
            download(to, "latest", tmp_path / "out")
