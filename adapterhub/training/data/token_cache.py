"""The cache of tokens: large data are encoded once, and the next training on them maps the result.

An entry is a folder of arrays. Its name is derived from everything that they depend on: the digests of the files, how they are
read, the tokenizer with its chat template, and the versions of the packages that encode. The row length, the order and the mix
of documents do not matter. It is written completely or not at all, and its arrays have checksums, verified when they are
mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.training import cache_folder
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError, OutputExistsError

from . import document_files
from .token_arrays import Corpus, EncodedFiles, File, Tokens

FORMAT = 3
WORTH = 4 << 20  # bytes of text, about a million tokens; less is encoded within seconds and not cached
_META = "corpus.json"
_READ_SIZE = 1 << 20  # bytes


@dataclass(frozen=True)
class Key:
    """The name of an entry, and the digests of the files that it is made of."""

    name: str
    digests: tuple[str, ...]


def key_of(config: TrainConfig, tokenizer: Any) -> Key | None:
    """Return the cache key for a run's data; None for little data, and for data that can be read only once (a pipe)."""
    data = config.data
    paths = [config.resolve(name) for name in (*data.paths, *data.heldout)]
    if not all(path.is_file() or path.is_dir() for path in paths):
        return None
    options = document_files.Options.of_training(config)
    digests_and_sizes = [document_files.digest(path, options) for path in paths]
    if sum(size for _, size in digests_and_sizes) < WORTH:
        return None
    digests = tuple(digest for digest, _ in digests_and_sizes)
    document = {
        "format": FORMAT,
        "train": [[path.name, digest] for path, digest in zip(paths, digests, strict=True)][: len(data.paths)],
        "heldout": [[path.name, digest] for path, digest in zip(paths, digests, strict=True)][len(data.paths) :],
        "heldout_share": data.heldout_share,
        "columns": dict(data.columns),
        "split_text": data.split_text,
        "pairs": bool(config.preference),
        "loss": data.loss,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [
            tokenizer.special_tokens_map,
            sorted(tokenizer.all_special_ids),
            sorted(getattr(tokenizer, "stop_tokens", ())),
        ],
        "template": [tokenizer.chat_template, getattr(tokenizer, "template_variables", {})],
        "versions": [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    # Sorted keys give the same name for the same contents.
    text = json.dumps(document, sort_keys=True, default=str)
    return Key(hashlib.sha256(text.encode()).hexdigest()[:32], digests)


def read(cache: Path, key: Key) -> Corpus | None:
    """Return the data of an entry with mapped arrays; None if there is no entry, or a damaged one, which is removed."""
    folder = _folder(cache, key)
    if not (folder / _META).is_file():
        return None
    try:
        meta = json_file.read_object(folder / _META)
        train, heldout = (_map_split(folder, split, meta[split]) if meta[split] else None for split in ("train", "heldout"))
        if train is None:
            raise FormatError(str(folder), "has no tokens to train on")
        corpus = Corpus(train, heldout, float(meta["shared"]))
    # Metadata and arrays of a damaged entry may raise anything; encoding again is always possible.
    except (AdapterhubError, OSError, ValueError, KeyError, TypeError):
        cache_folder.remove(folder)
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(folder)  # the time of its last use
    return corpus


Encode = Callable[[Path | None], tuple[Corpus, tuple[str, ...]]]
"""A function that encodes all data, their tokens into `file_of` a folder or into memory; also returns the files' digests."""


def create_entry(cache: Path, key: Key, encode: Encode) -> Corpus:
    """Create an entry and return its data mapped; if that fails, as on a full disk, the tokens are in memory instead.

    Errors that `encode` raises about the data are passed on.
    """
    folder = _folder(cache, key)
    # A cache that cannot be written must not stop a training run; another process may have written the same entry.
    with contextlib.suppress(LocalIOError, OutputExistsError, OSError, _ChangedError):
        cache_folder.remove_unused(folder.parent)
        with atomic.pending_output(folder) as new:
            _write(new, key, encode)
    return read(cache, key) or encode(None)[0]


class _ChangedError(Exception):
    """A file that has changed since its digest was put into the key."""


def _write(folder: Path, key: Key, encode: Encode) -> None:
    corpus, digests = encode(folder)
    # Otherwise the entry of the old contents would have the tokens of the new ones.
    if digests != key.digests:
        raise _ChangedError
    splits = {"train": corpus.train, "heldout": corpus.heldout}
    meta: dict[str, Any] = {split: encoded and _write_split(folder, split, encoded) for split, encoded in splits.items()}
    json_file.write_text(folder / _META, json.dumps({**meta, "shared": corpus.shared}))


def file_of(folder: Path, split: str) -> Path:
    """Return the file of the tokens of `train` or `heldout`."""
    return folder / f"{split}-tokens.npy"


def _folder(cache: Path, key: Key) -> Path:
    return cache / "tokens" / key.name


def _write_split(folder: Path, split: str, encoded: EncodedFiles) -> dict[str, Any]:
    np.save(folder / f"{split}-documents.npy", encoded.tokens.documents)
    return {
        "files": [asdict(file) for file in encoded.files],
        "notes": list(encoded.notes),
        "checksums": {name: _checksum(folder / f"{split}-{name}.npy") for name in ("tokens", "documents")},
    }


def _map_split(folder: Path, split: str, meta: dict[str, Any]) -> EncodedFiles:
    arrays = {}
    for name, checksum in meta["checksums"].items():
        path = folder / f"{split}-{name}.npy"
        if _checksum(path) != checksum:
            raise FormatError(str(folder), "differs from what was written")
        arrays[name] = np.load(path, mmap_mode="r")
    tokens = Tokens(arrays["tokens"], arrays["documents"])
    return EncodedFiles(tuple(File(**file) for file in meta["files"]), tokens, tuple(meta["notes"]))


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, reading it in pieces."""
    checksum = 0
    with open_regular(path) as file:
        while piece := file.read(_READ_SIZE):
            checksum = zlib.crc32(piece, checksum)
    return checksum
