"""Feed the parsers of what others write whatever there is: each input is read, or refused with one of our errors.

    python tests/fuzz/fuzz_parsers.py [-runs=100000] [CORPUS]    with atheris (from PyPI), guided by coverage
    python tests/fuzz/fuzz_parsers.py --plain 100000 [--seed 0]          without: mutations of good files, reproducible

The first byte chooses the parser, the rest is the file. Any other exception, more than 5 seconds or more than 512 MiB
is a finding; atheris writes the input beside it, the plain loop prints it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import random
import struct
import sys
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import lz4.frame
import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]


def watched() -> contextlib.AbstractContextManager[None]:
    """Where atheris is to be guided by it, what is imported in here says which of its lines were reached."""
    if __name__ != "__main__" or any(word.startswith("--plain") or word in ("-h", "--help") for word in sys.argv):
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["adapterhub_converters", "adapterhub"])


with watched():
    from adapterhub.checks import scan
    from adapterhub.checks.scan.scanned_file import ScannedFile
    from adapterhub.digest import sha256_bytes
    from adapterhub.http import urls
    from adapterhub.hub import blob_response as hub_blobs
    from adapterhub.hub.adapter_forms import multipart
    from adapterhub.hub.hf import commit_requests, lfs
    from adapterhub.hub.oci import any_manifest as oci_documents
    from adapterhub.hub.oci.oci_errors import OciError
    from adapterhub.hub.upstream import model_listing
    from adapterhub.hub.xet import xet_formats as xet
    from adapterhub.manifest import card, measurement, oci_manifest, release_statement, rollout_state
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.project import lockfile, settings_file
    from adapterhub.ref import Ref
    from adapterhub.registry import merge_recipe, repository_documents
    from adapterhub.remotes import version_bundle
    from adapterhub.remotes.hub import hub_client as hub
    from adapterhub.remotes.hub import hub_files
    from adapterhub.remotes.layouts import archive_tar, layout_archive, layout_index
    from adapterhub.remotes.layouts.layout_archive import Opener
    from adapterhub.remotes.oci import challenges
    from adapterhub.store.packs import container, cutting
    from adapterhub.store.ref_log import Entry
    from adapterhub.trust import attestation, bundle, keyless, keys, log_checkpoint, statement
    from adapterhub_converters.containers import gguf_file, gguf_output, gguf_types, json_file, safetensors_header, toml_file
    from adapterhub_converters.errors import AdapterhubError, NotFoundError
    from adapterhub_converters.formats import peft, source_config
    from adapterhub_converters.formats.mlx import reader as mlx_reader

SECONDS = 5.0
PAIR = {"q": (np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}


def _safetensors(data: bytes) -> None:
    header = safetensors_header.read_header(lambda offset, n: data[offset : offset + n], len(data), "x")
    # What the scanner takes, a parser of all JSON takes for the same.
    document = json_file.parse_object(data[8 : header.data_start], "x")
    if (document.pop("__metadata__", None) or {}) != header.metadata or document.keys() != header.tensors.keys():
        raise AssertionError("the scanner and json read different headers")
    for name, info in header.tensors.items():
        start = info.offset - header.data_start
        if document[name] != {"dtype": info.dtype, "shape": [*info.shape], "data_offsets": [start, start + info.size]}:
            raise AssertionError(f"the scanner and json read different tensors {name!r}")


def _gguf(data: bytes) -> None:
    gguf_file.read_header(lambda offset, n: data[offset : offset + n], len(data), "x")


def _peft_config(data: bytes) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": PAIR["q"][0], f"{name}.lora_B.weight": PAIR["q"][1]}
    peft.parse(data.decode(errors="replace"), tensors, {}, location="x")


def _mlx_config(data: bytes) -> None:
    mlx_reader._scale(json_file.parse_object(data.decode(errors="replace"), "x"), "x")


def _source_config(data: bytes) -> None:
    source_config.parse_lines({"adapterhub.source.tensors": data.decode(errors="replace")}, "x")


def _json(data: bytes) -> None:
    document = json_file.parse(data, "x")
    assert document == json.loads(data)
    assert json_file.parse(json.dumps(document, allow_nan=False, ensure_ascii=False).encode(), "x") == document


def _toml(data: bytes) -> None:
    text = data.decode(errors="replace")
    assert toml_file.parse(text, "x") == tomllib.loads(text)


def _card(data: bytes) -> None:
    card.parse(data.decode(errors="replace"))


def _ref(data: bytes) -> None:
    ref = Ref.parse(data.decode(errors="replace"))
    assert Ref.parse(str(ref)) == ref


def _adapter_json(data: bytes) -> None:
    AdapterManifest.salvage(json_file.parse_object(data, "x"))
    manifest = AdapterManifest.parse(data, "x")
    assert AdapterManifest.parse(manifest.dump(), "x") == manifest


def _manifest(data: bytes) -> None:
    assert oci_manifest.parse(data, "x").raw == data


def _index(data: bytes) -> None:
    layout_index.names(layout_index.parse(data, "x"))


def _log(data: bytes) -> None:
    entry = Entry.parse(data, "x")
    assert Entry.parse(entry.dump(), "x") == entry


def _recipe(data: bytes) -> None:
    recipe = merge_recipe.parse(data.decode(errors="replace"), "x")
    assert merge_recipe.parse(recipe.dump().decode(), "x") == recipe


def _lock(data: bytes) -> None:
    lockfile.parse(data.decode(errors="replace"), "x")


def _settings(data: bytes) -> None:
    settings_file.parse(data.decode(errors="replace"), Path("adapterhub.toml"))


def _hub_answer(data: bytes) -> None:
    document = json_file.parse_object(data, "x")
    for entry in document.get("siblings", []) if isinstance(document.get("siblings"), list) else []:
        hub._parse_entry(entry if isinstance(entry, dict) else {})
    hub._commits_by_name(document.get("tags"))
    hub_files.listed_files(document, "x")


def _headers(data: bytes) -> None:
    text = data.decode("latin-1")
    challenges.parse([text])
    urls.next_page(text, "https://registry.example/v2/", "x")


def _tar(data: bytes) -> None:
    archive_tar.scan_members(io.BytesIO(data), len(data), "x")


def _pack(data: bytes) -> None:
    with container.PackReader(io.BytesIO(data), "x") as reader:
        reader.read_at(0, 1 << 20)


# ---- what clients send to a hub


def _commit(data: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    async def lines() -> list[bytes]:
        return [line async for line in commit_requests._lines(body())]

    for line in asyncio.run(lines()):
        document = json_file.parse_object(line, "x")
        if document.get("key") == "lfsFile" and isinstance(document.get("value"), dict):
            commit_requests._lfs_file(str(document["value"].get("path")), document["value"])


def _lfs_batch(data: bytes) -> None:
    for item in lfs._checked_list(json_file.parse_object(data, "x").get("objects")):
        lfs._object(item)


def _xorb(data: bytes) -> None:
    for chunk in xet.chunks(lambda at, n: data[at : at + n], len(data), "x"):
        xet.decompress(chunk, data[chunk.start : chunk.start + chunk.stored], "x")


def _shard(data: bytes) -> None:
    for file in xet.files(data, "x"):
        assert file.size >= 0


def _oci_upload(data: bytes) -> None:
    with contextlib.suppress(OciError):
        oci_documents.parse(data, "application/vnd.oci.image.manifest.v1+json", "x")


def _range(data: bytes) -> None:
    with contextlib.suppress(hub_blobs.RangeError):
        byte_range = hub_blobs.parse_range(data.decode("latin-1"), 1000)
        assert byte_range is None or 0 <= byte_range[0] <= byte_range[1] < 1000


def _signature(data: bytes) -> None:
    bundle.claimed_payload(data, "x")


def _certificate(data: bytes) -> None:
    assert keyless.claimed_identity(data, "x").title


def _public_key(data: bytes) -> None:
    assert keys.parse_public(data.decode(errors="surrogateescape"), "x").hints


def _attestation(data: bytes) -> None:
    attestation.base_fingerprint(attestation.parse(data, "x"))


def _statement(data: bytes) -> None:
    statement.parse(data, "x").check_name("team/sql", "x")


def _scan(data: bytes) -> None:
    """A file under each name that is read in a way of its own."""
    for suffix in ("safetensors", "gguf", "png", "json", "jinja", "md", "pkl"):
        problems = scan.problems(ScannedFile(f"x.{suffix}", len(data), lambda offset, n: data[offset : offset + n]))
        if not all(problem.severity for problem in problems):
            raise AssertionError("a problem without a severity")


def _checkpoint(data: bytes) -> None:
    log_checkpoint.read(data, (), "x")


def _bundle(data: bytes) -> None:
    """Read every version of a bundle, and the blobs of each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bundle.tar")
        path.write_bytes(data)
        layout = layout_archive.LayoutArchive(path)
        for name in layout.tags():
            manifest = layout.manifest(version_bundle.resolve_name(layout, name))
            for blob in (manifest.config, *manifest.layers):
                with layout.open_blob(blob) as reader:
                    reader.readinto(bytearray(1 << 16))


