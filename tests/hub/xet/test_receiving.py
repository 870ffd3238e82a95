"""Files by Xet, from the client that everybody has, and from ones that nobody should trust."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import pytest
import urllib3
from safetensors.numpy import load_file

from adapterhub.hub.git_objects import REGULAR_LIMIT
from adapterhub.hub.xet import xet_formats
from adapterhub.manifest import oci_manifest
from adapterhub.registry.repository_documents import commit_id
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import FormatError
from tests.hub.conftest import Running, run_hf
from tests.hub.killing import killable_hub
from tests.support.adapters import write_large_adapter


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An adapter whose weights are too large for a commit."""
    folder = write_large_adapter(tmp_path / "large")
    assert (folder / "adapter_model.safetensors").stat().st_size > REGULAR_LIMIT
    return folder


def test_hf_upload_of_today_sends_by_xet_and_every_byte_arrives(hub: Running, large: Path, tmp_path: Path) -> None:
    answer = run_hf(hub, tmp_path, "upload", "team/sql", str(large), ".")
    assert commit_id(oci_manifest.build(large).digest) in answer
    run_hf(hub, tmp_path, "download", "team/sql", "--local-dir", str(tmp_path / "out"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (large / name).read_bytes()


def test_a_process_that_receives_by_xet_holds_no_more_than_some_pieces(tmp_path: Path) -> None:
    """512 MB took 176 MB of memory; the file here has three xorbs and more than the process may hold."""
    weights = {"w": np.random.default_rng(0).integers(0, 256, 160 << 20, np.uint8)}
    (tmp_path / "model").mkdir()
    safetensors_file.write(tmp_path / "model" / "model.safetensors", weights, {})
    with killable_hub(tmp_path / "hub") as hub:
        run_hf(hub.running(), tmp_path, "upload", "team/model", str(tmp_path / "model"), ".")
        assert hub.peak < 120


def test_a_client_that_remembers_xorbs_that_are_gone_succeeds_when_it_is_run_again(
    hub: Running, large: Path, tmp_path: Path
) -> None:
    run_hf(hub, tmp_path, "upload", "team/sql", str(large), ".")
    tmp = hub.folder / ".adapterhub" / "tmp"
    paths = list(tmp.glob("*.xorb"))
    assert paths
    for path in paths:
        path.unlink()
    # The same tensors behind another header: the client remembers their chunks, and sends none of them.
    weights = load_file(large / "adapter_model.safetensors")
    safetensors_file.write(large / "adapter_model.safetensors", weights, {"format": "pt", "order": "other"})
    run_hf(hub, tmp_path, "upload", "team/sql", str(large), ".", code=1)
    answer = run_hf(hub, tmp_path, "upload", "team/sql", str(large), ".")
    assert commit_id(oci_manifest.build(large).digest) in answer


# ---- what no client sends


def chunk(data: bytes, scheme: int = 0, *, size: int | None = None, raw: bytes | None = None) -> bytes:
    """A chunk of a xorb; `size` and `raw` to lie."""
    raw = (data if scheme == 0 else lz4.frame.compress(data)) if raw is None else raw
    size = len(data) if size is None else size
    return struct.pack("<II", len(raw) << 8, size << 8 | scheme) + raw


def shard(digest: bytes, terms: list[tuple[str, int, int, int]], flags: int = 1 << 30) -> bytes:
    """A shard of one file: terms of xorb, size, first and last chunk."""

    def hashed(text: str) -> bytes:
        return struct.pack("<4Q", *(int(text[at : at + 16], 16) for at in range(0, 64, 16)))

    parts = [struct.pack("<32sQQ", b"\1" * 32, 2, 0), struct.pack("<32sII8s", b"\2" * 32, flags, len(terms), b"")]
    parts += [struct.pack("<32sIIII", hashed(xorb), 0, size, first, end) for xorb, size, first, end in terms]
    parts += [struct.pack("<32s16s", hashed(digest.hex()), b""), struct.pack("<32s16s", b"\xff" * 32, b"")]
    return b"".join(parts)


class Sender:
    """A client of the store of one repository, by its own requests."""

    def __init__(self, hub: Running, name: str, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        answer = urllib3.request("GET", f"{hub.url}/api/models/{name}/xet-write-token/main", headers=headers)
        assert answer.status == 200, answer.data
        self.url = answer.headers["x-xet-cas-url"]
        self.headers = {"Authorization": f"Bearer {answer.headers['x-xet-access-token']}"}

    def post(self, path: str, data: bytes) -> tuple[int, str]:
        answer = urllib3.request("POST", f"{self.url}{path}", body=data, headers=self.headers, retries=False)
        return answer.status, answer.data.decode()


@pytest.fixture
def sender(hub: Running, hf: Any) -> Sender:
    """A sender to team/sql, which exists."""
    hf.create_repo("team/sql")
    return Sender(hub, "team/sql", hub.token)


XORB, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize("scheme", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000, 131072])
def test_chunks_of_every_kind_become_what_they_were(size: int, scheme: int) -> None:
    data = np.random.default_rng(size).integers(0, 9, size, dtype=np.uint8).tobytes()
    grouped = b"".join(data[lane::4] for lane in range(4))
    raw = chunk(grouped if scheme == 2 else data, scheme)
    (only_chunk,) = xet_formats.chunks(lambda at, n: raw[at : at + n], len(raw), "x")
    assert xet_formats.decompress(only_chunk, raw[only_chunk.start : only_chunk.start + only_chunk.stored], "x") == data


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\0\1\2", "ends within the header"),
        (b"\7" * 100, "no chunk begins"),
        (chunk(b"x", size=(1 << 24) - 1), "larger than a chunk may be"),
        (struct.pack("<II", 0xFFFFFF00, 1 << 8), "larger than a chunk may be"),
        (chunk(b"x", 3), "compressed in an unknown way"),
        (chunk(b""), "empty"),
        (chunk(b"x") * (xet_formats.MAX_CHUNKS + 1), "more than 8192 chunks"),
    ],
)
def test_a_malformed_xorb_is_refused(sender: Sender, raw: bytes, words: str) -> None:
    status, body = sender.post(f"/v1/xorbs/default/{XORB}", raw)
    assert (status, words in body) == (400, True), body


