"""The adapters that `adapterhub chat` talks to, by the names under which its gateway finds them.

A gateway serves versions of one registry. A conversation with a folder, a file or an address gets a temporary registry, into
which every adapter that it names is copied.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapterhub.operations import source_names
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import RefError

from .options import Settings
from .registry_choice import workspace

_SHORT_DIGEST = len("sha256:") + 12


class RegistryModels:
    """Versions of a registry.

    Attributes:
        workspace: The workspace of the registry.
    """

    def __init__(self, base_name: str, workspace: Workspace) -> None:
        self._base_name, self.workspace = base_name, workspace

    def name_of(self, model: str) -> str:
        """Return the name of a base, a version or a blend in requests.

        Raises:
            NotFoundError: There is no such version; a gateway would report it without a hint.
            UsageError: It is a path, or no name.
        """
        from adapterhub.serve import model_names

        if model == self._base_name:
            return model
        try:
            parts = model_names.parse(model)
        except RefError as error:
            if Path(model).exists():
                raise source_names.not_stored_error(model) from error
            source_names.resolve(model, self.workspace)  # raises the error for what is no path either
            raise
        with self.workspace.open_registry() as registry:
            for part in parts:
                registry.resolve(part.ref)
        return model


class _CopiedModels(RegistryModels):
    """Adapters from anywhere, copied into a temporary registry when they are named, where their digest is their version."""

    def __init__(self, base_name: str, folder: str, origin: Workspace) -> None:
        # The policy is about what a user stores; versions of the user's registry are still held to it as they are read.
        super().__init__(base_name, dataclasses.replace(origin, registry=folder, policy=None, opener=None))
        self._origin = origin

    def name_of(self, model: str) -> str:
        """Copy what a text names, unless it is the base; return its name in requests. Errors are those of a push."""
        from adapterhub.serve import model_names

        if model == self._base_name:
            return model
        if _is_outside_registry(model, self._origin):
            return self._copy(model, f"local/{source_names.suggested_name(Path(model)).rpartition('/')[2]}")
        parts = model_names.parse(model)
        names = [self._copy(str(part.ref), part.ref.name) for part in parts]
        if len(parts) == 1 and parts[0].weight == 1:
            return names[0]
        return "+".join(f"{name}*{part.weight:g}" for name, part in zip(names, parts, strict=True))

    def _copy(self, text: str, name: str) -> str:
        from adapterhub.operations import push, sources

        with sources.open_source(text, self._origin) as source, sources.as_folder(source) as folder:
            stored = push.push(folder, name, workspace=self.workspace)
        return f"{name}@{stored.digest[:_SHORT_DIGEST]}"


def _is_outside_registry(model: str, origin: Workspace) -> bool:
    """Return whether a text names an address, or a path; one that is a version as well means the version."""
    return source_names.is_address(model) or (Path(model).exists() and not source_names.is_stored(model, origin))


@contextmanager
def open_models(named: Sequence[str], base_name: str, settings: Settings) -> Iterator[RegistryModels]:
    """Open the models of a conversation: those of the registry, unless one of the `named` is elsewhere."""
    from adapterhub.registry.registry import Registry

    origin = workspace(settings)
    if not any(model != base_name and _is_outside_registry(model, origin) for model in named if model):
        yield RegistryModels(base_name, origin)
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-chat-") as folder:
        Registry.init(Path(folder)).close()
        yield _CopiedModels(base_name, folder, origin)