def _message(data: bytes) -> None:
    """The message of an entry of a log: an approval, a rollout, a measurement, or words."""
    text = data.decode(errors="replace")
    release_statement.parse(text)
    rollout_state.parse(text)
    measurement.parse(text)
    for op in ("approve", "rollout", "evaluate", "push"):
        release_statement.log_summary(op, text)


def _repository(data: bytes) -> None:
    def read(digest: str) -> bytes:
        raise NotFoundError(digest, "no such page")

    repository = repository_documents.Repository.parse(data, "x", read)
    assert repository_documents.Repository.parse(repository.dump(None)[0], "x", read) == repository


def _commit_record(data: bytes) -> None:
    record = repository_documents.CommitRecord.parse(data, "x")
    assert repository_documents.CommitRecord.parse(record.dump(), "x") == record


def _upstream_model(data: bytes) -> None:
    model_listing.parse(data, "team/sql", "x")


def _form(data: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 100):
            yield data[at : at + 100]

    async def parts() -> None:
        reader = multipart.MultipartReader(body(), b"x")
        while await reader.next_part():
            async for piece in reader.data():
                assert piece

    asyncio.run(parts())


PARSERS: tuple[Callable[[bytes], None], ...] = (
    _safetensors, _gguf, _peft_config, _mlx_config, _source_config, _json, _toml, _card, _ref, _adapter_json, _manifest, _index,
    _log, _recipe, _lock, _settings, _hub_answer, _headers, _tar, _pack,
    _commit, _lfs_batch, _xorb, _shard, _oci_upload, _range, _signature, _statement, _attestation,
    _scan, _checkpoint, _certificate, _public_key,
    _bundle, _message, _repository, _commit_record, _upstream_model, _form,
)  # fmt: skip
NUMBERS = {parser.__name__.removeprefix("_"): n for n, parser in enumerate(PARSERS)}
CORPUS = Path(__file__).parent / "corpus"  # documents by what becomes of them; the suffix is the parser


