"""`adapterhub completion`."""

from __future__ import annotations

import click

from adapterhub.cli.options import Settings, command


@command(
    "completion",
    example="""
    adapterhub completion bash > ~/.local/share/bash-completion/completions/adapterhub
    adapterhub completion zsh > "${fpath[1]}/_adapterhub"
    adapterhub completion fish > ~/.config/fish/completions/adapterhub.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that makes a shell complete commands, options and refs."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    from adapterhub.cli import output

    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    program = context.find_root()
    name, settings = str(program.info_name), context.ensure_object(Settings)
    script = kind(program.command, {}, name, f"_{name.upper()}_COMPLETE").source()
    output.emit({"shell": shell, "script": script}, as_json=settings.as_json, text=lambda: output.write_document(script))
