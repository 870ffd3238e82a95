"""Which registry: --registry, $ADAPTERHUB_REGISTRY, the nearest registry.db upwards, the user's data folder. Which hub."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from adapterhub_converters.errors import AdapterhubError, NotFoundError, RemoteError, UsageError

from .app import Settings

if TYPE_CHECKING:
    from adapterhub.bases.names import Hub
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


def hub() -> Hub:
    """Which Hugging Face Hub, and who asks: by the variables and the file that huggingface_hub reads (`utils/_auth.py`)."""
    from adapterhub.bases.names import ENDPOINT, Hub

    if _on("HF_HUB_OFFLINE") or _on("TRANSFORMERS_OFFLINE"):
        raise RemoteError("HF_HUB_OFFLINE", "is set, so nothing is fetched", "Unset it, or name a base on the disk")
    endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not token.strip() and not _on("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        with suppress(OSError, UnicodeDecodeError, RuntimeError):
            token = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser().read_text()
    token = token.replace("\r", "").replace("\n", "").strip()
    if not token.isascii() or not token.isprintable():
        raise UsageError("HF_TOKEN", "is not a token: it has characters that none has")
    return Hub(endpoint, token or None)


def _on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def data_folder() -> Path:
    """Where the user's own registry lies when no other is named."""
    if os.environ.get("XDG_DATA_HOME"):
        return Path(os.environ["XDG_DATA_HOME"]) / "adapterhub"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "adapterhub"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "adapterhub"
    return Path.home() / ".local" / "share" / "adapterhub"