def seeds() -> list[bytes]:
    """A good input for every parser."""
    st = safetensors_header.header_bytes([("a", "F32", (2, 2)), ("b", "F16", (3,))], {"format": "pt"}) + bytes(22)
    metadata = {
        "general.architecture": gguf_types.string_value("llama"), "general.type": gguf_types.string_value("adapter"),
        "adapter.lora.alpha": gguf_types.f32_value(2.0), "tokens": gguf_types.strings_value(["a", "b"]),
        "n": gguf_types.u32_value(3),
    }  # fmt: skip
    gguf = gguf_output.header_bytes(metadata, [("blk.0.attn_q.weight.lora_a", "F32", (2, 4))]) + bytes(64)
    config = (
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj"],'
        b' "rank_pattern": {"layers.[0-9]+.*": 2}, "use_rslora": true, "lora_dropout": 0.1, "bias": "none"}'
    )
    mlx_config = b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0, "keys": ["q"]}}'
    line = b'[["blk.0.attn_q", "model.layers.0.self_attn.q_proj", 2.0, "F16", 4, false]]'
    documents_by_kind = {
        "safetensors": st,
        "gguf": gguf,
        "peft_config": config,
        "mlx_config": mlx_config,
        "source_config": line,
    }
    documents_by_kind |= {
        "bundle": _made_bundle(),
        "repository": _made_repository(),
        "form": _FORM,
        "message": b'{"text": "read it"}',
    }
    record = repository_documents.CommitRecord({"a.md": (sha256_bytes(b"a"), 1)}, "0" * 40, "A title", author="ana")
    file = {"rfilename": "a.bin", "size": 1, "blobId": "0" * 40, "lfs": {"sha256": "0" * 64, "size": 1, "pointerSize": 100}}
    documents_by_kind |= {
        "commit_record": record.dump(),
        "upstream_model": json.dumps({"sha": "0" * 40, "siblings": [file]}).encode(),
    }
    documents_by_kind |= {
        "headers": CHALLENGE,
        "tar": _packed_tar(),
        "pack": _packed(),
        "xorb": _packed_xorb(),
        "shard": _made_shard(),
    }
    return [*(bytes([NUMBERS[name]]) + data for name, data in documents_by_kind.items()), *documents("good")]


