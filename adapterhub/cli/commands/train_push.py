"""`adapterhub train --push REF`: what was trained, pushed as `adapterhub push` does."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import click

from adapterhub.cli.options import Settings
from adapterhub_converters.errors import AdapterhubError

from . import rules


def check(ref: str) -> None:
    """Refuse what could not be pushed to, before hours go into it."""
    from adapterhub.ref import Ref, RefError
    from adapterhub.remotes.location import is_address, parse

    if is_address(ref):
        rules.allowed(parse(ref).repository)
        return
    target = Ref.parse(ref)
    if target.number or target.digest or target.range:
        raise RefError(ref, "a push allots the number itself", f"Push to {target.name}, or to {target.name}:TAG")
    rules.allowed(target.name)


def push(settings: Settings, folder: Path, ref: str) -> dict[str, Any]:
    """What `adapterhub push FOLDER REF --json` says; an error says that the folder is still there."""
    from .registry import push as command

    source = str(folder) if folder.is_absolute() else os.path.join(".", folder)  # never a ref of that name
    context = click.get_current_context()
    said = io.StringIO()
    asked = settings.as_json
    settings.as_json = True
    try:
        with contextlib.redirect_stdout(said):
            context.invoke(command, source=source, ref=ref)
    except AdapterhubError as error:
        again = f"The adapter is in {folder}; `adapterhub push {source} {ref}` tries again"
        error.hint = f"{error.hint}. {again}" if error.hint else again
        raise
    finally:
        settings.as_json = asked
    pushed: dict[str, Any] = json.loads(said.getvalue())
    return pushed
