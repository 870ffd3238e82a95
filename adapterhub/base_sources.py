"""The base model that a text means: a path, the name of one in the registry or in huggingface_hub's cache, or an address.

Used by every command and function that takes a BASE. Headers are read from wherever they are. Weights must be on this disk;
those of `hf://org/model` are downloaded, because to write that is to ask for it, and a bare name never asks the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError, ParameterError, RemoteError, UsageError

from . import sources
from .sources import ADDRESSES
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import HubPath
    from adapterhub_converters.bases import BaseSpec

_HUB = "hf://"
_EXPLICIT = "base:"  # before a name, where a path of that name is there too


def weights(base: StrPath, workspace: Workspace) -> Path:
    """A model on this disk, for an operation that needs its weights.

    A folder, a file in it, or a GGUF file; the name of a model in the cache of huggingface_hub, or of a base in the registry
    that is there; `hf://org/model[@revision]`, which is downloaded into that cache.
    """
    text = os.fspath(base)
    if text.lower().startswith(_HUB) and isinstance(base, str):
        return _downloaded_base(text, workspace)
    path = Path(text)
    if not path.exists() and isinstance(base, str) and not text.lower().startswith(ADDRESSES):
        path = _named_weights(text, workspace)
    else:
        path = sources.existing(text)
    return path.parent if path.is_file() and path.suffix in (".safetensors", ".json") else path


def recorded(source: sources.Source) -> str:
    """The name of the base that an adapter records, `org/name` or `org/name@revision`, to be looked up like any other.

    Raises:
        ParameterError: It records none, or only a path, which means nothing on another machine.
    """
    from adapterhub.manifest import describe

    with sources.as_folder(source) as folder:
        base = describe.draft(folder).manifest().base
    if not base.repo:
        what = f"{source.where} records no base by name"
        raise ParameterError("base", what, "Name the model that it was trained on", code="base-required")
    return f"{base.repo}@{base.revision}" if base.revision else base.repo


def _named_weights(text: str, workspace: Workspace) -> Path:
    from adapterhub.bases import registered
    from adapterhub.bases.hub_address import HubPath

    name = base_name(text, workspace)
    if name is None:
        found = _cached_base(text, workspace)
        if found is None:
            raise _no_such_base(text)
        return found
    with workspace.opened() as registry:
        spec = registered.get(registry, name).spec
    # A GGUF names the model that it was made from, whose weights are others.
    place = HubPath(spec.repo, spec.revision) if spec.kind == "hf" and spec.repo and spec.revision else None
    found = in_cache(place, workspace) if place else None
    if found is None:
        what = "a base in the registry, which has its headers only, and the weights are needed"
        hint = f"Name its folder or file, or download it as {place}" if place else "Name its folder or file"
        raise NotFoundError(text, what, hint)
    return found


def _cached_base(text: str, workspace: Workspace) -> Path | None:
    from adapterhub.bases import hub_cache

    place = hub_cache.place_of(text)
    return in_cache(place, workspace) if place else None


def in_cache(place: HubPath, workspace: Workspace) -> Path | None:
    """The folder or file of a model in the cache of huggingface_hub; None if it is not there."""
    from adapterhub.bases import hub_cache

    return None if workspace.models is None else hub_cache.find(place, Path(workspace.models).expanduser())


def _downloaded_base(text: str, workspace: Workspace) -> Path:
    from adapterhub.bases.hub_address import OFFLINE, HubPath

    place = HubPath.parse(text)
    try:
        hub = workspace.hub()
    except RemoteError as error:
        found = in_cache(place, workspace) if error.code == OFFLINE else None
        if found is None:
            raise
        return found
    if workspace.models is None:
        raise UsageError(text, "there is no folder to download it to", "Name a folder or a file of the model")
    from adapterhub.bases import hub_download

    digests = Path(workspace.cache) if workspace.cache is not None else None
    with workspace.bar(f"downloading {place.repo}") as show:
        return hub_download.download(place, hub, Path(workspace.models).expanduser(), show=show, digests=digests)


def _no_such_base(text: str) -> NotFoundError:
    from adapterhub.bases import hub_cache

    place = hub_cache.place_of(text)
    if place and "/" in place.repo:
        what = "no such file or folder, no base of this name, and no such model in the cache of the Hub"
        return NotFoundError(text, what, f"Write {place} for one on the Hub")
    what = "no such file or folder, and no base of this name"
    return NotFoundError(text, what, "List the bases of the registry", code="no-such-base")


def base_name(text: str, workspace: Workspace) -> str | None:
    """The name of the base in the registry that `text` is; None for a path or an address, UsageError when it is two things."""
    from adapterhub.store.named_documents import parse_document_name

    if text.lower().startswith(ADDRESSES):
        return None
    explicit = text.startswith(_EXPLICIT)
    name = text.removeprefix(_EXPLICIT)
    path = Path(text)
    there = path.exists() or path.is_symlink()
    try:
        parse_document_name(name, text)
    except UsageError:
        if explicit and not there:
            raise
        return None
    if explicit and not there:
        return name
    if not _known_base(name, workspace, there=there):
        return None
    if there:
        hint = f"Write ./{text} for the path, {_EXPLICIT}{name} for the base"
        raise UsageError(text, "both a path and a base in the registry", hint, code="ambiguous")
    return name


def _known_base(name: str, workspace: Workspace, *, there: bool) -> bool:
    from adapterhub.store import named_documents

    try:
        with workspace.opened() as registry:
            return named_documents.current(registry.store, name).there
    except AdapterhubError as error:
        if there or isinstance(error, NotFoundError):  # a broken registry does not matter to a path
            return False
        raise


def read_base(base: StrPath, workspace: Workspace) -> BaseSpec:
    """The base model that `base` names, read from its headers.

    An address (`hf://org/model`, a URL), a path, the name of a base in the registry, or of a model in the cache of
    huggingface_hub; a path comes before the latter, and is a UsageError where the registry has a base of that name.
    """
    text = os.fspath(base)
    if text.lower().startswith(ADDRESSES):
        return _read_address(text, workspace)
    name = base_name(text, workspace)
    if name is not None:
        from adapterhub.bases import registered

        with workspace.opened() as registry:
            return registered.get(registry, name).spec
    from adapterhub_converters import bases

    path = Path(text)
    if not path.exists() and not path.is_symlink():
        found = _cached_base(text, workspace) if isinstance(base, str) else None
        if found is None:
            raise _no_such_base(text)
        path = found
    return bases.read_base(path)


def _read_address(text: str, workspace: Workspace) -> BaseSpec:
    """A base at an address; of the Hub, where it may not be asked, from huggingface_hub's cache."""
    from adapterhub.bases.hub_address import OFFLINE, SCHEME, HubPath
    from adapterhub.bases.remote import read_url

    try:
        hub = workspace.hub()
    except RemoteError as error:
        is_on_hub = error.code == OFFLINE and text.lower().startswith(SCHEME)
        found = in_cache(HubPath.parse(text), workspace) if is_on_hub else None
        if found is None:
            raise
        from adapterhub_converters import bases

        return bases.read_base(found)
    return read_url(text, hub)
