"""The registry that a command uses, and the workspace over it.

The option names it, else the environment, the project, a folder above the working folder, or the user's settings. A hub in a
database and a bucket takes its place if the variables of one are set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.digest import sha256_bytes
from adapterhub.operations.workspace import Workspace
from adapterhub_converters.errors import UsageError

from . import environment
from .options import JOBS, RATE, Settings

if TYPE_CHECKING:
    from adapterhub.hub.settings import HubSettings
    from adapterhub.registry.registry import Registry


def registry_folder(settings: Settings) -> Path:
    """Return the folder of the registry to use; it may not exist yet."""
    return chosen_registry(settings)[0]


def chosen_registry(settings: Settings) -> tuple[Path, str]:
    """Return the folder of the registry to use, and what chose it."""
    from adapterhub.registry.registry import find

    explicit, chooser = _named_registry(settings)
    if explicit:
        return find(Path.cwd(), explicit=Path(explicit)), chooser
    user_settings = environment.user()
    default = (user_settings and user_settings.registry) or environment.data_folder()
    folder = find(Path.cwd(), default=default)
    if folder != default:
        return folder, "found here" if folder == Path.cwd() else "found above this folder"
    return folder, str(environment.user_file()) if user_settings and user_settings.registry else "the default"


def named_registry(settings: Settings) -> str | None:
    """Return the registry that an option, the environment or the project names."""
    return _named_registry(settings)[0]


def _named_registry(settings: Settings) -> tuple[str | None, str]:
    if settings.registry:
        return settings.registry, "--registry"
    if folder_of_hub := environment.hub_setting("registry"):
        is_variable = bool(os.environ.get(environment.REGISTRY))
        return folder_of_hub, f"${environment.REGISTRY if is_variable else environment.CONFIG}"
    settings_file = environment.project()
    folder = Workspace(trusts=environment.trusts).admitted_registry(settings_file) if settings_file else None
    return (str(folder), str(settings_file.path)) if settings_file and folder else (None, "")


def workspace(settings: Settings) -> Workspace:
    """Return the workspace of a command: options, variables, the project and its user."""
    from . import output, progress

    context = click.get_current_context(silent=True)
    meta = context.meta if context else {}
    return Workspace(
        # A function, because a command that needs no registry must not fail for one that is missing.
        registry=lambda: registry_folder(settings),
        policy=environment.policy,
        docker=environment.docker_config(),
        hub=environment.hub,
        environ=os.environ,
        proxy=environment.proxy,
        trusts=environment.trusts,
        uploads=environment.data_folder() / "uploads",
        cache=environment.cache_folder(),
        models=environment.hub_cache(),
        tell=lambda note: output.say(output.one_line(note)),
        bar=progress.bytes_bar,
        steps=progress.count_bar,
        jobs=meta.get(JOBS) or 4,
        rate=meta.get(RATE),
        author=environment.author(),
        known_signers=environment.config_folder() / "known_signers",
        opener=_shared_opener(settings),
    )


def open_registry(settings: Settings, *, create: bool = False) -> Registry:
    """Open the registry to use; with `create`, a missing one is created, because a push may come first."""
    return workspace(settings).open_registry(create=create)


def _shared_opener(settings: Settings) -> Callable[[], Registry] | None:
    try:
        hub_settings = shared_hub(settings)
    except UsageError as error:
        problem = error

        # Only once a registry is needed: most commands are about files too.
        def refuse() -> Registry:
            raise problem

        return refuse
    if hub_settings is None:
        return None

    def opener() -> Registry:
        from adapterhub.hub.storage.from_settings import open_registry

        return open_registry(hub_settings)

    return opener


def shared_hub(settings: Settings, *, needs_bucket: bool = True) -> HubSettings | None:
    """Return the settings of the hub in a database and a bucket whose registry is meant; None if that of a folder is.

    Its variables, or the file of ADAPTERHUB_CONFIG, choose it, unless --registry names a folder with a registry of its own.

    Raises:
        UsageError: Only one of the two is known.
    """
    values = {environment.DATABASE: environment.hub_setting("database"), environment.BLOBS: environment.hub_setting("blobs")}
    if not any(values.values()):
        return None
    from adapterhub.store.store import FOLDER

    if settings.registry is not None and (registry_folder(settings) / FOLDER).exists():
        return None
    missing = [name for name, value in values.items() if not value and (needs_bucket or name != environment.BLOBS)]
    if missing:
        raise UsageError(missing[0], "not set, and this is for a hub in a database and a bucket", f"Set {missing[0]}")
    shared = hub_settings(settings)
    if named_registry(settings) is None:
        # The copies of one hub only: the folder's name is made of both addresses.
        addresses = " ".join(values.values()).encode()
        return replace(
            shared, registry=environment.cache_folder() / "hubs" / sha256_bytes(addresses).removeprefix("sha256:")[:16]
        )
    return shared


def hub_settings(settings: Settings, **options: Any) -> HubSettings:
    """Return the settings of the hub: in the folder of the registry, or where ADAPTERHUB_DATABASE and ADAPTERHUB_BLOBS say.

    The address of a database contains its password, which others on the machine can read among the words of a command: give it
    in the variable, or in the file of ADAPTERHUB_CONFIG.
    """
    from adapterhub.hub.settings import HubSettings

    defaults = {
        "database": environment.hub_setting("database"),
        "blobs": environment.hub_setting("blobs"),
        "environ": os.environ,
    }
    given_options = {key: value for key, value in options.items() if value is not None}
    return HubSettings(registry=registry_folder(settings), **{**defaults, **given_options})