CHALLENGE = b'Bearer realm="https://auth.example/token",service="registry",scope="repository:team/sql:pull", Basic realm="x"'


def _packed_tar() -> bytes:
    body = b"{}"
    return (
        archive_tar.header("blobs/sha256", folder=True)
        + archive_tar.header("oci-layout", len(body))
        + body
        + archive_tar.padding(len(body))
        + bytes(1024)
    )


def _packed() -> bytes:
    blob = np.arange(64, dtype=np.float32).tobytes()
    file = io.BytesIO()
    read_at = lambda offset, size: blob[offset : offset + size]  # noqa: E731
    container.write(file, read_at, len(blob), [cutting.Run(0, len(blob), 4)])
    return file.getvalue()


def _packed_xorb() -> bytes:
    data = bytes(range(64))
    chunks = [(0, data), (1, lz4.frame.compress(data)), (2, lz4.frame.compress(data))]
    return b"".join(struct.pack("<II", len(raw) << 8, len(data) << 8 | scheme) + raw for scheme, raw in chunks)


def _made_shard() -> bytes:
    term = struct.pack("<32sIIII", b"\1" * 32, 0, 64, 0, 1)
    file = struct.pack("<32sII8s", b"\2" * 32, 1 << 30, 1, b"") + term + struct.pack("<32s16s", hashlib.sha256().digest(), b"")
    return struct.pack("<32sQQ", b"\3" * 32, 2, 0) + file + struct.pack("<32s16s", b"\xff" * 32, b"")


_FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ndata\r\n--x\r\n\r\n\r\n--x--\r\n'


def _made_bundle() -> bytes:
    raw = (CORPUS / "good/adapter.adapter_json").read_bytes()
    contents = {"adapter_config.json": b"{}", "adapter.json": raw}
    files = {path: (sha256_bytes(data), len(data)) for path, data in contents.items()}
    manifest = oci_manifest.assemble(files, AdapterManifest.parse(raw, "x"))
    blobs = {sha256_bytes(data): data for data in (*contents.values(), manifest.config_bytes, manifest.raw)}
    entry = layout_index.describe_manifest(manifest.raw, manifest.digest, "x")
    descriptors = [oci_manifest.Descriptor("", digest, len(data)) for digest, data in blobs.items()]
    openers: dict[str, Opener] = {digest: partial(contextlib.nullcontext, io.BytesIO(data)) for digest, data in blobs.items()}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bundle.tar")
        layout_archive.write_archive(
            out, layout_index.with_entry([], entry, "team/sql:v1"), descriptors, openers, lambda _: None
        )
        return out.read_bytes()


