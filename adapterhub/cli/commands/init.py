"""`adapterhub init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, output
from adapterhub.cli.environment import (
    named_registry,
    registry_folder,
)
from adapterhub.cli.options import Settings, command

if TYPE_CHECKING:
    pass


@command(
    "init",
    short="Make a registry.",
    example="""
    adapterhub init
    adapterhub init ~/adapters
    adapterhub init --project""",
)
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--project", is_flag=True, help="Write an adapterhub.toml with examples instead: remotes, rules of a project.")
@click.pass_obj
def init(settings: Settings, folder: str | None, *, project: bool) -> None:
    """Make a registry in a folder: registry.db and, beside it, the store .adapterhub/.

    Without DIR it is made where --registry, $ADAPTERHUB_REGISTRY or the project says, else here. One that is there already
    stays as it is.
    """
    from adapterhub.registry.registry import Registry

    if project:
        _project(settings, folder)
        return

    root = Path(folder) if folder else registry_folder(settings) if named_registry(settings) else Path()
    new = not (root / ".adapterhub" / "oci-layout").exists()
    Registry.init(root).close()
    text = f"{'made' if new else 'already there:'} {root / 'registry.db'}"
    output.emit({"registry": str(root), "created": new}, as_json=settings.as_json, text=lambda: output.write(text))


def _project(settings: Settings, folder: str | None) -> None:
    """What `init --project` does: an adapterhub.toml of examples; one that is there stays as it is."""
    from adapterhub import user_files
    from adapterhub.project.settings import TEMPLATE

    path = (Path(folder) if folder else Path.cwd()) / environment.PROJECT
    new = user_files.change(path, lambda text: None if text or path.exists() else TEMPLATE)
    text = f"{'made' if new else 'already there:'} {path}"
    output.emit({"project": str(path), "created": new}, as_json=settings.as_json, text=lambda: output.write(text))
