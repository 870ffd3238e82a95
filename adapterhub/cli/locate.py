"""Which registry: --registry, $ADAPTERHUB_REGISTRY, the nearest registry.db upwards, the user's data folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from adapterhub_converters.errors import AdapterhubError, NotFoundError

from .app import Settings

if TYPE_CHECKING:
    from adapterhub.registry import Registry

ENVIRONMENT = "ADAPTERHUB_REGISTRY"


def registry_folder(settings: Settings) -> Path:
    """The folder of the registry to use; it may not be there yet."""
    from adapterhub.registry import find

    named = settings.registry or os.environ.get(ENVIRONMENT)
    return find(Path.cwd(), explicit=Path(named) if named else None, default=data_folder())


def open_registry(settings: Settings, *, make: bool = False) -> Registry:
    """The registry to use, open. `make`: a push may be the first thing that happens to it."""
    from adapterhub.registry import Registry

    folder = registry_folder(settings)
    try:
        return Registry.open(folder)
    except NotFoundError:
        if make:
            return Registry.init(folder)
        raise


def complete_ref(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """The refs that begin as what was typed, for a shell."""
    try:
        with open_registry(context.find_object(Settings) or Settings()) as registry:
            rows = registry.list()
    except AdapterhubError:
        return []
    refs = {str(row.ref) for row in rows} | {row.name for row in rows}
    return [CompletionItem(ref) for ref in sorted(refs) if ref.startswith(typed)]


def data_folder() -> Path:
    """Where the user's own registry lies when no other is named."""
    if os.environ.get("XDG_DATA_HOME"):
        return Path(os.environ["XDG_DATA_HOME"]) / "adapterhub"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "adapterhub"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "adapterhub"
    return Path.home() / ".local" / "share" / "adapterhub"
