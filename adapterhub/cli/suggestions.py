"""Corrections of a command line: the command or the option that a mistyped or foreign word probably means."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click

from adapterhub_converters.errors import UsageError

# Words that people type, from git, docker, hf and npm too, to the command that they mean, with its options.
SYNONYMS = {
    "add": "push", "check": "validate", "config": "info", "cp": "copy", "delete": "rm", "doctor": "info", "download": "pull",
    "env": "info", "export": "bundle", "get": "pull", "history": "log", "inspect": "show", "lint": "validate", "ls": "list",
    "put": "push", "quantize": "convert", "remove": "rm", "repair": "fix", "undelete": "restore", "undo": "restore",
    "upload": "push", "version": "--version", "ask": "run", "talk": "chat", "clean": "gc", "clone": "pull", "evaluate": "eval",
    "fetch": "pull", "finetune": "train", "fuse": "merge", "generate": "run", "install": "pull", "prune": "gc",
    "publish": "push", "save": "push", "status": "info", "sync": "pull", "test": "validate",
    "uninstall": "rm", "whoami": "info", "models": "list", "attached": "attach --list", "find": "search --file",
    "formats": "convert --list", "materialize": "rebuild", "unpack": "pack --undo", "checkout": "pull", "commit": "push",
    "branch": "tag", "revert": "rollback", "stash": "push", "blame": "lineage", "reflog": "log", "grep": "search",
    "images": "list", "image": "list", "ps": "list", "rmi": "rm", "start": "serve", "up": "serve", "build": "train",
    "logs": "log", "load": "pull", "exec": "run", "tags": "tag", "auth": "login", "cache": "du", "repo": "list",
    "repos": "list", "scan-cache": "du", "i": "pull", "ci": "pull --locked", "update": "lock --update",
    "upgrade": "lock --update", "outdated": "lock --check", "view": "show", "dist-tag": "tag", "unpublish": "withdraw",
    "yank": "withdraw", "keygen": "key generate",
    "rename": "mv", "move": "mv", "shrinkwrap": "lock", "sbom": "bom", "licenses": "bom",
}  # fmt: skip
# The same for a word in a group of commands.
GROUP_SYNONYMS = {
    "hub": {"restore": "load-backup", "audit": "log", "serve": "start", "run": "start", "up": "start"},
    "key": {"new": "generate", "create": "generate", "make": "generate"},
}


def refuse_unknown(context: click.Context, typed: str, names: Sequence[str]) -> None:
    """Raise UsageError for a word that names no command, with the command that was probably meant."""
    if typed in names or typed.startswith("-"):
        return
    import difflib

    commands = {name: name for name in names}
    targets = [*names, *(() if context.parent else ["--version"])]
    commands |= {word: target for word, target in SYNONYMS.items() if target.split()[0] in targets}
    commands |= GROUP_SYNONYMS.get(str(context.info_name), {}) if context.parent else {}
    close = difflib.get_close_matches(typed.lower(), commands, 1, cutoff=0.7)
    hint = f"Did you mean `{context.command_path} {commands[close[0]]}`?" if close else f"See `{context.command_path} --help`"
    raise UsageError(typed[:80], "no such command", hint)


# Options of other programs to those of ours.
_OPTION_SYNONYMS = {
    "--format": "--to", "--out": "--output", "--outfile": "--output", "--output-dir": "--output", "--outtype": "--dtype",
    "--lora": "--adapter", "--base-model": "--base", "--base-model-id": "--base", "--overwrite": "--replace",
    "--plan": "--dry-run", "--lora-modules": "--adapter", "--silent": "--quiet", "--max-new-tokens": "--max-tokens",
}  # fmt: skip


def near_options(typed: str, command: click.Command) -> list[str]:
    """Return the options of a command that a misspelled or foreign option may mean, the nearest first."""
    import difflib

    flags = {flag for parameter in command.params if not getattr(parameter, "hidden", False) for flag in parameter.opts}
    if typed in _OPTION_SYNONYMS and _OPTION_SYNONYMS[typed] in flags:
        return [_OPTION_SYNONYMS[typed]]
    words = {flag: flag for flag in flags if flag.startswith("--")}
    words |= {word: flag for word, flag in _OPTION_SYNONYMS.items() if flag in flags and word not in flags}
    return list(dict.fromkeys(words[word] for word in difflib.get_close_matches(typed, words, cutoff=0.7)))[:2]


class SwappedOption(click.Option):
    """A hidden option for a mistake: `BASE --adapter SRC` is refused with a hint at `SRC --base BASE`."""

    def refuse(self, context: click.Context, words: Sequence[str]) -> None:
        """Raise UsageError if the option is among the words of a command line."""
        adapters: tuple[str, ...] = context.params.pop(str(self.name), ())
        if not adapters:
            return
        first = next(param for param in context.command.params if isinstance(param, click.Argument))
        sources = context.params.get(str(first.name))
        argument = str(sources[0] if isinstance(sources, tuple) and sources else sources or "BASE")
        # The words without this option and its value, then with the adapters as the argument in place of the base.
        corrected, option = [*words], ""
        while position := next((at for at, word in enumerate(corrected, 1) if word.partition("=")[0] in self.opts), 0):
            word = corrected[position - 1]
            option = option or word.partition("=")[0]
            del corrected[position - 1 : position if "=" in word else position + 1]
        position = corrected.index(argument) if argument in corrected else len(corrected)
        if context.params.get("base") is None:
            corrected[position : position + 1] = [*adapters, "--base", argument]
        else:
            corrected[position:position] = adapters
        hint = f"Did you mean `{context.command_path} {shlex.join(corrected)}`?"
        raise UsageError(option, f"is no option of `{context.command_path}`", hint)
