"""`adapterhub info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from adapterhub.cli import environment, errors, output, registry_choice
from adapterhub.cli.options import Settings, command
from adapterhub.operations.workspace import project_file
from adapterhub.version import __version__
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import AdapterhubError

# Packages that commands import only when they need them, and the commands that do.
_PACKAGES = {
    "numpy": "all commands", "huggingface_hub": "the Hub", "torch": "train, eval, run", "transformers": "train, eval, run",
    "tokenizers": "train, eval, run", "safetensors": "train, eval, run", "bitsandbytes": "train", "matplotlib": "pictures",
    "keyring": "logins", "obstore": "object stores", "pyarrow": "Parquet",
    "peft": "comparisons", "llama-cpp-py-sync": "run",
}  # fmt: skip
_LITTLE_SPACE = 1 << 30  # bytes of free space below which a transfer or a merge is likely to fail


@command(
    "info",
    example="""
    adapterhub info
    adapterhub info --json""",
)
@click.pass_obj
def info(settings: Settings) -> None:
    """Show which registry, project, remotes, logins, caches and packages are in use, and what is wrong with them.

    Contacts no server and shows no secret. Exits with 1 if there is a problem.
    """
    problems: list[str] = []
    document = {
        "adapterhub": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "registry": _registry(settings, problems),
        "settings": _settings_files(problems),
        "remotes": _remotes(problems),
        "logins": _logins(problems),
        "hub": _hub(problems),
        "cache": _folder(environment.cache_folder()),
        "packages": {name: _version(name) for name in _PACKAGES},
        "problems": problems,
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _write(document))
    if problems:
        raise SystemExit(1)


@contextmanager
def _collecting_problems(problems: list[str]) -> Iterator[None]:
    """Add an error in the block to the problems."""
    try:
        yield
    except AdapterhubError as error:
        reworded = errors.reword(error)
        text = output.one_line(str(reworded))
        if text not in problems:
            problems.append(text)


def _registry(settings: Settings, problems: list[str]) -> dict[str, Any]:
    document: dict[str, Any] = {"path": None, "chosen_by": None, "exists": False, "adapters": 0, "versions": 0}
    with _collecting_problems(problems):
        if shared := registry_choice.shared_hub(settings):
            # Not opened: that would ask the database.
            variables = (environment.DATABASE, environment.BLOBS)
            chosen_by = f"${environment.CONFIG}"
            if all(map(os.environ.get, variables)):
                chosen_by = " and ".join(f"${name}" for name in variables)
            return {"path": shared.location, "chosen_by": chosen_by, "exists": True, "adapters": None, "versions": None}
        path, document["chosen_by"] = registry_choice.chosen_registry(settings)
        document["path"] = str(path)
        document["exists"] = (path / "registry.db").exists() or (path / ".adapterhub").is_dir()
        if document["exists"]:
            with registry_choice.open_registry(settings) as registry:
                rows = registry.list()
            document |= {"adapters": len({row.name for row in rows}), "versions": len(rows)}
            document |= {**_folder(path / ".adapterhub"), "path": str(path), "writable": os.access(path, os.W_OK)}
            if not document["writable"]:
                problems.append(f"{path}: not writable; versions can be read, not pushed")
            if document["free"] is not None and document["free"] < _LITTLE_SPACE:
                problems.append(f"{path}: only {output.size(document['free'])} free on this disk")
    return document


def _settings_files(problems: list[str]) -> dict[str, Any]:
    document: dict[str, Any] = {"project": None, "policy": False, "lock": None, "user": None}
    from adapterhub.project.policy import Policy

    with _collecting_problems(problems):
        document["project"] = _or_null(project_file(Path.cwd()))  # shown even if it cannot be read
        if project := environment.project():
            # A policy without rules differs from an empty one only in the file that it comes from.
            document |= {"project": str(project.path), "policy": replace(project.policy, where="") != Policy("")}
            environment.validation(project)
    with _collecting_problems(problems):
        lock = environment.lock_file()
        document["lock"] = str(lock) if lock.is_file() else None
        if user_settings := environment.user():
            document["user"] = str(user_settings.path)
    return document


def _remotes(problems: list[str]) -> list[dict[str, Any]]:
    with _collecting_problems(problems):
        default, named_remotes = environment.default_remote(), environment.remotes()
        if default and default not in named_remotes:
            problems.append(f"{default}: the default remote, but no remote has this name; `adapterhub remote add` adds it")
        return [
            {"name": name, "url": remote.url, "settings": str(remote.path), "default": name == default}
            for name, remote in named_remotes.items()
        ]
    return []


def _logins(problems: list[str]) -> dict[str, Any]:
    from adapterhub.remotes.oci import docker_credentials

    path = environment.docker_config()
    document: dict[str, Any] = {"file": str(path), "hosts": []}
    with _collecting_problems(problems):
        document["hosts"] = docker_credentials.configured_hosts(path)
    return document


def _hub(problems: list[str]) -> dict[str, Any]:
    if environment.is_offline():
        return {"endpoint": None, "token": False, "offline": True}
    with _collecting_problems(problems):
        hub = environment.hub()
        return {"endpoint": hub.endpoint, "token": bool(hub.token), "offline": False}
    return {"endpoint": None, "token": False, "offline": False}


def _folder(path: Path) -> dict[str, Any]:
    """Return a folder with the bytes in it and the free bytes on its disk."""
    document: dict[str, Any] = {"path": str(path), "size": 0, "free": None}
    with suppress(OSError):
        for _, status in walk(path):
            document["size"] += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    with suppress(OSError):
        document["free"] = shutil.disk_usage(path).free
    return document


def _or_null(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(document: dict[str, Any]) -> None:
    registry, files, hub = document["registry"], document["settings"], document["hub"]
    cache, packages = document["cache"], document["packages"]
    is_counted = registry["adapters"] is not None
    contents = (
        f"{output.plural(registry['adapters'], 'adapter')}, {output.plural(registry['versions'], 'version')}"
        if is_counted
        else ""
    )
    token = "with a token" if hub["token"] else "without a token"
    lines = {
        "adapterhub": f"{document['adapterhub']}, Python {document['python']}",
        "registry": f"{registry['path']} ({registry['chosen_by']})" if registry["path"] else "unknown, for the problem below",
        "": f"{contents}, {_space(registry)}" if registry["exists"] else "not there yet; the first push creates it",
        "project": _or_none(files["project"], "has a policy" if files["policy"] else ""),
        "lock file": _or_none(files["lock"]),
        "your settings": _or_none(files["user"]),
        "remotes": "; ".join(_with_default(remote) for remote in document["remotes"]) or "none",
        "logins": f"{', '.join(document['logins']['hosts']) or 'none'} ({document['logins']['file']})",
        "Hub": "offline" if hub["offline"] else f"{hub['endpoint'] or 'unknown'}, {token}",
        "cache": f"{cache['path']}, {_space(cache)}",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "not installed": ", ".join(f"{name} ({_PACKAGES[name]})" for name, version in packages.items() if not version),
    }  # fmt: skip
    if not registry["path"] or not is_counted:
        del lines[""]
    output.write_pairs({key: value for key, value in lines.items() if value})
    for problem in document["problems"]:
        for line in output.wrap(f"problem: {problem}", output.width(), indent=2):
            output.write(line)


def _with_default(remote: dict[str, Any]) -> str:
    return f"{remote['name']} {remote['url']}{' (default)' if remote['default'] else ''}"


def _or_none(path: str | None, note: str = "") -> str:
    return f"{path}{f' ({note})' if note else ''}" if path else "none"


def _space(folder: dict[str, Any]) -> str:
    free = f", {output.size(folder['free'])} free" if folder.get("free") is not None else ""
    return f"{output.size(folder.get('size', 0))}{free}"
