"""The base model that a text names: a path, the name of one in the registry or in huggingface_hub's cache, or an address.

Every command and function that takes a BASE uses this module; `sources` is the same for an adapter. Headers are read from
wherever they are. Weights must be on this disk: those of `hf://org/model` are downloaded, because the user asked for it by
writing the address; a bare name never leads to a request over the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Union

from adapterhub_converters.errors import AdapterhubError, NotFoundError, ParameterError, RefusedError, RemoteError, UsageError

from . import source_names, sources
from .source_names import ADDRESSES
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import HubPath
    from adapterhub_converters.bases import BaseSpec

_HUB = "hf://"
_EXPLICIT = "base:"  # marks a name in the registry, for when a path has the same name


Base = Union[StrPath, "BaseSpec"]
"""A base model: a path, `hf://org/model`, a URL, the name of one in the registry or in the cache of the Hub, or what
`read_base` returned."""


def base_spec(base: Base | None, workspace: Workspace) -> BaseSpec | None:
    """Return what a base is, read from its headers if it is a text or a path; None for none."""
    return read_base(base, workspace) if isinstance(base, str | os.PathLike) else base


def is_base(text: str, workspace: Workspace) -> bool:
    """Return whether a text names a base that is there, or an address; False for an adapter of the registry.

    Raises:
        UsageError: It is both a path or a cached model, and an adapter or a base in the registry.
    """
    if text.lower().startswith(ADDRESSES) or registered_base_name(text, workspace) is not None:
        return True
    if Path(text).exists():
        return source_names.resolve(text, workspace)[0] is not None
    if _cached_base(text, workspace) is None:
        return False
    if source_names.is_stored(text, workspace):
        hint = f"Write hf://{text} for the model, {text}:latest for the adapter"
        raise UsageError(text, "both a model in the cache of the Hub and an adapter in the registry", hint, code="ambiguous")
    return True


def local_path(base: BaseSpec | None) -> str | None:
    """Return the absolute path of a base on this machine, which Ollama takes as its name; None for any other base."""
    return source_names.local_base_path(base.source) if base else None


def weights(base: StrPath, workspace: Workspace) -> Path:
    """Return the path of a model on this disk, for an operation that needs its weights.

    A folder, a file in it, or a GGUF file; the name of a model in the cache of huggingface_hub, or of a base in the registry
    that is in this cache; `hf://org/model[@revision]`, which is downloaded into that cache.
    """
    text = os.fspath(base)
    if text.lower().startswith(_HUB) and isinstance(base, str):
        return _download_base(text, workspace)
    path = Path(text)
    if not path.exists() and isinstance(base, str) and not text.lower().startswith(ADDRESSES):
        path = _named_weights(text, workspace)
    else:
        path = source_names.existing_path(text)
    # A file in a Hugging Face folder means the folder; a GGUF file is a model by itself.
    return path.parent if path.is_file() and path.suffix in (".safetensors", ".json") else path


def recorded_base(source: sources.Source) -> str:
    """Return the name of the base that an adapter records, `org/name` or `org/name@revision`, to be looked up like any other.

    Raises:
        ParameterError: It records none, or only a path, which has no meaning on another machine.
        RefusedError: It records none, and is for an image model, which nothing that asks for a base here would run.
    """
    from adapterhub.manifest import derive

    with sources.as_folder(source) as folder:
        draft = derive.draft(folder)
        base, family = draft.manifest().base, draft.inspected.adapter.meta.family
    if not base.repo and family:
        raise RefusedError(source.location, f"is an adapter of {family}, an image model", "Use it in diffusers or ComfyUI")
    if not base.repo:
        problem = f"{source.location} records no base by name"
        raise ParameterError("base", problem, "Name the model that it was trained on", code="base-required")
    return f"{base.repo}@{base.revision}" if base.revision else base.repo


def recorded_base_here(source: sources.Source, workspace: Workspace) -> str:
    """Return the `recorded_base` of an adapter, and tell it; raise NotFoundError if it is not on this machine."""
    base = recorded_base(source)
    workspace.tell(f"base: {base}, which the adapter records")
    if not is_base(base, workspace):
        problem = "no such file or folder, no base of this name, and no such model in the cache of the Hub"
        # Nobody has written its name here: the hint is about an option, and not about what was written.
        raise NotFoundError(base, problem, "Name the model itself", code="base-not-here", recorded=f"{_HUB}{base}")
    return base


def _named_weights(text: str, workspace: Workspace) -> Path:
    from adapterhub.bases import registered_bases
    from adapterhub.bases.hub_address import HubPath

    name = registered_base_name(text, workspace)
    if name is None:
        cached = _cached_base(text, workspace)
        if cached is None:
            raise _missing_base_error(text, workspace)
        return cached
    with workspace.open_registry() as registry:
        spec = registered_bases.get(registry, name).spec
    # A GGUF file names the model that it was made from; the weights of that model are not those of the file.
    hub_path = HubPath(spec.repo, spec.revision) if spec.kind == "hf" and spec.repo and spec.revision else None
    cached = cached_model_path(hub_path, workspace) if hub_path else None
    if cached is None:
        problem = "a base in the registry, which has its headers only, and the weights are needed"
        hint = f"Name its folder or file, or download it as {hub_path}" if hub_path else "Name its folder or file"
        raise NotFoundError(text, problem, hint)
    return cached


def _cached_base(text: str, workspace: Workspace) -> Path | None:
    from adapterhub.bases import hub_cache

    hub_path = hub_cache.place_of(text)
    return cached_model_path(hub_path, workspace) if hub_path else None


def cached_model_path(hub_path: HubPath, workspace: Workspace) -> Path | None:
    """Return the folder or file of a model in the cache of huggingface_hub; None if it is not there."""
    from adapterhub.bases import hub_cache

    return None if workspace.models is None else hub_cache.find(hub_path, Path(workspace.models).expanduser())


def _download_base(text: str, workspace: Workspace) -> Path:
    from adapterhub.bases.hub_address import OFFLINE, HubPath

    hub_path = HubPath.parse(text)
    try:
        hub = workspace.hub()
    except RemoteError as error:
        # Offline, a model that was downloaded before is as good as the hub's answer.
        cached = cached_model_path(hub_path, workspace) if error.code == OFFLINE else None
        if cached is None:
            raise
        return cached
    if workspace.models is None:
        raise UsageError(text, "there is no folder to download it to", "Name a folder or a file of the model")
    from adapterhub.bases import hub_download

    # Digests of large files are cached, so that a model is not hashed again each time.
    digests = Path(workspace.cache) if workspace.cache is not None else None
    with workspace.bar(f"downloading {hub_path.repo}") as progress:
        return hub_download.download(hub_path, hub, Path(workspace.models).expanduser(), show=progress, digests=digests)


def _missing_base_error(text: str, workspace: Workspace) -> NotFoundError:
    from adapterhub.bases import hub_cache
    from adapterhub.ref import is_name

    name = text.partition("@")[0].partition(":")[0]
    if is_name(name) and source_names.is_stored(name, workspace):
        hint = "Name the folder or the .gguf file of the base"
        return NotFoundError(text, "is an adapter in the registry, not a base model", hint, code="not-a-base")
    hub_path = hub_cache.place_of(text)
    if hub_path and "/" in hub_path.repo:
        problem = "no such file or folder, no base of this name, and no such model in the cache of the Hub"
        return NotFoundError(text, problem, f"Write {hub_path} for one on the Hub", code="base-not-here")
    problem = "no such file or folder, and no base of this name"
    return NotFoundError(text, problem, "List the bases of the registry", code="no-such-base")


def registered_base_name(text: str, workspace: Workspace) -> str | None:
    """Return the name of the base in the registry that `text` is; None for a path or an address.

    Raises:
        UsageError: It is both a path and a base in the registry.
    """
    from adapterhub.store.named_documents import parse_document_name

    if text.lower().startswith(ADDRESSES):
        return None
    explicit = text.startswith(_EXPLICIT)
    name = text.removeprefix(_EXPLICIT)
    path = Path(text)
    path_exists = path.exists() or path.is_symlink()
    try:
        parse_document_name(name, text)
    except UsageError:
        if explicit and not path_exists:
            raise
        return None
    if explicit and not path_exists:
        return name
    if not _has_base(name, workspace, path_exists=path_exists):
        return None
    if path_exists:
        hint = f"Write ./{text} for the path, {_EXPLICIT}{name} for the base"
        raise UsageError(text, "both a path and a base in the registry", hint, code="ambiguous")
    return name


def _has_base(name: str, workspace: Workspace, *, path_exists: bool) -> bool:
    from adapterhub.store import named_documents

    try:
        with workspace.open_registry() as registry:
            return named_documents.current(registry.store, name).exists
    except AdapterhubError as error:
        if path_exists or isinstance(error, NotFoundError):  # a registry that cannot be read must not get in the way of a path
            return False
        raise


def read_base(base: StrPath, workspace: Workspace) -> BaseSpec:
    """Return the base model that `base` names, read from its headers.

    An address (`hf://org/model`, a URL), a path, the name of a base in the registry, or of a model in the cache of
    huggingface_hub. A path takes precedence over the cache; it is a UsageError if the registry has a base of that name.
    """
    text = os.fspath(base)
    if text.lower().startswith(ADDRESSES):
        return _read_address(text, workspace)
    name = registered_base_name(text, workspace)
    if name is not None:
        from adapterhub.bases import registered_bases

        with workspace.open_registry() as registry:
            return registered_bases.get(registry, name).spec
    from adapterhub_converters import bases

    path = Path(text)
    if not path.exists() and not path.is_symlink():
        cached = _cached_base(text, workspace) if isinstance(base, str) else None
        if cached is None:
            raise _missing_base_error(text, workspace)
        path = cached
    return bases.read_base(path)


def _read_address(text: str, workspace: Workspace) -> BaseSpec:
    """Read a base at an address; in an offline mode, read a model of the hub from huggingface_hub's cache."""
    from adapterhub.bases.hub_address import OFFLINE, SCHEME, HubPath
    from adapterhub.bases.remote_base import read_url

    try:
        hub = workspace.hub()
    except RemoteError as error:
        is_on_hub = error.code == OFFLINE and text.lower().startswith(SCHEME)
        cached = cached_model_path(HubPath.parse(text), workspace) if is_on_hub else None
        if cached is None:
            raise
        from adapterhub_converters import bases

        return bases.read_base(cached)
    return read_url(text, hub)
