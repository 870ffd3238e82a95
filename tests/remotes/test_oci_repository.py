"""What a network and a registry do wrong: nothing of it is accepted, and nothing that was received is received again."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.remotes.adapter_folders import AdapterFolder, download
from adapterhub.remotes.download import NOTE_INTERVAL
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version, distinct_blobs
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, NotFoundError, RefusedError, RemoteError
from tests.cli.test_process import PATH
from tests.support.adapters import write_adapter
from tests.support.proxy import Exchange, Proxy

pytestmark = pytest.mark.peer
BIG = 300_000


@pytest.fixture
def proxy(host: str) -> Iterator[Proxy]:
    with Proxy(host) as server:
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").write_text("# Long\n" + random.Random(0).randbytes(BIG // 2).hex())
    return folder


def remote(host: str, name: str, *, pauses: tuple[float, ...] = (0.0,), piece: int = 1 << 16) -> OciRepository:
    return OciRepository(OciAddress.parse(f"oci://{host}/faults/{name}"), pauses=pauses, piece=piece, largest=piece)


def pushed(host: str, name: str, adapter: Path) -> Manifest:
    with remote(host, name) as to:
        return copy_version(AdapterFolder(adapter), "latest", to, "latest").manifest


def readme(manifest: Manifest) -> Descriptor:
    return next(layer for layer in manifest.layers if layer.path == "README.md")


def flip(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_whole_copy_has_a_connection_for_each_of_its_jobs(proxy: Proxy, adapter: Path, tmp_path: Path, jobs: int) -> None:
    with remote(proxy.address, f"kept-{jobs}") as place:
        copy_version(AdapterFolder(adapter), "latest", place, "latest", jobs=jobs)
        download(place, "latest", tmp_path / "out", jobs=jobs)
    assert len(proxy.exchanges) > 20
    assert 1 <= proxy.connections <= jobs


# ---- flips


def test_none_of_200_flips_on_the_way_here_is_accepted(proxy: Proxy, host: str, tmp_path: Path) -> None:
    version = pushed(host, "flips", write_adapter(tmp_path / "sql"))
    answers: dict[str, Exchange] = {}

    def before(exchange: Exchange) -> None:
        if recorded := answers.get(exchange.path):  # what the registry has said once
            exchange.status, exchange.answer, exchange.data = recorded.status, recorded.answer, recorded.data

    proxy.before, proxy.after = before, lambda exchange: answers.setdefault(exchange.path, replace(exchange)) and None
    for reference in ("latest", version.digest):
        with remote(proxy.address, "flips") as source:
            download(source, reference, tmp_path / reference[-6:])
    for seed in range(200):
        dice, out = random.Random(seed), tmp_path / f"out-{seed}"
        countdown = dice.randrange(1 + len(version.layers))

        def after(exchange: Exchange, dice: random.Random = dice) -> None:
            nonlocal countdown
            if countdown == 0:
                exchange.data = flip(exchange.data, dice)
            countdown -= 1

        proxy.after = after
        reference = version.digest if seed % 2 else "latest"
        with remote(proxy.address, "flips", pauses=()) as source, pytest.raises(IntegrityError):
            download(source, reference, out, pauses=(), jobs=1)
        assert not out.exists()


def test_none_of_30_flips_on_the_way_there_is_accepted(proxy: Proxy, host: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "sql")
    source = AdapterFolder(adapter)
    for seed in range(30):
        dice, name = random.Random(seed), f"flips-{seed}"
        countdown = dice.randrange(6)

        def before(exchange: Exchange, dice: random.Random = dice) -> None:
            nonlocal countdown
            if exchange.method == "PUT":
                if countdown == 0:
                    exchange.body = flip(exchange.body, dice)
                countdown -= 1

        proxy.before = before
        with remote(proxy.address, name, pauses=()) as to, pytest.raises(AdapterhubError) as caught:
            copy_version(source, "latest", to, "latest", jobs=1)
        assert caught.value.exit_code in (4, 5)
        with remote(host, name) as repository, pytest.raises(NotFoundError):
            repository.manifest("latest")


# ---- cuts


def test_errors_that_may_pass_are_tried_again_and_others_are_not(proxy: Proxy, host: str, adapter: Path) -> None:
    version = pushed(host, "again", adapter)
    answers = iter((503, 429))

    def before(exchange: Exchange) -> None:
        exchange.status = next(answers, 0)

    proxy.before = before
    with remote(proxy.address, "again", pauses=(0.0, 0.0)) as source:
        assert source.manifest("latest").digest == version.digest
        proxy.before = lambda exchange: setattr(exchange, "status", 400)
        with pytest.raises(RemoteError, match="HTTP 400"):
            source.manifest("latest")
    assert len(proxy.exchanges) == 4


# ---- lies


def test_a_registry_that_claims_blobs_it_lacks_gets_no_tag(proxy: Proxy, host: str, adapter: Path) -> None:
    source = AdapterFolder(adapter)
    sizes = {blob.digest: blob.size for blob in distinct_blobs(source.manifest("latest"))}

    def before(exchange: Exchange) -> None:
        if exchange.method == "HEAD" and "/blobs/" in exchange.path:
            exchange.status, exchange.answer = 200, {"content-length": str(sizes[exchange.path.rpartition("/")[2]])}

    proxy.before = before
    with remote(proxy.address, "has-not") as to, pytest.raises(RemoteError, match="unknown"):
        copy_version(source, "latest", to, "latest")
    with remote(host, "has-not") as repository, pytest.raises(NotFoundError):
        repository.manifest("latest")


HOSTILE = {
    "too large": (b" " * (oci_manifest.MAX_MANIFEST + 1), FormatError),
    "no JSON": (b"{", FormatError),
    "deep": (b"[" * 100_000, FormatError),
    "an index": (b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}', FormatError),
    "climbs": ("../evil.json", FormatError),
    "absolute": ("/etc/evil.json", FormatError),
    "a pickle": ("weights.bin", RefusedError),
    "a program": ("run.sh", RefusedError),
    "100 MB": (b" " * 100_000_000, FormatError),
    "climbs back": ("a/../../evil.json", FormatError),
    "backslashes": ("..\\evil.json", FormatError),
    "a drive": ("C:evil.json", FormatError),
    "NUL": ("evil.json\0.txt", FormatError),
    "a device": ("nul.json", FormatError),
    "a device below": ("docs/COM1.txt", FormatError),
    "a dotfile": (".ssh/authorized_keys.txt", FormatError),
    "encoded": ("%2e%2e/evil.json", FormatError),
    "a trailing dot": ("evil.json.", FormatError),
    "case": (["notes.md", "NOTES.md"], FormatError),
    "accents": (["caf\u00e9.md", "cafe\u0301.md"], FormatError),
    "ligatures": (["stra\u00dfe.md", "STRASSE.md"], FormatError),
    "a file as a folder": (["a.md", "a.md/b.md"], FormatError),
    "a digest that is a path": (
        b'{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:../../x","size":1},"layers":[]}',
        FormatError,
    ),
    "a size below nothing": (
        b'{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:%s","size":-1},"layers":[]}' % (b"0" * 64),
        FormatError,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(proxy: Proxy, tmp_path: Path, case: str) -> None:
    hostile, expected = HOSTILE[case]
    if not isinstance(hostile, bytes):
        blob = {"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1}
        titles = [hostile] if isinstance(hostile, str) else hostile
        layers = [{**blob, "annotations": {oci_manifest.TITLE: title}} for title in titles]
        hostile = json.dumps({"schemaVersion": 2, "config": blob, "layers": layers}).encode()

    def before(exchange: Exchange) -> None:
        exchange.status, exchange.data = 200, hostile

    proxy.before = before
    with remote(proxy.address, "hostile", pauses=()) as source, pytest.raises(expected):
        download(source, "latest", tmp_path / "out", pauses=())
    assert list(tmp_path.iterdir()) == []


LIES = ["endless", "endless, with a length", "compressed", "a bomb", "short", "redirected forever", "redirected to a file"]


@pytest.mark.parametrize("document_kind", ["manifest", "blob"])
@pytest.mark.parametrize("lie", LIES)
def test_a_dishonest_response_body_is_one_error_and_leaves_no_file(
    proxy: Proxy, host: str, adapter: Path, tmp_path: Path, lie: str, document_kind: str
) -> None:
    version = pushed(host, "bodies", adapter)

    def after(exchange: Exchange) -> None:
        if ("/manifests/" in exchange.path) != (document_kind == "manifest"):
            return
        if "endless" in lie:
            exchange.endless, exchange.data = True, b"x" * (1 << 16)
            exchange.answer["connection"] = "close"
            exchange.answer["content-length"] = str(2**50) if "length" in lie else ""
            if not exchange.answer["content-length"]:
                del exchange.answer["content-length"]
        elif lie == "short":
            exchange.data, exchange.answer["content-length"] = exchange.data[:-1], str(len(exchange.data))
            exchange.cut = len(exchange.data)
        elif "redirected" in lie:
            exchange.status, exchange.data, exchange.answer["content-length"] = 307, b"", "0"
            exchange.answer["location"] = exchange.path if "ever" in lie else "file:///etc/passwd"
        else:
            exchange.data = gzip.compress(exchange.data if lie == "compressed" else bytes(50_000_000))
            exchange.answer.update({"content-encoding": "gzip", "content-length": str(len(exchange.data))})

    proxy.after = after
    with remote(proxy.address, "bodies", pauses=()) as source, pytest.raises(AdapterhubError) as caught:
        download(source, version.digest, tmp_path / "out", pauses=())
    assert caught.value.exit_code in (4, 5)
    assert not (tmp_path / "out").exists()
    paths = [path for path in tmp_path.rglob("*") if not path.is_relative_to(adapter) and path.is_file()]
    assert {path.suffix for path in paths} <= {".part", ".json"}
    assert sum(path.stat().st_size for path in paths) < 2 * sum(blob.size for blob in distinct_blobs(version))


@pytest.mark.parametrize("body", [b"", b"[]", b'{"tags": 3}', b'{"tags": {"a": 1}}', b"{" * 5000, b"\xff"])
def test_a_malformed_tag_list_is_one_line(proxy: Proxy, body: bytes) -> None:
    def before(exchange: Exchange) -> None:
        exchange.status, exchange.data = 200, body

    proxy.before = before
    tags: list[str] = []
    with remote(proxy.address, "tags", pauses=()) as source, contextlib.suppress(FormatError):
        tags = source.tags()
    assert tags in ([], ["a"])


def test_tags_come_page_by_page_and_never_for_ever(proxy: Proxy) -> None:
    def before(exchange: Exchange) -> None:
        page = int(exchange.path.partition("last=")[2] or 0)
        exchange.status, exchange.data = 200, json.dumps({"tags": [f"t{min(page, 3)}", "../bad"]}).encode()
        exchange.answer["link"] = f'</v2/faults/pages/tags/list?last={page + 1}>; rel="next"'

    proxy.before = before
    with remote(proxy.address, "pages") as source:
        assert source.tags() == ["t0", "t1", "t2", "t3"]
    assert len(proxy.exchanges) == 5


def test_a_full_disk_is_one_line_and_the_next_run_resumes(host: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").write_bytes(b"x" * (3 * NOTE_INTERVAL))
    version = pushed(host, "full", folder)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * NOTE_INTERVAL + 5000}, {2 * NOTE_INTERVAL + 5000}))\n"
        "from adapterhub.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": PATH}
    with Proxy(host) as proxy:
        address = f"oci://{proxy.address}/faults/full"
        command = [sys.executable, "-c", limited, "pull", address, "-o", "out"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (result.returncode, len(result.stderr.splitlines())) == (8, 1), result.stderr
        assert not (tmp_path / "out").exists()
        with remote(proxy.address, "full") as source:
            download(source, "latest", tmp_path / "out")
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if readme(version).digest in exchange.path]
    assert ranges == [None, f"bytes={2 * NOTE_INTERVAL}-"]
