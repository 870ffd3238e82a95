"""The settings of vLLM's plugin, from variables: vLLM calls it without arguments, in each of its processes.

    ADAPTERHUB_VLLM_ALLOW   patterns of names that may be asked for, such as `team/*,other/sql`; without it, nothing happens
    ADAPTERHUB_VLLM_TAGS    `refuse` (default) or `pin`: how to treat names that may move
    ADAPTERHUB_VLLM_BASE    the base model, if the name that vLLM has for it leads nowhere
    ADAPTERHUB_VLLM_CHATS   `base` (default) or `client`: whose chat template asks adapters; a gateway is such a client
    ADAPTERHUB_REMOTE       the URL or the name of the remote to pull versions from; without it, they are in the registry

The registry, the policy, credentials and caches are those of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from adapterhub.operations.workspace import Workspace
from adapterhub.remotes.named_remotes import address_below, check_url
from adapterhub.serve import vllm_plugin
from adapterhub.serve.model_names import AllowedNames
from adapterhub_converters.errors import LocalIOError, NotFoundError, UsageError

from . import environment, registry_choice, remote_choice
from .options import Settings

ALLOW, TAGS, BASE = "ADAPTERHUB_VLLM_ALLOW", "ADAPTERHUB_VLLM_TAGS", "ADAPTERHUB_VLLM_BASE"
CHATS = "ADAPTERHUB_VLLM_CHATS"
_TAGS, _CHATS = ("refuse", "pin"), ("base", "client")


def register() -> None:
    """Serve adapters of a registry by vLLM: the entry point `adapterhub` of the group `vllm.general_plugins`.

    Raises:
        RuntimeError: The variables contradict each other or vLLM's, so vLLM must not start.
    """
    if plugin_settings := settings():
        vllm_plugin.register(plugin_settings)


def settings() -> vllm_plugin.Settings | None:
    """Return the settings in the variables; None if they allow no names. No file is read."""
    names = os.environ.get(ALLOW, "")
    if not names.strip(", "):
        return None
    allowed = AllowedNames.from_patterns([names])
    tags, chats = _choice(TAGS, _TAGS), _choice(CHATS, _CHATS)
    remote = os.environ.get(environment.REMOTE, "")
    if "://" in remote:
        try:
            check_url(remote)
        except UsageError as error:
            raise RuntimeError(f"{environment.REMOTE}: {error}") from None
    remote_name = "" if "://" in remote else remote
    base = os.environ.get(BASE, "")
    address = partial(_address, remote)
    options = {"pin": tags == "pin", "clients_render": chats == "client"}
    return vllm_plugin.Settings(allowed, _workspace, address, remote_name, base, **options)


def _choice(variable: str, values: Sequence[str]) -> str:
    """Return the value of a variable, by default the first of `values`."""
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise RuntimeError(f"{variable}={value!r} is not one of {', '.join(values)}")
    return value


def _workspace() -> Workspace:
    command_workspace, silent = registry_choice.workspace(Settings()), Workspace()
    # Bars would garble vLLM's log.
    return replace(command_workspace, bar=silent.bar, steps=silent.steps)


def _address(remote: str, ref: str) -> str:
    """Return the address of a ref on a remote, a URL or a name; the ref itself without one."""
    try:
        return address_below(remote_choice.remote_at(remote).url, ref) if remote else ref
    except NotFoundError as error:  # the remote is not known; to vLLM, NotFoundError would mean that the adapter is missing
        raise LocalIOError(error.where, error.what, error.hint) from error
