"""`adapterhub init`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command, project_option
from adapterhub.cli.registry_choice import named_registry, registry_folder
from adapterhub.project import PROJECT

_TEMPLATE = """\
# Settings of this project for adapterhub. Options and environment variables override them; they override a user's own
# config.toml. Lines with a # are examples.

# registry = "."                  # a folder, or the registry.db in it, relative to this file
# remote = "team"                 # the remote that --remote means without a name

# [remotes.team]
# url = "oci://registry.example/adapters"

# [policy]                        # applies to what is pushed and pulled (exit 6)
# allow = ["team/*"]              # names
# max_rank = 64
# require_base = true             # the base must be pinned, as `push --base` does
# require_understood = true       # no kind of adapter that is not known here
# licenses = ["Apache-2.0", "MIT"]
# formats = ["peft", "gguf"]
# max_size = 200_000_000          # bytes

# [policy.metrics]
# eval_perplexity = { max = 12 }

# [promote.prod]                  # what a version needs before prod moves to it
# from = "staging"                # a tag that it has had

# [promote.prod.require]
# approvals = 2                   # people, by the keys of `approvers` or their accounts of a hub
# approvers = ["keys/bo.pub", "keys/cy.pub"]
# scan = "clean"

# [validate]                      # defaults of `adapterhub validate`
# base = "models/Qwen3-0.6B"      # relative to this file; or an address, or a name
# runtimes = ["vllm"]             # that must apply each adapter
# ignore = ["left-out"]           # codes of problems
# max_rank = 64
# strict = true                   # warnings fail too
"""


@command(
    "init",
    example="""
    adapterhub init
    adapterhub init ~/adapters
    adapterhub init --project""",
)
@click.argument("folder", metavar="[DIR]", required=False)
@project_option
@click.pass_obj
def init(settings: Settings, folder: str | None, *, project: bool) -> None:
    """Create a registry in a folder: registry.db and the store .adapterhub/.

    Without DIR the registry goes where --registry, $ADAPTERHUB_REGISTRY or the project points, else into this folder. An
    existing registry is left as it is. --project writes a commented adapterhub.toml instead: remotes and rules of a project.
    """
    from adapterhub.registry.registry import Registry

    if project:
        _project(settings, folder)
        return

    root = Path(folder) if folder else registry_folder(settings) if named_registry(settings) else Path()
    is_new = not (root / ".adapterhub" / "oci-layout").exists()
    Registry.init(root).close()
    text = f"{'created' if is_new else 'already there:'} {root / 'registry.db'}"
    output.emit({"registry": str(root), "created": is_new}, as_json=settings.as_json, text=lambda: output.write(text))


def _project(settings: Settings, folder: str | None) -> None:
    """Write a commented adapterhub.toml; leave an existing one as it is."""
    from adapterhub import user_files

    path = (Path(folder) if folder else Path.cwd()) / PROJECT
    is_new = user_files.change(path, lambda text: None if text or path.exists() else _TEMPLATE, follow=False)
    text = f"{'created' if is_new else 'already there:'} {path}"
    output.emit({"project": str(path), "created": is_new}, as_json=settings.as_json, text=lambda: output.write(text))