def _made_repository() -> bytes:
    head = repository_documents.BranchHead("0" * 40, "")
    proposal = repository_documents.Proposal("1" * 40, "ana", "A title", "2026-01-01T00:00:00Z", "no license")
    repository = repository_documents.Repository(
        heads={"main": head}, commits={"0" * 40: sha256_bytes(b"a")}, proposals={"1": proposal}
    )
    return repository.dump(None)[0]


def documents(kind: str) -> list[bytes]:
    """The documents of the corpus that are `good`, or `bad`, sorted by name."""
    return [bytes([NUMBERS[path.suffix[1:]]]) + path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]


def one_input(data: bytes) -> bool:
    """Read `data` and say whether it could be; anything but a result or an error of ours goes up."""
    if not data:
        return False
    start = time.perf_counter()
    good = False
    with contextlib.suppress(AdapterhubError):
        PARSERS[data[0] % len(PARSERS)](data[1:])
        good = True
    if time.perf_counter() - start > SECONDS:
        raise TimeoutError(f"{time.perf_counter() - start:.1f} s for {len(data)} bytes")
    return good


_NUMBERS = [0, 1, 2**7, 2**8 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 400,
    b"\\ud800",
    b"(a+)+$",
    b"\xff\xfe",
    b"sha256:" + b"0" * 64,
    b"://",
    b"../",
    b"\n---\n",
    b"-" * 70_000,
    b" " * 70_000,
    b'"__metadata__":{"a":"\\u00e9\\ud83d\\ude00"},',
    b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},',
    b'"dtype":"I32",',
    b" ",
]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` with some bytes flipped, cut, doubled, or replaced by numbers and words that parsers trip over."""
    raw_bytes = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(1, len(raw_bytes) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(raw_bytes):
            raw_bytes[at] = rng.randrange(256)
        elif kind == 1:
            del raw_bytes[at : at + rng.randint(1, 16)]
        elif kind == 2:
            raw_bytes[at : at + 8] = rng.choice(_NUMBERS).to_bytes(8, "little")
        elif kind == 3:
            raw_bytes[at : at + rng.choice([0, 4])] = rng.choice(_TOKENS)
        elif kind == 4:
            raw_bytes[at:at] = raw_bytes[at : at + rng.randint(1, 64)] * rng.choice([1, 1, 2, 50])
        else:
            del raw_bytes[at:]
    return bytes(raw_bytes[:1_000_000])


def plain(runs: int, seed: int) -> None:
    """Without atheris: `runs` mutations of the seeds and of mutations that were read, the same for the same seed."""
    rng = random.Random(seed)
    pools = [[seed] for seed in [*seeds(), *documents("bad")]]
    for _ in range(runs):
        pool = rng.choice(pools)
        data = mutated(rng, rng.choice(pool))
        try:
            good = one_input(data)
        except Exception:
            print(f"finding: {data!r}", file=sys.stderr)
            raise
        if good:  # the seed stays; up to 31 of its descendants that are still read come and go
            place = len(pool) if len(pool) < 32 else rng.randrange(1, 32)
            pool[place : place + 1] = [data]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=int, metavar="RUNS", help="mutations of our own instead of atheris")
    parser.add_argument("--seed", type=int, default=0)
    options, unknown_words = parser.parse_known_args()
    if options.plain is not None:
        plain(options.plain, options.seed)
        return
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        for n, seed in enumerate([*seeds(), *documents("bad")]):
            (Path(folder) / str(n)).write_bytes(seed)
        corpus = [word for word in unknown_words if not word.startswith("-")]
        words = [word for word in unknown_words if word.startswith("-")]
        # What it finds goes to the first folder; the seeds are read from the last.
        atheris.Setup([sys.argv[0], "-rss_limit_mb=512", *words, *corpus, folder], lambda data: one_input(data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