def test_a_xorb_is_named_by_its_hash(sender: Sender) -> None:
    status, body = sender.post("/v1/xorbs/default/zz", chunk(b"x"))
    assert (status, "zz: is not the hash of a xorb" in body) == (400, True), body


def test_a_chunk_that_unpacks_to_more_than_it_says_is_not_unpacked() -> None:
    raw = chunk(b"\0" * (64 << 20), 1, size=1000)
    (parsed_chunk,) = (
        xet_formats.chunks(lambda at, n: raw[at : at + n], len(raw), "x") if len(raw) < xet_formats.MAX_CHUNK else (None,)
    )
    with pytest.raises(FormatError, match="or more instead of 1000"):
        xet_formats.decompress(parsed_chunk or xet_formats.Chunk(8, len(raw) - 8, 1, 1000), raw[8:], "x")


def test_a_shard_that_lies_stores_nothing(hub: Running, sender: Sender) -> None:
    data = b"hello"
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(data))[0] == 200
    assert sender.post(f"/v1/xorbs/default/{OTHER}", chunk(data, 1, raw=b"not LZ4"))[0] == 200
    right = hashlib.sha256(data).digest()
    for shard_bytes, words in (
        (shard(hashlib.sha256(b"other").digest(), [(XORB, 5, 0, 1)]), "its chunks make"),
        (shard(right, [(XORB, 6, 0, 1)]), "a term of 5 bytes"),
        (shard(right, [(XORB, 5, 0, 2)]), "of a xorb with 1"),
        (shard(right, [(XORB, 0, 0, 1)]), "a term of 5 bytes"),
        (shard(right, [(XORB, 5, 1, 1)]), "of a xorb with 1"),
        (shard(right, [(OTHER, 5, 0, 1)]), "a chunk is not LZ4, as it is declared to be ("),
        (shard(right, [(XORB, 5, 0, 1)], flags=0), "without its sha256"),
        (shard(right, [(XORB, 5, 0, 1)])[:-20], "ends before the mark of its end"),
        (shard(right, [(XORB, 5, 0, 1)])[:60], "ends before the mark of its end"),
        (b"x" * 100, "not a shard of version 2"),
    ):
        status, body = sender.post("/v1/shards", shard_bytes)
        assert (status, words in body) == (400, True), body
    assert not (hub.folder / ".adapterhub" / "blobs" / "sha256" / right.hex()).exists()
    assert sender.post("/v1/shards", shard(right, [(XORB, 5, 0, 1)]))[0] == 200


def test_a_term_that_lies_about_its_size_is_refused_before_its_chunks_are_unpacked(sender: Sender) -> None:
    damaged = chunk(b"", 1, size=xet_formats.MAX_CHUNK, raw=b"not LZ4") * 100
    assert sender.post(f"/v1/xorbs/default/{XORB}", damaged)[0] == 200
    status, body = sender.post("/v1/shards", shard(b"\0" * 32, [(XORB, 5, 0, 100)]))
    assert (status, f"a term of {100 * xet_formats.MAX_CHUNK} bytes that declares 5" in body) == (400, True), body


def test_a_xorb_of_another_repository_cannot_be_named(hub: Running, hf: Any, sender: Sender) -> None:
    hf.create_repo("other/secret", private=True)
    theirs = Sender(hub, "other/secret", hub.token)
    assert theirs.post(f"/v1/xorbs/default/{XORB}", chunk(b"secret"))[0] == 200
    status, body = sender.post("/v1/shards", shard(hashlib.sha256(b"secret").digest(), [(XORB, 6, 0, 1)]))
    assert (status, "not here any more" in body) == (400, True)


def test_a_tenant_ends_no_epoch_but_that_of_a_repository_of_its_own(hub: Running, hf: Any, sender: Sender) -> None:
    hf.create_repo("other/sql")
    theirs = Sender(hub, "other/sql", hub.token)
    missing = shard(hashlib.sha256(b"hello").digest(), [(XORB, 5, 0, 1)])
    assert sender.post("/v1/shards", missing)[0] == 400
    again = Sender(hub, "team/sql", hub.token)
    assert again.url != sender.url
    assert Sender(hub, "other/sql", hub.token).url == theirs.url
    assert sender.post("/v1/shards", missing)[0] == 400  # an epoch that has ended does not end the next one
    assert Sender(hub, "team/sql", hub.token).url == again.url


def test_a_token_is_good_for_its_repository_alone(hub: Running, hf: Any, sender: Sender) -> None:
    hf.create_repo("other/sql")
    theirs = Sender(hub, "other/sql", hub.token)
    sender.url = theirs.url
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(b"x"))[0] == 401
    sender.headers = {}
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(b"x"))[0] == 401


def test_what_is_unknown_below_the_store_is_not_found(sender: Sender) -> None:
    for path in (f"/v1/xorb-grants/default/{XORB}", "/v2/shards", "/v1/chunks/default/x", "/nothing"):
        assert sender.post(path, b"")[0] == 404
