"""Verified downloads of base models into the cache of huggingface_hub.

huggingface_hub downloads: it resumes, and other programs find the same files. It does not compare a file with the digest that
the Hub names, so that is done here. Only the files that a model needs are downloaded: no pickles, no code, one kind of weights.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapterhub import digest_cache
from adapterhub_converters.adapter_files import is_pickle_name
from adapterhub_converters.bases import hub_layout
from adapterhub_converters.errors import AdapterhubError, IntegrityError, NotFoundError, RefusedError, RemoteError, UsageError

from . import hub_cache
from .hub_address import Hub, HubPath
from .ranges import ListedFile, RangeClient, gated_error
from .remote_base import list_files

_HINT = "Delete it, and try again"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors")
_DOCUMENTS = ("README.md", "LICENSE", "NOTICE")
Show = Callable[[int, int], None]


def download(hub_path: HubPath, hub: Hub, cache: Path, *, show: Show | None = None, digests: Path | None = None) -> Path:
    """Download the files needed for a model, and return its folder or the file that `hub_path` names.

    Args:
        hub_path: A model, or a GGUF file or a folder in one.
        hub: The hub and the token for it.
        cache: The cache of huggingface_hub.
        show: Called with the bytes downloaded so far and the total.
        digests: A folder that caches the digests of unchanged files.

    Raises:
        NotFoundError: There is no such model, revision or file.
        RefusedError: Its weights are pickles.
        UsageError: It has several GGUF files, and `hub_path` does not name one.
        RemoteError: The hub did not answer, or refused.
        IntegrityError: A file does not match the hub's listing.
    """
    with contextlib.closing(RangeClient.for_hub(hub)) as client:
        commit, listing = list_files(hub_path, hub, client)
    names = _names_to_download(hub_path, listing)
    folder = cache / hub_layout.snapshot_path(hub_path.repo, commit)
    # Progress counts only files that are not in the cache yet.
    missing = sum(listing[name].size or 0 for name in names if not (folder / name).exists())
    if missing:
        _fetch(
            hub_path,
            hub,
            cache,
            names,
            (lambda downloaded: show(min(downloaded, missing), missing)) if show else lambda _: None,
        )
    elif hub_cache.find(hub_path, cache) is None:  # all files are there, but not the ref: another branch has the same commit
        _fetch(hub_path, hub, cache, names, lambda _: None)
    # Files that were in the cache already are verified as well: another program may have downloaded them.
    for name in names:
        _verify(folder / name, listing[name], hub_path, digests)
    return folder / hub_path.path


def _names_to_download(hub_path: HubPath, listing: Mapping[str, ListedFile]) -> list[str]:
    """Return the names of the files to download.

    These are the named file with its parts, or configuration, tokenizer and safetensors of a folder.
    """
    if hub_path.path in listing:
        return _gguf_parts(hub_path.path, listing)
    prefix = f"{hub_path.path}/" if hub_path.path else ""
    names = [name.removeprefix(prefix) for name in listing if name.startswith(prefix)]
    names = [name for name in names if "/" not in name]
    if not names:
        raise NotFoundError(str(hub_path), "no such file or folder in this model", code="no-such-file")
    weights = _weight_names(names)
    if not weights:
        return [_only_gguf(hub_path, prefix, names, listing)]
    configuration = [name for name in names if name.endswith(_SUFFIXES) and not name.endswith(".safetensors")]
    # Indexes of other weight formats name files that are not downloaded.
    configuration = [name for name in configuration if not name.endswith(".index.json") or name == _INDEX]
    return [prefix + name for name in (*configuration, *(name for name in _DOCUMENTS if name in names), *weights)]


def _weight_names(names: list[str]) -> list[str]:
    """Return the safetensors files that transformers loads, among all that a model may have."""
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if _SINGLE in safetensors:
        return [_SINGLE]
    return [name for name in safetensors if name.startswith("model-")] if _INDEX in names else safetensors


def _gguf_parts(name: str, listing: Mapping[str, ListedFile]) -> list[str]:
    numbered_stem, separator, count = name.removesuffix(".gguf").rpartition("-of-")
    base_name = numbered_stem.rpartition("-")[0]
    parts = [part for part in listing if separator and part.startswith(f"{base_name}-") and part.endswith(f"-of-{count}.gguf")]
    return parts or [name]


def _only_gguf(hub_path: HubPath, prefix: str, names: list[str], listing: Mapping[str, ListedFile]) -> str:
    gguf_names = [name for name in names if name.endswith(".gguf")]
    if len(gguf_names) == 1:
        return prefix + gguf_names[0]
    if gguf_names:
        raise UsageError(str(hub_path), f"has {len(gguf_names)} GGUF files", f"Name one, such as {hub_path}/{gguf_names[0]}")
    pickles = next((name for name in names if is_pickle_name(name)), None)
    if pickles:
        raise RefusedError(f"{hub_path}/{pickles}", "a pickle can run code when it is loaded", "Use a model in safetensors")
    raise NotFoundError(str(hub_path), "not a base model: it has no safetensors and no GGUF file", code="not-a-base")


def _fetch(hub_path: HubPath, hub: Hub, cache: Path, names: list[str], show: Callable[[int], None]) -> None:
    """Let huggingface_hub download files into its cache."""
    import huggingface_hub
    from huggingface_hub import errors, utils

    class Counting(utils.tqdm):  # type: ignore[misc]
        """A progress bar that passes on the bytes of all files and draws nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B" and options.get("name") == "huggingface_hub.snapshot_download"
            self._done = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                self._done += int(n or 0)
                show(self._done)

    try:
        huggingface_hub.snapshot_download(
            hub_path.repo,
            revision=hub_path.revision,
            cache_dir=cache,
            endpoint=hub.endpoint,
            token=hub.checked_token() or False,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=Counting,
            library_name="adapterhub",
        )
    except AdapterhubError:
        raise
    except errors.GatedRepoError as error:
        raise gated_error(str(hub_path), "a gated model", anonymous=not hub.token) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        response = getattr(error, "response", None)  # if there is one, the error's text has its address, which may be signed
        reason = next(iter(str(error).splitlines()), "") if response is None else f"HTTP {response.status_code}"
        problem = f"the download failed ({reason[:200] or type(error).__name__})"
        raise RemoteError(str(hub_path), problem, "Files that have arrived are kept. Try again") from error


def _verify(file: Path, listed: ListedFile, hub_path: HubPath, digests: Path | None) -> None:
    """Compare a downloaded file with the listing of the hub."""
    if not file.is_file():
        raise RemoteError(
            str(hub_path), f"{file.name} is not among what was downloaded", "The model may have changed; try again"
        )
    if listed.size is not None and file.stat().st_size != listed.size:
        raise IntegrityError(str(file), f"has {file.stat().st_size} bytes, not the {listed.size} that the hub lists", _HINT)
    if listed.sha256 is not None and digest_cache.digest(file, digests) != listed.sha256:
        raise IntegrityError(str(file), f"its bytes do not match {listed.sha256}, the digest that the hub lists", _HINT)
