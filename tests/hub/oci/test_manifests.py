"""Manifests of any kind: kept as they were sent, tagged, listed by what they are about, and removed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.maintenance import fsck, gc
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from tests.hub.conftest import Running
from tests.hub.oci.conftest import EMPTY, Registry, digest_of, image

INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
ABSENT = {"mediaType": "application/octet-stream", "digest": digest_of(b"absent"), "size": 6}
DOCUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no layers": (MANIFEST_TYPE, image()),
    "unknown fields": (MANIFEST_TYPE, image(new={"of": ["a later", 1.1]})),
    "its type in the request only": (MANIFEST_TYPE, {key: value for key, value in image().items() if key != "mediaType"}),
    "a subject that is absent": (MANIFEST_TYPE, image(subject=ABSENT, artifactType="application/vnd.example")),
    "data": (MANIFEST_TYPE, image(layers=[{**EMPTY, "data": "e30="}])),
    "a layer that is elsewhere": (MANIFEST_TYPE, image(layers=[{**ABSENT, "mediaType": FOREIGN, "urls": ["https://x.example"]}])),
    "an empty index": (INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}),
    "an unknown type": ("application/vnd.example.manifest.v9+json", {"config": 7, "layers": [ABSENT, "x"], "blobs": {}}),
    "docker's": (DOCKER, image(mediaType=DOCKER)),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("document_kind", DOCUMENTS)
def test_a_manifest_is_what_was_sent_by_its_digest_and_by_its_tag(
    registry: Registry, document_kind: str, algorithm: str
) -> None:
    kind, document = DOCUMENTS[document_kind]
    raw = json.dumps(document, indent=3).encode()
    registry.put_blob(b"{}")
    digest = digest_of(raw, algorithm)
    by_digest, by_tag = registry.put(raw, digest, kind), registry.put(raw, "tag", kind)
    assert (by_digest.status, by_digest.headers["docker-content-digest"]) == (201, digest), by_digest.body
    assert by_digest.headers["location"] == f"/v2/team/other/manifests/{digest}"
    assert (by_tag.status, by_tag.headers["docker-content-digest"]) == (201, digest_of(raw))
    for reference, reported_digest in ((digest, digest), (digest_of(raw), digest_of(raw)), ("tag", digest_of(raw))):
        for method, body in (("GET", raw), ("HEAD", b"")):
            answer = registry.ask(method, f"manifests/{reference}")
            assert (answer.status, answer.body, answer.headers["content-type"]) == (200, body, kind)
            assert (answer.headers["docker-content-digest"], answer.headers["content-length"]) == (
                reported_digest,
                str(len(raw)),
            )
    assert by_tag.headers["oci-subject"] == (document.get("subject") or {}).get("digest")


def test_an_index_may_name_manifests_and_indexes_of_the_repository(registry: Registry) -> None:
    layer = registry.put_blob(b"layer")
    inner = {
        "mediaType": MANIFEST_TYPE,
        "digest": registry.put_image(layers=[layer]),
        "size": len(json.dumps(image(layers=[layer]))),
    }
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [inner]}).encode()
    assert registry.put(index, kind=INDEX).status == 201
    entry = {"mediaType": INDEX, "digest": digest_of(index), "size": len(index)}
    outer = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry, inner]}).encode()
    assert registry.put(outer, "multi", INDEX).status == 201
    assert (
        registry.put({"schemaVersion": 2, "mediaType": INDEX, "manifests": [ABSENT]}, "x", INDEX).code
        == "MANIFEST_BLOB_UNKNOWN"
    )


@pytest.mark.parametrize(
    ("document", "kind", "code", "words"),
    [
        (b"not JSON", MANIFEST_TYPE, "MANIFEST_INVALID", "JSON"),
        (b"[]", MANIFEST_TYPE, "MANIFEST_INVALID", "not a JSON object"),
        (b'{"a":1,"a":2}', MANIFEST_TYPE, "MANIFEST_INVALID", "duplicate key 'a'"),
        (b"[" * 100_000, MANIFEST_TYPE, "MANIFEST_INVALID", "nested more than 64 deep"),
        (image(schemaVersion=1), MANIFEST_TYPE, "MANIFEST_INVALID", "schemaVersion is not 2"),
        (image(config=None), MANIFEST_TYPE, "MANIFEST_INVALID", "needs a config and layers"),
        (image(layers={}), MANIFEST_TYPE, "MANIFEST_INVALID", "needs a config and layers"),
        (image(layers=[{**ABSENT, "size": -1}]), MANIFEST_TYPE, "MANIFEST_INVALID", ""),
        (image(layers=[{**ABSENT, "digest": "../../etc/passwd"}]), MANIFEST_TYPE, "DIGEST_INVALID", "digest"),
        (image(layers=[ABSENT]), MANIFEST_TYPE, "MANIFEST_BLOB_UNKNOWN", ""),
        (image(layers=[{**EMPTY, "size": 3}]), MANIFEST_TYPE, "SIZE_INVALID", ""),
        (image(subject={}), MANIFEST_TYPE, "MANIFEST_INVALID", ""),
        (image(annotations={"a": 1}), MANIFEST_TYPE, "MANIFEST_INVALID", "annotations"),
        (image(manifests=[]), MANIFEST_TYPE, "MANIFEST_INVALID", "both an image manifest, with layers, and an image index"),
        (image(), INDEX, "MANIFEST_INVALID", "and it was sent as"),
        ({"schemaVersion": 2}, "application/json", "MANIFEST_INVALID", "is not the media type of a manifest"),
        ({"schemaVersion": 2}, "a/b\u00e4", "MANIFEST_INVALID", "is not the media type of a manifest"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(registry: Registry, document: Any, kind: str, code: str, words: str) -> None:
    registry.put_blob(b"{}")
    refused = registry.put(document, "x", kind)
    assert (refused.status, refused.code) == (400, code), refused.body
    assert words in refused.words
    assert registry.ask("GET", "manifests/x").status == 404


def test_a_manifest_has_at_most_4_mib_and_the_digest_of_its_address(registry: Registry) -> None:
    registry.put_blob(b"{}")
    assert registry.put(image(new="x" * (3 << 20))).status == 201
    large = registry.put(image(new="x" * (5 << 20)))
    assert (large.status, large.words) == (413, "A body has at most 4,194,304 bytes here")
    for wrong in (digest_of(b"x"), digest_of(b"x", "sha512")):
        assert registry.put(image(), wrong).code == "DIGEST_INVALID"
    for tag in ("-x", "x" * 129, "%C3%A4", "a%2Fb"):
        assert registry.put(image(), tag).status == 400
    too_many = registry.put(image(), digest_of(json.dumps(image()).encode()) + "?" + "&".join(f"tag=t{n}" for n in range(101)))
    assert (too_many.status, too_many.code, too_many.words) == (400, "MANIFEST_INVALID", "more than 100 tags")
    listed = registry.put({**image(), "layers": [EMPTY] * 20_001})
    assert (listed.code, listed.words) == ("MANIFEST_INVALID", "team/other: 20002 descriptors are over the limit of 20000")


def test_tags_are_listed_in_order_and_in_pages(registry: Registry) -> None:
    for tag in ("b", "a", "C", "a.1"):
        registry.put_image(tag)
    assert registry.ask("GET", "tags/list").json == {"name": "team/other", "tags": ["C", "a", "a.1", "b"]}
    page = registry.ask("GET", "tags/list?n=2")
    assert (page.json["tags"], page.headers["link"]) == (["C", "a"], '</v2/team/other/tags/list?n=2&last=a>; rel="next"')
    last = registry.ask("GET", "/v2/team/other/tags/list?n=2&last=a")
    assert (last.json["tags"], last.headers["link"]) == (["a.1", "b"], None)
    assert registry.ask("GET", "tags/list?n=0").json["tags"] == []
    assert registry.ask("GET", "tags/list?last=zz").json["tags"] == []


def test_a_manifest_put_by_its_digest_gets_tags_too(registry: Registry) -> None:
    registry.put_blob(b"{}")
    raw = json.dumps(image()).encode()
    answer = registry.put(raw, f"{digest_of(raw)}?tag=one&tag=two")
    assert (answer.status, answer.headers.get_all("oci-tag")) == (201, ["one", "two"])
    assert registry.ask("GET", "tags/list").json["tags"] == ["one", "two"]
    assert registry.put(raw, f"{digest_of(raw)}?tag=-").status == 400
    long = digest_of(raw, "sha512")
    assert registry.put(raw, f"{long}?tag=two").headers["oci-tag"] == "two"
    digests = {tag: registry.ask("HEAD", f"manifests/{tag}").headers["docker-content-digest"] for tag in ("one", "two")}
    assert digests == {"one": digest_of(raw), "two": long}
    assert registry.ask("DELETE", f"manifests/{digest_of(raw)}").status == 202
    assert registry.ask("GET", "tags/list").json["tags"] == []


def test_referrers_are_listed_at_once_with_their_types_and_annotations(registry: Registry) -> None:
    subject = registry.put_image("subject")
    about = {"mediaType": MANIFEST_TYPE, "digest": subject, "size": len(json.dumps(image()))}
    empty = registry.ask("GET", f"referrers/{subject}")
    assert (empty.status, empty.headers["content-type"], empty.json["manifests"]) == (200, INDEX, [])
    typed = registry.put_image(subject=about, artifactType="application/vnd.a", annotations={"key": "value"})
    by_config = registry.put_image(subject=about)
    later = {**about, "digest": digest_of(b"later")}
    early = registry.put_image(subject=later, artifactType="application/vnd.a")
    new = Registry(registry.host, registry.token, "team/new").ask("GET", f"referrers/{subject}")
    assert (new.status, new.json["manifests"]) == (200, [])
    referrers = registry.ask("GET", f"referrers/{subject}")
    assert referrers.json["schemaVersion"] == 2
    assert {
        manifest["digest"]: (manifest["artifactType"], manifest.get("annotations")) for manifest in referrers.json["manifests"]
    } == {
        typed: ("application/vnd.a", {"key": "value"}),
        by_config: ("application/vnd.oci.empty.v1+json", None),
    }
    for kind, digests in (("application/vnd.a", [typed]), ("application/vnd.oci.empty.v1%2Bjson", [by_config]), ("a/b", [])):
        filtered = registry.ask("GET", f"referrers/{subject}?artifactType={kind}")
        assert filtered.headers["oci-filters-applied"] == "artifactType"
        assert [manifest["digest"] for manifest in filtered.json["manifests"]] == digests
    assert [manifest["digest"] for manifest in registry.ask("GET", f"referrers/{later['digest']}").json["manifests"]] == [early]
    assert registry.ask("DELETE", f"manifests/{typed}").status == 202
    assert len(registry.ask("GET", f"referrers/{subject}").json["manifests"]) == 1


def test_referrers_are_found_by_sha512_as_well(registry: Registry) -> None:
    registry.put_blob(b"{}")
    raw = json.dumps(image()).encode()
    long, short = digest_of(raw, "sha512"), digest_of(raw)
    assert registry.put(raw, long).status == 201
    attached_raw = json.dumps(image(subject={"mediaType": MANIFEST_TYPE, "digest": long, "size": len(raw)})).encode()
    assert registry.put(attached_raw, digest_of(attached_raw, "sha512")).headers["oci-subject"] == long
    assert [entry["digest"] for entry in registry.ask("GET", f"referrers/{long}").json["manifests"]] == [
        digest_of(attached_raw, "sha512")
    ]
    assert [entry["digest"] for entry in registry.ask("GET", f"referrers/{short}").json["manifests"]] == [
        digest_of(attached_raw)
    ]


def test_tags_and_manifests_are_removed_and_gone_at_once(registry: Registry) -> None:
    digest = registry.put_image("one")
    registry.put_image("two")
    assert registry.ask("DELETE", "manifests/one").status == 202
    assert registry.ask("GET", "manifests/one").code == "MANIFEST_UNKNOWN"
    assert registry.ask("GET", f"manifests/{digest}").status == 200
    assert registry.ask("DELETE", f"manifests/{digest}").status == 202
    for reference in ("two", digest):
        for method in ("GET", "DELETE"):
            answer = registry.ask(method, f"manifests/{reference}")
            unknown = (404, "MANIFEST_UNKNOWN", f"team/other: no manifest {reference}")
            assert (answer.status, answer.code, answer.words) == unknown
    assert registry.ask("GET", "tags/list").json["tags"] == []
    nameless = registry.ask("DELETE", "/v2/team/none/manifests/x")
    assert (nameless.status, nameless.code, nameless.words) == (404, "NAME_UNKNOWN", "team/none: no such repository")


def test_a_tag_moves_between_adapters_and_other_manifests(hub: Running, adapter: Callable[..., Path]) -> None:
    from adapterhub.ref import Ref

    registry = Registry(hub.url, hub.token, "team/sql")
    with hub.registry() as opened:
        version = opened.push(adapter(1), Ref("team/sql", tag="prod"))
    image_digest = registry.put_image("prod")
    assert registry.ask("HEAD", "manifests/prod").headers["docker-content-digest"] == image_digest
    with hub.registry() as opened:
        assert opened.resolve(Ref("team/sql")).tags == ("latest",)
    raw = registry.ask("GET", f"manifests/{version.digest}").body
    assert registry.put(raw, "prod").headers["adapterhub-version"] == "v1"
    assert registry.ask("HEAD", "manifests/prod").headers["docker-content-digest"] == version.digest
    registry.put_blob(b"{}")
    for tag in ("latest", "v1", "v2"):
        assert "has no adapter_config.json" in registry.put(image(), tag).words
    with hub.registry() as opened:
        opened.protect(Ref("team/sql", tag="prod"))
    assert (registry.put(image(), "prod").code, registry.ask("DELETE", "manifests/prod").code) == ("DENIED", "DENIED")


def test_repositories_are_listed_for_those_who_may_see_them(hub: Running, hf: Any) -> None:
    hf.create_repo("alice/secret", private=True)
    for name in ("team/b", "team/a"):
        Registry(hub.url, hub.token, name).put_image("x")
    for token, names in ((hub.token, ["alice/secret", "team/a", "team/b"]), ("anonymous", ["team/a", "team/b"])):
        registry = Registry(hub.url, token)
        assert registry.ask("GET", "/v2/_catalog").json == {"repositories": names}
        page = registry.ask("GET", "/v2/_catalog?n=1")
        assert (page.json["repositories"], page.headers["link"]) == (
            names[:1],
            f'</v2/_catalog?n=1&last={names[0]}>; rel="next"',
        )
        assert registry.ask("GET", f"/v2/_catalog?n=9&last={names[0]}").json["repositories"] == names[1:]
    assert Registry(hub.url, None).ask("GET", "/v2/_catalog").status == 401


def test_other_names_and_endpoints_are_unknown(registry: Registry) -> None:
    for path in ("/v2/team/none/tags/list", "/v2/one/tags/list", "/v2/a/b/c/manifests/x", "/v2/UP/x/blobs/sha256:" + "0" * 64):
        assert registry.ask("GET", path).code == "NAME_UNKNOWN"
    for name in ("one", "a/b/c", "UP/x", "a/..%2Fb"):
        assert registry.ask("POST", f"/v2/{name}/blobs/uploads/", b"").status == 400
    for method, path in (("PATCH", "/v2/team/other/manifests/x"), ("GET", "/v2/x")):
        assert registry.ask(method, path).code == "UNSUPPORTED"


def test_what_other_manifests_name_survives_a_gc_and_an_fsck(hub: Running, registry: Registry) -> None:
    layer = registry.put_blob(b"layer")
    registry.put_image("x", layers=[layer])
    with hub.registry() as opened:
        gc.gc(opened, grace=0)
        assert fsck.fsck(opened) == []
    assert registry.ask("GET", f"blobs/{layer['digest']}").body == b"layer"
