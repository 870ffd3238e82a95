"""Both implementations of the specification read and refuse the same documents, and derive the same digests of them."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.package_files import check_paths
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import need_program

ROOT = Path(__file__).parents[2]
DIGEST = f"sha256:{'a' * 64}"
# Each is put into each place: numbers, texts and nesting that some parser reads otherwise than another.
VALUES = [
    "0", "-0", "-0.0", "1", "8.0", "8e0", "1.5", "5e-324", "1e-400", "0e999999999", "9007199254740991", "9007199254740992",
    "9007199254740993", "9007199254740993.0", "123456789012345680000", "1e21", "1000000000000000000000", "1e22", "1e308",
    "1e309", "1" + "0" * 308, "9" * 5000, "01", "+1", ".5", "1.", "1e", "--1", "NaN", "Infinity", "true", "null", "tru",
    '""', '"a"', '"a\\n"', '"\\u0000"', '"\\ud800"', '"\\ude00\\ud83d"', '"\\ud83d\\ude00"', '"\t"', '"\\x41"', '"\\/"', "'a'",
    '"\u2028"', '"e\u0301"', f'"{DIGEST}"', f'"{DIGEST}\\n"', f'"{DIGEST.upper()}"', '"2026-01-31"', '"2026-01-31\\n"',
    '"2026-02-3\u0661"', f'"{"😀" * 64}"', f'"{"😀" * 65}"', f'"{"😀" * 200}"', f'"{"😀" * 201}"', "[]", "[1,]", '["a","a"]',
    '["\u00e9","e\u0301"]', "{}", '{"a":1,"a":2}', '{"a":1,"\\u0061":2}', '{"__proto__":1}', '{"__proto__":{"r":1,"alpha":1}}',
    '{"a":{"r":2.0,"alpha":-0.0}}', '{"a":1,}', *("[" * depth + "]" * depth for depth in (60, 61, 62, 63, 64, 100_000)),
]  # fmt: skip
PLACES = [
    ("parameters",), ("alpha",), ("method",), ("name",), ("base", "fingerprint"), ("base", "config"), ("modules",),
    ("targets",), ("released",), ("parents",), ("extensions",), ("extensions", "org.example.review"), ("unknown",),
    ("schema_version",),
]  # fmt: skip
PATHS = [
    ["\u00df", "SS"], ["\u1e9e", "\u00df"], ["\u03a3", "\u03c2"], ["\u0391\u03a3", "\u03b1\u03c3"], ["\u0131", "i"],
    ["\u0130", "i\u0307"], ["\u017f", "S"], ["\ufb01", "FI"], ["\u212a", "k"], ["\u00e9", "E\u0301"],
    ["\u1f80", "\u1f00\u03b9"],
    ["\u13a0", "\uab70"], ["a/b", "A"], ["a/b", "A/c"], ["a/b", "a/c"], ["adapter.json/x"], ["ADAPTER.JSON"], ["a\u2028"],
    ["a\u0085"], ["a\u200b"], ["a\u034f"], ["a\u3164"], ["a\ufe0f"], ["a\U000e0101"], ["a\ue000"], ["a\u0378"], ["a\ufffe"],
    ["con"], ["CON.x"], ["con\u0301"], ["com\u00b9"], ["x" * 255], ["😀" * 255], ["😀" * 256], ["/".join("a" * 32)],
    ["/".join("a" * 33)], ["a\u00a0"], ["\u00a0a"], ["a."], [".a"], ["a//b"], ["../a"], ["a%"],
]  # fmt: skip
READ = """
import { pathToFileURL } from "node:url";
import { readFileSync } from "node:fs";
const [schemaPath, script] = process.argv.slice(1);
const { readDocument, derive, digestOf, parseJson, Refused } = await import(pathToFileURL(script));
const schema = parseJson(new Uint8Array(readFileSync(schemaPath)));
for (const line of readFileSync(0, "utf8").trim().split("\\n")) {
  const raw = new Uint8Array(Buffer.from(line, "base64"));
  let answer = "refused";
  try {
    const document = readDocument(raw, schema);
    const files = new Map(document.get("files").map((file) => [file.get("path"), { digest: file.get("digest"), size: 1 }]));
    files.set("adapter.json", { digest: await digestOf(raw), size: raw.length });
    answer = (await derive(files, document)).digest;
  } catch (error) { if (!(error instanceof Refused)) answer = String(error); }
  console.log(answer);
}
"""


def hostile_documents() -> list[str]:
    """Return the document of a vector with each value in each place, also of a later version, and with each list of paths."""
    text = (ROOT / "schemas" / "vectors" / "versions" / "released" / "folder" / ADAPTER_JSON).read_text()
    document: dict[str, Any] = json.loads(text)
    later = {**document, "schema_version": "1.7", "$schema": "urn:adapterhub:schema:adapter:1.7"}
    places = [*((document, place) for place in PLACES), (later, ("unknown",)), (later, ("alpha",))]
    documents = [replaced(form, place, value) for form, place in places for value in VALUES]
    files = [[{"path": path, "digest": DIGEST, "size": 1} for path in paths] for paths in PATHS]
    return [*documents, *(json.dumps({**document, "files": entries}) for entries in files), f"\ufeff{text}", f"{text}\0", "[]"]


def replaced(document: dict[str, Any], place: tuple[str, ...], value: str) -> str:
    """Return the text of a document with a text of JSON, or of none, in a place."""
    mark = "the value in this place"
    *keys, last = place
    inner: dict[str, Any] = {last: mark}
    for key in keys:
        inner = {key: {**document.get(key, {}), **inner}}
    return json.dumps({**document, **inner}).replace(f'"{mark}"', value)


def digest_here(raw: bytes) -> str:
    try:
        manifest = AdapterManifest.parse(raw, ADAPTER_JSON)
        check_paths([ADAPTER_JSON, *(file.path for file in manifest.files)], ADAPTER_JSON)
    except AdapterhubError:
        return "refused"
    files: dict[str, tuple[Digest, int]] = {file.path: (file.digest, 1) for file in manifest.files}
    return oci_manifest.assemble({**files, ADAPTER_JSON: (sha256_bytes(raw), len(raw))}, manifest).digest


@pytest.mark.peer
def test_both_refuse_the_same_documents_and_derive_the_same_digests() -> None:
    need_program("node")
    documents = hostile_documents()
    raws = [document.encode() for document in documents]
    schema = ROOT / "schemas" / "adapterhub_schemas" / "adapter.schema.json"
    script = ROOT / "examples" / "adapter_version.mjs"
    words = ["node", "--input-type=module", "--eval", READ, "--", str(schema), str(script)]
    lines = "\n".join(base64.b64encode(raw).decode() for raw in raws)
    result = subprocess.run(words, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    answers = result.stdout.strip().split("\n")
    # Drafts are for readers that want to.
    cases = [
        case for case in zip(documents, map(digest_here, raws), answers, strict=True) if '"schema_version": 1,' not in case[0]
    ]
    assert [case for case in cases if case[1] != case[2]] == []
    assert 100 < sum(case[1] != "refused" for case in cases) < len(cases) - 100
