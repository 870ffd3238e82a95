"""Blobs in and out, as the distribution-spec and its conformance suite have it."""

from __future__ import annotations

import pytest

from adapterhub.hub import uploads
from tests.hub.conftest import Running
from tests.hub.oci.conftest import Registry, digest_of

DATA = b"0123456789" * 1000


def begin_upload(registry: Registry, query: str = "") -> str:
    """The place of a new session."""
    answer = registry.ask("POST", f"blobs/uploads/{query}", b"")
    assert answer.status == 202
    return str(answer.headers["location"])


@pytest.mark.parametrize("data", [DATA, b"", b"{}"], ids=["some", "none", "empty object"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_blob_comes_in_one_request_or_in_two_or_in_pieces(registry: Registry, data: bytes, algorithm: str) -> None:
    digest = digest_of(data, algorithm)
    single = registry.ask("POST", f"blobs/uploads/?digest={digest}", data)
    place = begin_upload(registry, f"?digest-algorithm={algorithm}")
    whole = registry.ask("PUT", f"{place}?digest={digest}", data, Content_Type="application/octet-stream")
    place, half = begin_upload(registry), len(data) // 2
    for piece in (data[:half], data[half:]):
        assert registry.ask("PATCH", place, piece).status == 202
    pieces = registry.ask("PUT", f"{place}?digest={digest}", b"")
    for answer in (single, whole, pieces):
        assert (answer.status, answer.headers["docker-content-digest"]) == (201, digest), answer.body
        download = registry.ask("GET", answer.headers["location"])
        assert (download.status, download.body, download.headers["docker-content-digest"]) == (200, data, digest)


def test_a_session_tells_how_far_it_has_come_and_refuses_what_does_not_follow(registry: Registry) -> None:
    place = begin_upload(registry)
    assert registry.ask("PATCH", place, DATA[:100], Content_Range="0-99").headers["range"] == "0-99"
    for wrong, words in (
        ("50-149", "the next byte is 100, not 50"),
        ("101-200", "the next byte is 100, not 101"),
        ("0-99", "the next byte is 100, not 0"),
        ("9-1", "'9-1' is not a range of bytes"),
        ("x", "'x' is not a range of bytes"),
    ):
        refused = registry.ask("PATCH", place, DATA[100:200], Content_Range=wrong)
        assert (refused.status, refused.headers["range"], refused.code) == (416, "0-99", "BLOB_UPLOAD_INVALID")
        assert refused.words == words
        assert refused.headers["location"] == place
    short = registry.ask("PATCH", place, DATA[100:150], Content_Range="100-199")
    assert (short.code, short.words) == ("SIZE_INVALID", "50 bytes are not the range 100-199")
    progress = registry.ask("GET", place)
    assert (progress.status, progress.headers["range"], progress.headers["location"]) == (204, "0-99", place)
    assert registry.ask("PATCH", place, DATA[100:200], Content_Range="100-199").headers["range"] == "0-199"
    completed = registry.ask("PUT", f"{place}?digest={digest_of(DATA)}", DATA[200:], Content_Range=f"200-{len(DATA) - 1}")
    assert completed.status == 201


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_wrong_digest_ends_the_upload(registry: Registry, algorithm: str) -> None:
    wrong = digest_of(b"something else", algorithm)
    assert registry.ask("POST", f"blobs/uploads/?digest={wrong}", DATA).code == "DIGEST_INVALID"
    whole, pieces = begin_upload(registry), begin_upload(registry)
    registry.ask("PATCH", pieces, DATA)
    for place, last_piece in ((whole, DATA), (pieces, b"")):
        refused = registry.ask("PUT", f"{place}?digest={wrong}", last_piece)
        assert (refused.status, refused.code) == (400, "DIGEST_INVALID")
        assert registry.ask("GET", place).code == "BLOB_UPLOAD_UNKNOWN"
    for digest in (wrong, digest_of(DATA)):
        assert registry.ask("HEAD", f"blobs/{digest}").status == 404


def test_a_session_is_ended_by_its_client(registry: Registry) -> None:
    place = begin_upload(registry)
    assert registry.ask("DELETE", place).status == 204
    for method in ("GET", "PATCH", "DELETE"):
        assert registry.ask(method, place, b"x" if method == "PATCH" else None).status == 404


@pytest.mark.parametrize(
    "digest", ["sha256:123", "sha256:" + "z" * 64, "md5:" + "0" * 32, "sha256:" + "0" * 128, "nothing", "sha256:..%2f..%2fetc"]
)
def test_what_is_no_digest_is_an_error_of_the_client(registry: Registry, digest: str) -> None:
    registry.put_image("there")
    answers = [
        registry.ask(method, f"{kind}/{digest}") for method in ("GET", "HEAD", "DELETE") for kind in ("blobs", "manifests")
    ]
    answers += [registry.ask("GET", f"referrers/{digest}"), registry.ask("POST", f"blobs/uploads/?digest={digest}", b"x")]
    answers += [registry.ask("PUT", f"{begin_upload(registry)}?digest={digest}", b"x")]
    answers += [registry.ask("POST", f"blobs/uploads/?mount={digest}", b"")]
    if ":" in digest:
        answers += [registry.ask("PUT", f"manifests/{digest}", b"{}")]
    assert {answer.status for answer in answers} <= {400, 404, 405}


def test_a_part_of_a_blob_is_sent(registry: Registry) -> None:
    digest = registry.put_blob(DATA)["digest"]
    for byte_range, first, last in (
        ("bytes=0-9", 0, 9),
        ("bytes=5000-", 5000, len(DATA) - 1),
        ("bytes=-7", len(DATA) - 7, len(DATA) - 1),
    ):
        part = registry.ask("GET", f"blobs/{digest}", Range=byte_range)
        assert (part.status, part.body) == (206, DATA[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{len(DATA)}"
    beyond = registry.ask("GET", f"blobs/{digest}", Range=f"bytes={len(DATA)}-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(DATA)}")
    head = registry.ask("HEAD", f"blobs/{digest}")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(len(DATA)), b"")


def test_a_blob_is_mounted_from_where_the_client_may_read_it(hub: Running, registry: Registry) -> None:
    layer = registry.put_blob(DATA)
    registry.put_image("x", layers=[layer])
    other_registry = Registry(hub.url, hub.token, "team/more")
    mounted = other_registry.ask("POST", f"blobs/uploads/?mount={layer['digest']}&from=team/other", b"")
    assert (mounted.status, mounted.headers["location"]) == (201, f"/v2/team/more/blobs/{layer['digest']}")
    assert other_registry.ask("GET", f"blobs/{layer['digest']}").body == DATA
    for query in (
        f"?mount={digest_of(b'x')}&from=team/other",
        f"?mount={layer['digest']}&from=team/none",
        f"?mount={digest_of(b'x')}",
    ):
        assert "/blobs/uploads/" in begin_upload(other_registry, query)


def test_nobody_reads_a_blob_of_others_by_its_digest(hub: Running, registry: Registry) -> None:
    layer = registry.put_blob(DATA)
    eve = Registry(hub.url, hub.make_token("eve", "write", namespaces=["eve"]), "eve/any")
    unknown = eve.ask("GET", f"blobs/{layer['digest']}")
    assert (unknown.code, unknown.words) == ("BLOB_UNKNOWN", f"eve/any: no blob {layer['digest']}")
    eve.put_blob(b"{}")
    for kind in ("application/vnd.oci.image.manifest.v1+json", "application/vnd.example+json"):
        named = {"schemaVersion": 2, "config": {**layer, "digest": digest_of(b"{}"), "size": 2}, "layers": [layer]}
        eve.put({**named, "mediaType": kind}, "x", kind)
        assert eve.ask("GET", f"blobs/{layer['digest']}").status == 404
    # What was uploaded and is in no manifest yet is for those who may write.
    for token in (None, hub.make_token("bob", "read")):
        assert Registry(hub.url, token).ask("GET", f"blobs/{layer['digest']}").status in (401, 404)
    assert registry.ask("GET", f"blobs/{layer['digest']}").status == 200


def test_a_blob_is_not_removed_by_itself(registry: Registry) -> None:
    digest = registry.put_blob(DATA)["digest"]
    refused = registry.ask("DELETE", f"blobs/{digest}")
    assert (refused.status, refused.code) == (405, "UNSUPPORTED")


def test_a_session_belongs_to_its_repository(hub: Running, registry: Registry) -> None:
    place = begin_upload(registry).replace("team/other", "team/more")
    assert Registry(hub.url, hub.token, "team/more").ask("PATCH", place, b"x").code == "BLOB_UPLOAD_UNKNOWN"


def test_a_session_that_waits_gives_its_file_back_and_goes_on(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_IDLE", -1)
    place = begin_upload(registry)
    for at in range(0, len(DATA), 5000):
        begin_upload(registry)  # closes all others
        assert registry.ask("PATCH", place, DATA[at : at + 5000]).status == 202
    assert registry.ask("PUT", f"{place}?digest={digest_of(DATA)}", b"").status == 201


def test_a_file_may_have_no_more_bytes_than_the_hub_takes(small: Running) -> None:
    registry = Registry(small.url, small.token)
    assert registry.ask("POST", f"blobs/uploads/?digest={digest_of(b'x' * 2000)}", b"x" * 2000).code == "SIZE_INVALID"
    place = begin_upload(registry)
    assert registry.ask("PATCH", place, b"x" * 900).status == 202
    assert registry.ask("PATCH", place, b"x" * 900).status == 413
