"""The files of a commit as an adapter, and the model card that a hub shows.

An adapter is what its adapter.json lists, or, without one, the files with the names of an adapter. Nothing is believed because
a hub sends it: names are checked before one becomes a path, and an adapter.json is a list of digests that the files must have.

A hub reads base, library, tags and license from the front matter of README.md (Hugging Face's docs, "Model Cards"). The fields
that a README lacks are added as one block between two comments at the top of its front matter, or as a new front matter;
nothing else in it changes, except that a base model that is a local path, as PEFT writes it, becomes a comment. Without the
block it is the README of the adapter again, byte for byte, which its digest proves. For an adapter without a README a card is
written; it is not part of the version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from adapterhub.digest import Digest, parse_digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.manifest.package_files import MAX_FILES, check_names
from adapterhub_converters import linear
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, PEFT_WEIGHTS, pickled_weights
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.yaml_lines import key_of

from .client import Entry, Listing

_HINT = "Ask its owner to push it again"

CARD = "README.md"
MAX_CARD = 4 << 20  # bytes; a longer README is left as it is
_CHECKPOINT = linear.Pattern(r"checkpoint-\d+/")
_EMPTY = b"{}"
_BEGIN, _WHOLE, _END = (
    b"# adapterhub: added",
    b"# adapterhub: added with the front matter",
    b"# adapterhub: end of what was added",
)
_WRITTEN = b"---\n# adapterhub: written of adapter.json\n"
_WAS = b"# adapterhub: was "
_BASE = b"\nbase_model:"
_MODEL = linear.Pattern(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NO_LICENSE = linear.Pattern(r"[^a-z0-9.+]+")
_PLAIN = linear.Pattern(r"[A-Za-z][\w.-]*/[A-Za-z][\w.-]*|[a-z]+-[a-z0-9.-]+")
# The values of `license` that a hub accepts (Hugging Face's docs, "Licenses"); it refuses a card with another.
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail",
    "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def same(entry: Entry | None, data: bytes) -> bool:
    """Compare a file in a listing with bytes, by their digest or by git's name of the blob."""
    if entry is None:
        return False
    if entry.digest is not None:
        return entry.digest == sha256_bytes(data)
    return entry.oid == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def assembled(raw: bytes, where: str) -> Manifest:
    """Build the OCI manifest of the files that an adapter.json lists, and of itself."""
    files = {**listed(oci_manifest.parse_json(raw, where), where), ADAPTER_JSON: (sha256_bytes(raw), len(raw))}
    made = oci_manifest.assemble(files, AdapterManifest.parse(raw, where))
    checked = oci_manifest.parse(made.raw, where)
    return dataclasses.replace(checked, config_bytes=made.config_bytes)


