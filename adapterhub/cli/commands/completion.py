"""`adapterhub completion`."""

from __future__ import annotations

import click

from adapterhub.cli.options import PROGRAM, Settings, app, command


@command(
    "completion",
    short="Print a shell's completion script.",
    example="""
    adapterhub completion bash > ~/.local/share/bash-completion/completions/adapterhub
    adapterhub completion zsh > "${fpath[1]}/_adapterhub"
    adapterhub completion fish > ~/.config/fish/completions/adapterhub.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_obj
def completion(settings: Settings, shell: str) -> None:
    """Print the script that makes a shell complete commands, options and refs."""
    from click.shell_completion import get_completion_class

    from adapterhub.cli import output

    found = get_completion_class(shell)
    if found is None:  # click dropped the shell
        raise click.UsageError(f"no completion for {shell}")
    script = found(app, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source()
    output.emit({"shell": shell, "script": script}, as_json=settings.as_json, text=lambda: output.write(script))
