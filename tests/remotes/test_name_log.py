"""What a network, a store and others who write do wrong to an object store: nothing of it is accepted, and nothing lost."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes.adapter_folders import AdapterFolder, download
from adapterhub.remotes.objects.object_repository import ObjectRepository
from adapterhub.remotes.version_copy import copy_version, distinct_blobs
from adapterhub.store.store import FOLDER, Entry
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RemoteError
from tests.cli.test_process import PATH
from tests.conftest import Run
from tests.remotes.test_object_repository import place, synced
from tests.support.adapters import write_adapter
from tests.support.object_stores import Server
from tests.support.proxy import Exchange, Proxy

pytestmark = pytest.mark.peer
BIG = 300_000


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(moto.url.removeprefix("http://")) as server:
        yield server


def behind(proxy: Proxy) -> Server:
    return Server(f"http://{proxy.address}")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").write_text("# Long\n" + random.Random(0).randbytes(BIG // 2).hex())
    return folder


def pushed(server: Server, bucket: str, adapter: Path) -> Manifest:
    with place(server, bucket) as to:
        return copy_version(AdapterFolder(adapter), "latest", to, "prod").manifest


def readme(manifest: Manifest) -> Descriptor:
    return next(layer for layer in manifest.layers if layer.path == "README.md")


def is_readme(manifest: Manifest, exchange: Exchange) -> bool:
    return exchange.method == "GET" and readme(manifest).digest[7:] in exchange.path


# ---- others who write


def test_of_8_processes_that_race_for_an_entry_one_wins_each_time(moto: Server, tmp_path: Path) -> None:
    bucket, go = moto.bucket(), tmp_path / "go"
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from adapterhub.remotes.objects.object_repository import ObjectRepository\n"
        "from adapterhub.remotes.objects.object_address import ObjectAddress\n"
        "from adapterhub.store.store import Entry\nimport os\n"
        "place = ObjectRepository(ObjectAddress.parse(sys.argv[1]), os.environ)\nplace._exclusive = True\n"
        "print('ready', flush=True)\n"
        "while not Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
        "print(place._append(Entry('team/sql', 1, 'push', sys.argv[3], 'sha256:' + '0' * 64, 1, 1, ('latest',))))\n"
    )
    command = [sys.executable, "-c", script, f"s3://{bucket}/team/sql", str(go)]
    environment = {**moto.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": PATH}
    writers = [
        subprocess.Popen([*command, f"writer {n}"], env=environment, stdout=subprocess.PIPE, text=True) for n in range(8)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    go.touch()
    answers = [writer.communicate(timeout=60)[0].strip() for writer in writers]
    assert sorted(answers) == ["False"] * 7 + ["True"]
    with place(moto, bucket) as _, ObjectRepository(_.address.parse(f"s3://{bucket}/team/sql"), moto.environ) as repository:
        raw = repository._log.read_entry(1)
        assert raw is not None
        assert Entry.parse(raw, "").time == f"writer {answers.index('True')}"


def test_8_who_push_at_once_get_8_versions(moto: Server, tmp_path: Path) -> None:
    bucket = moto.bucket()
    folders = [AdapterFolder(write_adapter(tmp_path / str(seed), seed)) for seed in range(8)]
    failures: list[BaseException] = []

    def push(folder: AdapterFolder) -> None:
        try:
            with place(moto, bucket, retries=3) as to:
                copy_version(folder, "latest", to, "prod")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=push, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with place(moto, bucket) as url:
        digests = {url.manifest(f"v{number}").digest for number in range(1, 9)}
        assert digests == {folder.manifest("latest").digest for folder in folders}


def test_an_entry_of_another_writer_is_noticed_where_nothing_is_exclusive(
    rclone: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place(rclone, rclone.bucket()) as to:
        source = AdapterFolder(adapter)
        for blob in distinct_blobs(source.manifest("latest")):
            to.put_blob(blob, source)
        create = to._bucket.create_object

        def late(key: str, data: bytes) -> bool:
            create(key, data)
            return create(key, data.replace(b'"prod"', b'"test"'))

        monkeypatch.setattr(to._bucket, "create_object", late)
        with pytest.raises(ConflictError, match="another writer") as caught:
            to.put_manifest(source.manifest("latest"), "prod")
        assert caught.value.exit_code == 7


def test_a_created_entry_whose_answer_got_lost_is_known_as_ones_own(proxy: Proxy, moto: Server, adapter: Path) -> None:
    bucket, lost = moto.bucket(), iter((True,))

    def after(exchange: Exchange) -> None:
        if exchange.method == "PUT" and "/refs/" in exchange.path:
            exchange.hang_up = next(lost, False)

    proxy.after = after
    with place(behind(proxy), bucket, retries=3) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
    assert [exchange.status for exchange in proxy.exchanges if "/refs/" in exchange.path and exchange.method == "PUT"] == [
        200,
        412,
    ]
    with place(moto, bucket) as repository, pytest.raises(NotFoundError):
        repository.manifest("v2")


# ---- killed


def test_a_push_killed_anywhere_leaves_a_clean_store_and_is_resumed(moto: Server, adapter: Path, tmp_path: Path) -> None:
    """Between any two requests, and beside half of one: what lies there then is a registry without errors."""
    with Proxy(moto.url.removeprefix("http://")) as proxy:
        pushed(behind(proxy), moto.bucket(), adapter)
        writes = sum(exchange.method in ("PUT", "POST") for exchange in proxy.exchanges)
    for stop in sorted(random.Random(1).sample(range(writes), 3)):
        bucket, stopped = moto.bucket(), threading.Event()
        with Proxy(moto.url.removeprefix("http://")) as proxy:
            numbers = itertools.count()  # one step, whichever thread asks

            def before(
                exchange: Exchange,
                stop: int = stop,
                stopped: threading.Event = stopped,
                numbers: Iterator[int] = numbers,
            ) -> None:
                if exchange.method in ("PUT", "POST") and next(numbers) == stop:
                    stopped.set()
                    threading.Event().wait(1)
                    exchange.status = 503

            proxy.before = before
            address = f"s3://{bucket}/deep/down/team/sql:prod"
            environment = {**behind(proxy).environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": PATH}
            command = [sys.executable, "-m", "adapterhub", "push", str(adapter), address]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not stopped.wait(0.05) and process.poll() is None:
                pass
            if not stopped.is_set():  # of a probe's writers a few more or less may write
                continue
            process.kill()
            process.wait()
            sent_before = {
                exchange.path.rpartition("/")[2]
                for exchange in proxy.exchanges
                if exchange.method == "PUT" and "/blobs/" in exchange.path
            }
        root = tmp_path / f"reg-{stop}"
        (root / FOLDER).mkdir(parents=True)
        synced(moto, f"there:{bucket}/deep/down", str(root / FOLDER))
        if (root / FOLDER / "oci-layout").exists():
            with Registry.open(root) as registry:
                assert [finding for finding in fsck(registry) if finding.severity == "error"] == []
                assert registry.list() == []
        with Proxy(moto.url.removeprefix("http://")) as proxy:
            version = pushed(behind(proxy), bucket, adapter)
            again = {
                exchange.path.rpartition("/")[2]
                for exchange in proxy.exchanges
                if exchange.method == "PUT" and "/blobs/" in exchange.path
            }
        assert not sent_before & again
        synced(moto, f"there:{bucket}/deep/down", str(root / FOLDER))
        with Registry.open(root) as registry:
            registry.rebuild_index()
            assert {finding.code for finding in fsck(registry)} <= {"leftovers"}  # of a probe
            assert registry.resolve(Ref.parse("team/sql:prod")).digest == version.digest


# ---- bytes


def test_a_flipped_byte_on_the_server_is_never_written(rclone: Server, adapter: Path, tmp_path: Path, run: Run) -> None:
    bucket = rclone.bucket()
    with place(rclone, bucket, retries=3) as to:  # rclone fails now and then where two requests make a folder at once
        manifest = copy_version(AdapterFolder(adapter), "latest", to, "prod").manifest
    assert rclone.folder is not None
    blobs = rclone.folder / bucket / "deep/down/blobs/sha256"
    for digest in (manifest.digest, manifest.layers[0].digest, readme(manifest).digest):
        path = blobs / digest[7:]
        right = path.read_bytes()
        path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        result = run("pull", f"s3://{bucket}/deep/down/team/sql:prod", "-o", "out", env=rclone.environ, code=4)
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        path.write_bytes(right)
    run("pull", f"s3://{bucket}/deep/down/team/sql:prod", "-o", "out", env=rclone.environ)


def test_no_flip_on_the_way_becomes_a_blob_or_a_file(proxy: Proxy, moto: Server, tmp_path: Path) -> None:
    adapter, bucket = write_adapter(tmp_path / "sql"), moto.bucket()
    version = pushed(moto, bucket, adapter)
    answers = 2 + len(version.layers)
    for seed in range(12):
        dice, out = random.Random(seed), tmp_path / f"out-{seed}"
        countdown = dice.randrange(answers)

        def after(exchange: Exchange, dice: random.Random = dice) -> None:
            nonlocal countdown
            if exchange.method == "GET" and exchange.data and exchange.status == 200 and "list-type" not in exchange.path:
                if countdown == 0:
                    at = dice.randrange(len(exchange.data))
                    exchange.data = (
                        exchange.data[:at] + bytes([exchange.data[at] ^ (1 << dice.randrange(8))]) + exchange.data[at + 1 :]
                    )
                countdown -= 1

        proxy.after = after
        with place(behind(proxy), bucket) as source:
            try:
                manifest = download(source, "prod", out, pauses=())
            except IntegrityError:
                assert not out.exists()
                continue
            except NotFoundError:  # the entry, which names a tag
                continue
        assert countdown >= 0 or manifest.digest == version.digest


def test_a_download_that_was_cut_off_resumes_where_it_stopped(
    proxy: Proxy, moto: Server, adapter: Path, tmp_path: Path
) -> None:
    bucket, cuts = moto.bucket(), iter((100_000, 100_000))
    version = pushed(moto, bucket, adapter)

    def after(exchange: Exchange) -> None:
        if is_readme(version, exchange):
            exchange.cut = next(cuts, None)

    proxy.after = after
    with place(behind(proxy), bucket) as source:
        download(source, "prod", tmp_path / "out", pauses=(0.0,))
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if is_readme(version, exchange)]
    assert len(ranges) == 3
    assert ranges[0] is None
    assert all(requested_range is not None and requested_range.startswith("bytes=") for requested_range in ranges[1:])
    assert (tmp_path / "out/README.md").read_bytes() == (adapter / "README.md").read_bytes()


def test_a_range_that_is_off_by_one_is_found_out_and_the_whole_fetched(
    proxy: Proxy, moto: Server, adapter: Path, tmp_path: Path
) -> None:
    bucket, cuts = moto.bucket(), iter((100_000,))
    version = pushed(moto, bucket, adapter)
    whole = (adapter / "README.md").read_bytes()

    def after(exchange: Exchange) -> None:
        if is_readme(version, exchange):
            exchange.cut = next(cuts, None)
            if start := exchange.headers.get("range"):
                exchange.data = whole[int(start[6:-1]) - 1 : -1]

    proxy.after = after
    with place(behind(proxy), bucket) as source:
        download(source, "prod", tmp_path / "out", pauses=(0.0,))
        assert [bool(exchange.headers.get("range")) for exchange in proxy.exchanges if is_readme(version, exchange)] == [
            False,
            True,
            False,
        ]
        assert (tmp_path / "out/README.md").read_bytes() == whole
        proxy.after = lambda exchange: setattr(
            exchange, "data", exchange.data[:-1] + b"!" if is_readme(version, exchange) else exchange.data
        )
        proxy.exchanges.clear()
        with pytest.raises(IntegrityError):
            download(source, "prod", tmp_path / "wrong", pauses=(0.0,))
    assert (
        len([exchange for exchange in proxy.exchanges if is_readme(version, exchange)]) == 1
    )  # wrong from its start: once is enough
    assert not (tmp_path / "wrong").exists()


def test_errors_that_may_pass_are_tried_again(proxy: Proxy, moto: Server, adapter: Path, tmp_path: Path) -> None:
    bucket = moto.bucket()
    version = pushed(moto, bucket, adapter)
    answers = iter((503, 500))
    proxy.before = lambda exchange: setattr(exchange, "status", next(answers, 0) if is_readme(version, exchange) else 0)
    with place(behind(proxy), bucket, retries=2) as source:
        download(source, "prod", tmp_path / "out", pauses=(0.0, 0.0))
        proxy.before = lambda exchange: setattr(exchange, "status", 503)
        with pytest.raises(RemoteError, match="answers 503"):
            source.manifest("prod")


def test_a_short_blob_there_is_no_blob(proxy: Proxy, moto: Server, adapter: Path) -> None:
    bucket = moto.bucket()
    version = pushed(moto, bucket, adapter)
    with place(moto, bucket) as to:
        key = f"blobs/sha256/{readme(version).digest[7:]}"
        to._bucket.put_object(key, b"short")
        assert not to.has_blob(readme(version))
        with pytest.raises(IntegrityError, match="has 5 bytes"), to.open_blob(readme(version)):
            pass
        assert copy_version(AdapterFolder(adapter), "latest", to, "prod").sent == readme(version).size


# ---- the log


@pytest.mark.parametrize("harm", ["lost", "changed", "swapped", "nonsense"])
def test_a_tampered_log_is_not_trusted(moto: Server, tmp_path: Path, harm: str) -> None:
    bucket = moto.bucket()
    for seed in range(3):
        pushed(moto, bucket, write_adapter(tmp_path / str(seed), seed))
    with place(moto, bucket) as url:
        first, second = (url._log.read_entry(seq) for seq in (1, 2))
        assert first is not None
        assert second is not None
        key = url._log.key(2)
        if harm == "lost":
            url._bucket.remove(key)
        else:
            document = json.loads(second)
            document["time"] = "1999-01-01T00:00:00Z"
            changed = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
            url._bucket.put_object(key, {"changed": changed, "swapped": first, "nonsense": b"{"}[harm])
    with place(moto, bucket) as url, pytest.raises(IntegrityError):
        url.manifest("latest")
    with place(moto, bucket) as to, pytest.raises(IntegrityError):
        copy_version(AdapterFolder(tmp_path / "0"), "latest", to, "test")


def test_a_list_that_is_behind_hides_no_entry(proxy: Proxy, moto: Server, tmp_path: Path) -> None:
    bucket = moto.bucket()
    for seed in range(3):
        version = pushed(moto, bucket, write_adapter(tmp_path / str(seed), seed))
    empty = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>'

    def before(exchange: Exchange) -> None:
        if "list-type" in exchange.path:
            exchange.status, exchange.data, exchange.answer = 200, empty, {"content-type": "application/xml"}

    proxy.before = before
    with place(behind(proxy), bucket) as repository:
        assert repository.manifest("latest").digest == version.digest
        assert repository.manifest("v3").digest == version.digest


def test_a_large_blob_goes_in_parts_and_with_wrong_bytes_never_ends(moto: Server, tmp_path: Path, adapter: Path) -> None:
    bucket = moto.bucket()
    (adapter / "README.md").write_bytes(b"0123456789abcdef" * (1 << 20))
    for server, name in ((moto, bucket), (tmp_path / "store", "")):
        source = AdapterFolder(adapter)
        with place(server, name, piece=5 << 20) as to:  # type: ignore[arg-type]
            blob = readme(source.manifest("latest"))
            text = (adapter / "README.md").read_bytes()
            (adapter / "README.md").write_bytes(text[:-1] + b"!")
            with pytest.raises(IntegrityError, match="were read instead"):
                to.put_blob(blob, source)
            assert not to.has_blob(blob)
            (adapter / "README.md").write_bytes(text)
            assert to.put_blob(blob, source) == blob.size
            assert to.has_blob(blob)
            with to.open_blob(blob) as reader:
                buffer, n = bytearray(blob.size), 0
                while read_count := reader.readinto(memoryview(buffer)[n:]):
                    n += read_count
            assert buffer == text
    with place(moto, bucket) as url, place(tmp_path / "other", piece=5 << 20) as two, place(moto, moto.bucket()) as three:
        assert two.put_blob(blob, url) == three.put_blob(blob, two) == blob.size
    assert list((tmp_path / "store").rglob("*#*")) == []


def test_wrong_bytes_are_the_reason_even_if_the_store_cannot_abort_the_upload(
    moto: Server, proxy: Proxy, adapter: Path
) -> None:
    bucket = moto.bucket()
    (adapter / "README.md").write_bytes(b"0123456789abcdef" * (1 << 20))
    source = AdapterFolder(adapter)
    blob = readme(source.manifest("latest"))
    (adapter / "README.md").write_bytes(b"!" * blob.size)

    def before(exchange: Exchange) -> None:
        if exchange.method == "DELETE":
            exchange.status = 400  # at once; a 500 is tried again

    proxy.before = before
    with place(behind(proxy), bucket, piece=5 << 20) as to, pytest.raises(IntegrityError, match="were read instead"):
        to.put_blob(blob, source)


def test_a_stalled_reader_causes_no_lost_version(moto: Server, adapter: Path) -> None:
    """A place that was opened long ago sees what was pushed since, and appends to that."""
    bucket = moto.bucket()
    with place(moto, bucket) as old:
        copy_version(AdapterFolder(adapter), "latest", old, "prod")
        (adapter / "README.md").write_text("# 2\n")
        pushed(moto, bucket, adapter)
        (adapter / "README.md").write_text("# 3\n")
        manifest = copy_version(AdapterFolder(adapter), "latest", old, "prod").manifest
        assert old.manifest("v3").digest == manifest.digest
