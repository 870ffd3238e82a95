"""The files of a commit on a hub as an adapter, and the model card that a hub shows.

An adapter consists of the files that its adapter.json lists or, without one, of the files with the names of an adapter's files.
Nothing is believed because a hub sends it: names are checked before one becomes a path, and an adapter.json is a list of
digests that the files must have.

A hub reads base, library, tags and license from the front matter of README.md (Hugging Face's docs, "Model Cards"). The fields
that a README lacks are added as one block between two comments at the top of its front matter, or as a new front matter.
Nothing else in it changes, except that a base model that is a local path, as PEFT writes it, becomes a comment. Without the
block it is the README of the adapter again, byte for byte, which its digest proves. An adapter without a README gets a new
card, which is not part of the version.
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
from adapterhub_converters import safe_regex
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, PEFT_WEIGHTS, pickled_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.yaml_lines import key_of

from .hub_client import Entry, Listing

_HINT = "Ask its owner to push it again"

CARD = "README.md"
MAX_CARD = 4 << 20  # bytes; a longer README is left as it is
_CHECKPOINT_FOLDER = safe_regex.Pattern(r"checkpoint-\d+/")
_BEGIN, _BEGIN_FRONT_MATTER, _END = (
    b"# adapterhub: added",
    b"# adapterhub: added with the front matter",
    b"# adapterhub: end of what was added",
)
_WRITTEN_CARD_START = b"---\n# adapterhub: written of adapter.json\n"
_REPLACED_PREFIX = b"# adapterhub: was "
_BASE_KEY = b"\nbase_model:"
_MODEL_NAME = safe_regex.Pattern(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NOT_IN_LICENSE = safe_regex.Pattern(r"[^a-z0-9.+]+")
_PLAIN_SCALAR = safe_regex.Pattern(r"[A-Za-z][\w.-]*/[A-Za-z][\w.-]*|[a-z]+-[a-z0-9.-]+")
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


def matches_entry(entry: Entry | None, data: bytes) -> bool:
    """Return whether a file in a listing has the content `data`, by its digest or by git's name of the blob."""
    if entry is None:
        return False
    if entry.digest is not None:
        return entry.digest == sha256_bytes(data)
    return entry.oid == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def assemble_manifest(raw: bytes, location: str) -> Manifest:
    """Return the OCI manifest of an adapter.json and the files that it lists."""
    files = {**listed_files(json_file.parse_object(raw, location), location), ADAPTER_JSON: (sha256_bytes(raw), len(raw))}
    assembled_manifest = oci_manifest.assemble(files, AdapterManifest.parse(raw, location))
    manifest = oci_manifest.parse(assembled_manifest.raw, location)
    return dataclasses.replace(manifest, config_bytes=assembled_manifest.config_bytes)