def listed(document: Mapping[str, Any], where: str) -> dict[str, tuple[Digest, int]]:
    """The files in an adapter.json: path to digest and size in bytes."""
    listed = document.get("files")
    found: dict[str, tuple[Digest, int]] = {}
    for entry in listed if isinstance(listed, list) else []:
        path, size = (entry.get("path"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or type(size) is not int or size < 0 or path == ADAPTER_JSON or path in found:
            raise FormatError(where, "its list of files has an invalid entry, or two of one path", _HINT)
        found[path] = (parse_digest(entry.get("digest"), where), size)
    if not found or len(found) > MAX_FILES:
        raise FormatError(where, f"lists no files, or more than {MAX_FILES}", _HINT)
    return found


def bare(files: Mapping[str, tuple[Digest, int]], where: str) -> Manifest:
    """Build an OCI manifest of files that have no adapter.json."""
    layers = [
        {
            "mediaType": oci_manifest.media_type(path),
            "digest": digest,
            "size": size,
            "annotations": {oci_manifest.TITLE: path, oci_manifest.FILEPATH: path},
        }
        for path, (digest, size) in files.items()
    ]
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256_bytes(_EMPTY), "size": len(_EMPTY)}
    document = {"schemaVersion": 2, "mediaType": oci_manifest.MANIFEST_TYPE, "config": config, "layers": layers}
    raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return dataclasses.replace(oci_manifest.parse(raw, where), config_bytes=_EMPTY)


def importable(listing: Listing, where: str) -> tuple[list[str], list[str]]:
    """Sort the files of a repository without an adapter.json into those that an adapter may have, and others."""
    there = listing.files
    if ADAPTER_CONFIG not in there and not any(path.endswith(".gguf") for path in there):
        hint = "A model without adapter_config.json is a base model"
        raise NotFoundError(
            where,
            f"no adapter in this repository: neither {ADAPTER_JSON}, {ADAPTER_CONFIG} nor a GGUF file",
            hint,
            code="no-adapter",
        )
    if (pickles := pickled_weights(there)) and PEFT_WEIGHTS not in there:
        hint = "Ask its owner for safetensors, or convert it with peft in a sandbox"
        raise RefusedError(f"{where}: {pickles[0]}", "a pickle can run code when it is loaded", hint)
    names: list[str] = []
    left: list[str] = []
    for path in sorted(there):
        parts = path.split("/")
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        try:
            check_names([path], where)
        except RefusedError:
            left.append(path)
            continue
        (left if hidden or _CHECKPOINT.match(path) else names).append(path)
    return names, left


# ---- the model card


def complete_card(readme: bytes, manifest: AdapterManifest) -> bytes:
    """Add the fields that a hub needs to a README; return it as it is if it has them all or cannot be parsed."""
    keys, card = _keys(readme), readme
    if keys is None or len(readme) > MAX_CARD:
        return readme
    if manifest.base.repo and "base_model" in keys and (path := _path(readme)):
        keys.discard("base_model")
        card = readme[:path] + _WAS + readme[path:]
    lines = [line for key, text in _fields(manifest) if key not in keys for line in text]
    if not lines:
        return readme
    fence = _fence(card)
    if fence:
        end = b"\r\n" if card[:fence].endswith(b"\r\n") else b"\n"
        block = end.join([_BEGIN, *(line.encode() for line in lines), _END, b""])
        result = card[:fence] + block + card[fence:]
    else:
        result = b"\n".join([b"---", _WHOLE, *(line.encode() for line in lines), _END, b"---", card])
    return result if original_readme(result) == readme else readme


def original_readme(card: bytes) -> bytes:
    """Remove what `complete_card` added."""
    front = b"---\n" + _WHOLE + b"\n"
    if card.startswith(front):
        _, closed, rest = card[len(front) - 1 :].partition(b"\n" + _END + b"\n---\n")
        return rest if closed else card
    fence = _fence(card)
    after = fence and _after(card, _BEGIN, fence)
    last = after and card.find(b"\n" + _END, after - 1)
    while after and last >= 0:
        if end := _after(card, _END, last + 1):
            return card[:fence] + card[end:].replace(b"\n" + _WAS + b"base_model", b"\nbase_model", 1)
        last = card.find(b"\n" + _END, last + 1)
    return card


def _after(card: bytes, line: bytes, at: int) -> int:
    """Where the next line begins if `line` is a whole line at this place, else 0."""
    end = at + len(line)
    if not card.startswith(line, at):
        return 0
    return next((end + len(new) for new in (b"\n", b"\r\n") if card.startswith(new, end)), 0)


def _fence(card: bytes) -> int:
    """Where the front matter begins, 0 without one."""
    end = card.find(b"\n") + 1
    line = card[: end - 1].removesuffix(b"\r")
    return end if end and line.startswith(b"---") and not line[3:].strip(b" \t") else 0


def _last(card: bytes, fence: int) -> int:
    """The place of the line of dashes below the front matter that begins at `fence`, 0 without one."""
    at = card.find(b"\n---", fence - 1)
    while at >= 0:
        end = card.find(b"\n", at + 1)
        if not card[at + 4 : end if end >= 0 else len(card)].removesuffix(b"\r").strip(b" \t"):
            return at + 1
        at = card.find(b"\n---", at + 1)
    return 0


def _path(readme: bytes) -> int:
    """The place of a base model that is a local path, for which a hub would refuse the card; 0 without one."""
    fence = _fence(readme)
    at = readme.find(_BASE, fence - 1, _last(readme, fence)) if fence else -1
    if at < 0:
        return 0
    value = readme[at + len(_BASE) : readme.find(b"\n", at + 1)].decode()
    plain = value.strip().strip("\"'") if value[:1] in (" ", "\t") else ""
    return at + 1 if plain and not plain.startswith(("[", "#", "|", ">", "&")) and not _MODEL.fullmatch(plain) else 0


def write_card(title: str, manifest: AdapterManifest) -> bytes:
    """Write a card for an adapter that has no README."""
    base, name = manifest.base.repo, _line(manifest.name or title)
    kind = {"lora": "LoRA adapter", "dora": "DoRA adapter"}.get(manifest.method, "adapter")
    rank = f" of rank {manifest.r}" if manifest.r else ""
    about = f" for {_line(base)}" if base else ""
    described = [manifest.description, ""] if manifest.description else []
    fields = [line for _, text in _fields(manifest) for line in text]
    body = [f"# {name}", "", *described, f"A {kind}{rank}{about}. Its manifest is `adapter.json`.", ""]
    return _WRITTEN + "\n".join([*fields, "---", "", *body]).encode()


def is_written_card(card: bytes) -> bool:
    """Tell whether a card is from `write_card`."""
    return card.startswith(_WRITTEN)


def _fields(manifest: AdapterManifest) -> Iterator[tuple[str, list[str]]]:
    """The fields that a hub needs: each key with its lines of YAML."""
    base, spdx = manifest.base.repo, manifest.license
    if base:
        yield "base_model", [f"base_model: {_yaml(base)}"]
        yield "base_model_relation", ["base_model_relation: adapter"]
    yield "library_name", [f"library_name: {_yaml(manifest.format)}"]
    if manifest.task in _TASKS:
        yield "pipeline_tag", [f"pipeline_tag: {_TASKS[manifest.task]}"]
    tags = {"lora": ["lora"], "dora": ["lora", "dora"]}.get(manifest.method, [])
    if tags:
        yield "tags", ["tags:", *(f"- {tag}" for tag in tags)]
    if spdx:
        name = _NO_LICENSE.sub("-", spdx.lower()).strip("-")
        known = name.removesuffix("-only").removesuffix("-or-later")
        other = ["license: other", *([f"license_name: {_yaml(name)}"] if name else [])]
        yield "license", [f"license: {_yaml(known)}"] if known in _LICENSES else other


def _keys(readme: bytes) -> set[str] | None:
    """The keys of the front matter, none without one; None if it is not a plain mapping or the file is not UTF-8."""
    try:
        text = readme.decode()
    except UnicodeDecodeError:
        return None
    fence = _fence(readme)
    if not fence:
        # After a byte order mark or a blank line hubs still see a front matter: leave such a file alone.
        return None if text.lstrip("\ufeff \t\r\n").startswith("---") else set()
    last = _last(readme, fence)
    if not last:
        return None
    keys = set()
    for line in readme[fence:last].decode().splitlines():
        if not line.strip() or line[0] in " \t#" or line.startswith("- ") or line == "-":
            continue
        found = key_of(line)
        if not found:
            return None
        keys.add(found[0])
    return keys


def _yaml(value: object) -> str:
    """Quote a string for YAML if needed; a JSON string is a YAML string (YAML 1.2, section 1.3)."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) or text in ("peft", "gguf", "mlx", "mit") else json.dumps(text)


def _line(text: object) -> str:
    return " ".join(str(text).split())