def listed_files(document: Mapping[str, Any], location: str) -> dict[str, tuple[Digest, int]]:
    """Return the files in an adapter.json: path to digest and size in bytes.

    Raises:
        FormatError: An entry is malformed, a path occurs twice, or there are no files or more than MAX_FILES.
    """
    listed = document.get("files")
    files: dict[str, tuple[Digest, int]] = {}
    for entry in listed if isinstance(listed, list) else []:
        path, size = (entry.get("path"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or type(size) is not int or size < 0 or path == ADAPTER_JSON or path in files:
            raise FormatError(location, "its list of files has an invalid entry, or two of one path", _HINT)
        files[path] = (parse_digest(entry.get("digest"), location), size)
    if not files or len(files) > MAX_FILES:
        raise FormatError(location, f"lists no files, or more than {MAX_FILES}", _HINT)
    return files


def split_importable(listing: Listing, location: str) -> tuple[list[str], list[str]]:
    """Split the paths of a repository without an adapter.json into those that may belong to an adapter and the others.

    Raises:
        NotFoundError: The repository has neither an adapter_config.json nor a GGUF file.
        RefusedError: Its weights are a pickle.
    """
    files = listing.files
    if ADAPTER_CONFIG not in files and not any(path.endswith(".gguf") for path in files):
        hint = "A model without adapter_config.json is a base model"
        raise NotFoundError(
            location,
            f"no adapter in this repository: neither {ADAPTER_JSON}, {ADAPTER_CONFIG} nor a GGUF file",
            hint,
            code="no-adapter",
        )
    if (pickles := pickled_weights(files)) and PEFT_WEIGHTS not in files:
        hint = "Ask its owner for safetensors, or convert it with peft in a sandbox"
        raise RefusedError(f"{location}: {pickles[0]}", "a pickle can run code when it is loaded", hint)
    importable_paths: list[str] = []
    skipped: list[str] = []
    for path in sorted(files):
        parts = path.split("/")
        # `.` and `..` are no hidden folders: `check_names` rejects them below.
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        try:
            check_names([path], location)
        except RefusedError:
            skipped.append(path)
            continue
        (skipped if hidden or _CHECKPOINT_FOLDER.match(path) else importable_paths).append(path)
    return importable_paths, skipped


# ---- the model card


def complete_card(readme: bytes, manifest: AdapterManifest) -> bytes:
    """Add the fields that a hub needs to a README; return it unchanged if it has them all or cannot be parsed."""
    keys, card = _front_matter_keys(readme), readme
    if keys is None or len(readme) > MAX_CARD:
        return readme
    # A local path in `base_model` makes a hub refuse the commit: comment it out, and add the base's repository below.
    if manifest.base.repo and "base_model" in keys and (path_start := _local_base_start(readme)):
        keys.discard("base_model")
        card = readme[:path_start] + _REPLACED_PREFIX + readme[path_start:]
    lines = [line for key, text in _card_fields(manifest) if key not in keys for line in text]
    if not lines:
        return readme
    front_start = _front_matter_start(card)
    if front_start:
        end = b"\r\n" if card[:front_start].endswith(b"\r\n") else b"\n"
        block = end.join([_BEGIN, *(line.encode() for line in lines), _END, b""])
        result = card[:front_start] + block + card[front_start:]
    else:
        result = b"\n".join([b"---", _BEGIN_FRONT_MATTER, *(line.encode() for line in lines), _END, b"---", card])
    # The block must be removable again, or the README would no longer have its digest.
    return result if original_readme(result) == readme else readme


def original_readme(card: bytes) -> bytes:
    """Return a README without what `complete_card` added to it."""
    front = b"---\n" + _BEGIN_FRONT_MATTER + b"\n"
    if card.startswith(front):
        _, closed, remainder = card[len(front) - 1 :].partition(b"\n" + _END + b"\n---\n")
        return remainder if closed else card
    front_start = _front_matter_start(card)
    block_end = front_start and _end_of_line(card, _BEGIN, front_start)
    end_line = block_end and card.find(b"\n" + _END, block_end - 1)
    # The README's own text may contain the words of the end line: take the first one that is a whole line.
    while block_end and end_line >= 0:
        if end := _end_of_line(card, _END, end_line + 1):
            return card[:front_start] + card[end:].replace(b"\n" + _REPLACED_PREFIX + b"base_model", b"\nbase_model", 1)
        end_line = card.find(b"\n" + _END, end_line + 1)
    return card


def _end_of_line(card: bytes, line: bytes, offset: int) -> int:
    """Return where the next line begins if there is exactly `line` at `offset`, else 0."""
    end = offset + len(line)
    if not card.startswith(line, offset):
        return 0
    return next((end + len(newline) for newline in (b"\n", b"\r\n") if card.startswith(newline, end)), 0)


def _front_matter_start(card: bytes) -> int:
    """Return where the content of the front matter begins, 0 without one."""
    end = card.find(b"\n") + 1
    line = card[: end - 1].removesuffix(b"\r")
    return end if end and line.startswith(b"---") and not line[3:].strip(b" \t") else 0


def _front_matter_end(card: bytes, start: int) -> int:
    """Return the offset of the dashes that end the front matter whose content begins at `start`, 0 without them."""
    dashes = card.find(b"\n---", start - 1)
    while dashes >= 0:
        end = card.find(b"\n", dashes + 1)
        if not card[dashes + 4 : end if end >= 0 else len(card)].removesuffix(b"\r").strip(b" \t"):
            return dashes + 1
        dashes = card.find(b"\n---", dashes + 1)
    return 0


def _local_base_start(readme: bytes) -> int:
    """Return the offset of a `base_model` that is a local path, which a hub would refuse; 0 without one."""
    start = _front_matter_start(readme)
    key_start = readme.find(_BASE_KEY, start - 1, _front_matter_end(readme, start)) if start else -1
    if key_start < 0:
        return 0
    value = readme[key_start + len(_BASE_KEY) : readme.find(b"\n", key_start + 1)].decode()
    plain = value.strip().strip("\"'") if value[:1] in (" ", "\t") else ""
    return (
        key_start + 1 if plain and not plain.startswith(("[", "#", "|", ">", "&")) and not _MODEL_NAME.fullmatch(plain) else 0
    )


def write_card(title: str, manifest: AdapterManifest) -> bytes:
    """Return a new card for an adapter without a README."""
    base, name = manifest.base.repo, _one_line(manifest.name or title)
    kind = {"lora": "LoRA adapter", "dora": "DoRA adapter"}.get(manifest.method, "adapter")
    rank = f" of rank {manifest.rank}" if manifest.rank else ""
    for_base = f" for {_one_line(base)}" if base else ""
    description = [manifest.description, ""] if manifest.description else []
    fields = [line for _, text in _card_fields(manifest) for line in text]
    text = [f"# {name}", "", *description, f"A {kind}{rank}{for_base}. Its manifest is `adapter.json`.", ""]
    return _WRITTEN_CARD_START + "\n".join([*fields, "---", "", *text]).encode()


def is_written_card(card: bytes) -> bool:
    """Return whether a card is from `write_card`."""
    return card.startswith(_WRITTEN_CARD_START)


def _card_fields(manifest: AdapterManifest) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields that a hub needs: each key with its lines of YAML."""
    base, spdx = manifest.base.repo, manifest.license
    if base:
        yield "base_model", [f"base_model: {_yaml_scalar(base)}"]
        yield "base_model_relation", ["base_model_relation: adapter"]
    yield "library_name", [f"library_name: {_yaml_scalar(manifest.format)}"]
    if manifest.task in _TASKS:
        yield "pipeline_tag", [f"pipeline_tag: {_TASKS[manifest.task]}"]
    tags = {"lora": ["lora"], "dora": ["lora", "dora"]}.get(manifest.method, [])
    if tags:
        yield "tags", ["tags:", *(f"- {tag}" for tag in tags)]
    if spdx:
        name = _NOT_IN_LICENSE.sub("-", spdx.lower()).strip("-")
        # SPDX's `-only` and `-or-later` do not exist on hubs.
        license_id = name.removesuffix("-only").removesuffix("-or-later")
        other_license = ["license: other", *([f"license_name: {_yaml_scalar(name)}"] if name else [])]
        yield "license", [f"license: {_yaml_scalar(license_id)}"] if license_id in _LICENSES else other_license


def _front_matter_keys(readme: bytes) -> set[str] | None:
    """Return the keys of the front matter, empty without one; None if it is not a plain mapping or the file is not UTF-8."""
    try:
        text = readme.decode()
    except UnicodeDecodeError:
        return None
    start = _front_matter_start(readme)
    if not start:
        # After a byte order mark or a blank line, hubs still see a front matter: leave such a file alone.
        return None if text.lstrip("\ufeff \t\r\n").startswith("---") else set()
    end = _front_matter_end(readme, start)
    if not end:
        return None
    keys = set()
    for line in readme[start:end].decode().splitlines():
        if not line.strip() or line[0] in " \t#" or line.startswith("- ") or line == "-":
            continue
        key = key_of(line)
        if not key:
            return None
        keys.add(key[0])
    return keys


def _yaml_scalar(value: object) -> str:
    """Return a value as a YAML scalar, quoted if needed: a JSON string is a YAML string (YAML 1.2, section 1.3)."""
    text = str(value)
    return text if _PLAIN_SCALAR.fullmatch(text) or text in ("peft", "gguf", "mlx", "mit") else json.dumps(text)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
