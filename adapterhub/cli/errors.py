"""Errors in the words of the command line: the option for a parameter, the command that helps, the explanation of a code.

The library names parameters and codes; only this module writes flags and commands.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from adapterhub.operations.workspace import variable_for
from adapterhub_converters.errors import AdapterhubError, LocalIOError, ParameterError

from . import output

if TYPE_CHECKING:
    from adapterhub.maintenance.findings import Finding

# Commands that use no registry, or name it otherwise.
_WITHOUT_REGISTRY = {"completion", "explain", "help", "init", "key", "login", "logout"}
_PROGRAM = "adapterhub "  # how the commands between backticks begin that are ours
# Words of hints that each command means something else by: its user, its site, the name of a key.
_OTHER_MEANINGS = {"NAME", "URL"}
# Parameter to the option that sets it, if the two differ in more than dashes.
OPTIONS = {
    "budget": "--rank-budget",
    "conversion": "--to",
    "passphrase": "--passphrase-stdin",
    "runtimes": "--for",
}
# Code of an error, or remedy of a finding, to hint; `{name}` is a field of the error.
HINTS: dict[str, str] = {
    "adapter-lost": "Merge into 16 bits (--dtype bf16), or into the full-precision model; --force writes it anyway",
    "adapter-lost-in-nf4": "Merge into 16 bits (--dequantize in place of --requantize), or into the full-precision model; --force writes it anyway",
    "add-base": "Add it again: `adapterhub base add {name} BASE --force`",
    "address-with-remote": "Leave out --remote, or write a ref",
    "alpha-or-rslora-required": "Pass --alpha N, and --rslora if it was trained with it",
    "alpha-recorded": "Leave out --alpha and --rslora",
    "alpha-required": "Pass --alpha N, the alpha it was trained with",
    "as-trained": "Leave out --onto as-trained",
    "attested-base": "Pass it as --base",
    "base-required": "Pass --base with its folder, its GGUF file, or hf://org/model",
    "base-name-taken": "Choose another name, or replace it with --force",
    "broken-index": "`adapterhub fsck --rebuild-index` rebuilds it from .adapterhub, keeping this one as registry.db.old",
    "bundled-embeddings": "--allow-drop embeddings leaves them out",
    "check-failed": "`adapterhub validate {adapter}` shows all of them; `adapterhub push {adapter} REF --force` stores it all the same",
    "check-failed-for-good": "`adapterhub validate {adapter}` shows all of them",
    "check-failed-for-good-on-base": "`adapterhub validate {adapter} --base {base}` shows all of them",
    "check-failed-on-base": "`adapterhub validate {adapter} --base {base}` shows all of them; `adapterhub push {adapter} REF --force` stores it all the same",
    "check-failed-to-convert": "`adapterhub validate {adapter}` shows all of them; --force converts it all the same",
    "check-failed-to-convert-on-base": "`adapterhub validate {adapter} --base {base}` shows all of them; --force converts it all the same",
    "check-registry": "Run `adapterhub fsck`",
    "collect-garbage": "`adapterhub gc` removes what is old enough",
    "unnamed-version": "Ask for the version by its digest, or accept the name with --trust-name",
    "command-not-allowed": "Pass --command '{name}=PROGRAM ARGUMENT …' if you trust the program",
    "config-key": "`adapterhub train --explain` lists them",
    "convert-to-peft": "Convert it with `adapterhub convert SRC DST --to peft`",
    "convert-there": "Copy it first: `adapterhub copy {address} NAMESPACE/NAME`",
    "cors-needs-keys": "Name the sites, or a file with [keys] as --route",
    "credentials-in-address": "Remove them; use `adapterhub login {host}`",
    "delete-and-rebuild": "Delete that file, then run `adapterhub fsck --rebuild-index`",
    "expect-unsupported": "Leave out --expect",
    "gateway-needs-keys": "Name a file with [keys] as --route",
    "gguf-type-for-folder": "Merge into a .gguf, or choose --requantize nf4 or --dtype",
    "has-children": "--force removes it all the same",
    "hub-needs-login": "Add --require-login",
    "keys-required": "Pass --key or --identity, or set policy.signers in adapterhub.toml",
    "image-here": "Name one like layout://x.tar:v1",
    "image-repacked": "Copy it with `skopeo copy --preserve-digests`, or copy the adapter that it contains",
    "link-in-project": "Remove it, or name the folder to write to: `adapterhub pull --locked -o FOLDER`",
    "linked-store": "Remove it, or name the folder that has the store with --registry",
    "local-only": "Copy it here first: `adapterhub copy {address} NAMESPACE/NAME`",
    "no-gguf-architecture": "`adapterhub merge SRC --into BASE -o OUT` works for every architecture; `adapterhub convert --list --verbose` lists those of GGUF",
    "no-device-login": "Pass a token with --token-stdin",
    "login-required": "Log in with `adapterhub login {host}`",
    "misplaced": "Run `adapterhub fsck`",
    "look-at-log": "Run `adapterhub log {ref}`",
    "loss-not-allowed": "{options} would help",
    "name-of-base-and-adapter": "Pass another one as --base-name",
    "newer-index": "Upgrade adapterhub. Or `adapterhub fsck --rebuild-index` rebuilds it, keeping this one as registry.db.old",
    "no-lock-file": "Run `adapterhub lock REF…`",
    "no-registry": "Push the first adapter, which makes it, or name another with --registry; `adapterhub init {folder}` makes an empty one",
    "no-such-answer": "Look at another record with --usage-file",
    "no-rollout": "Name a candidate in the file of routes, and serve it",
    "no-kept-checkpoint": "Leave out --steps to repeat all of it; train with [train] keep_every to keep some",
    "checkpoint-elsewhere": "Name the folder that has it with --checkpoints",
    "no-such-part": "Pass one of these as --steps",
    "no-such-account": "`adapterhub hub user list` shows the accounts and their roles; --registry names another hub",
    "no-such-adapter": "Run `adapterhub list`",
    "no-such-base": "`adapterhub base list` shows the names of bases",
    "no-such-number": "`adapterhub hub {kind} list` shows the numbers; --registry names another hub",
    "no-such-recipe": "Run `adapterhub rebuild --list`",
    "no-such-tag": "Run `adapterhub list {repository}` for its tags",
    "no-usage": "`adapterhub serve` records it beside its registry: name that with --registry, or the file with --usage-file",
    "no-such-version": "Run `adapterhub list {name}`",
    "other-base": "Pass the right one as --base",
    "other-base-shapes": "`adapterhub validate {adapter} --base {base}` lists the differences",
    "other-data": "Pass that file too, with --data",
    "output-exists": "Name another, or replace it with --replace",
    "no-time": "Pass --created 2026-11-26T00:00:00Z",
    "passphrase-required": "Run it on a terminal, or pipe the passphrase in with --passphrase-stdin",
    "peft-type-missing": "`adapterhub fix {adapter}` adds a missing peft_type",
    "pickle": "Save the adapter again with safe_serialization=True, or convert it with --unsafe-pickle",
    "nothing-to-attest": "Pass --fits BASE, --merge, --training, --scan or --bill",
    "not-stored": "Push it first: `adapterhub push {path} {name}`; `adapterhub run {path} Hello` tries it without",
    "not-locked": "Run `adapterhub lock {ref}`",
    "other-builder": "Sign when it trains, with `adapterhub train CONFIG --push NAMESPACE/NAME --key PEM`, or leave out --builder",
    "other-recorder": "Name what trained it with --builder",
    "protected": "Run `adapterhub tag {ref} --unprotect` first",
    "public-needs-tls": "Pass --certificate and --key, or put a proxy with TLS in front and pass --behind-proxy; or bind 127.0.0.1",
    "quantized-base": "Merge into the full-precision model, or add --dequantize for a model in floats",
    "rebuild-index": "Run `adapterhub fsck --rebuild-index`",
    "recipe-adapter-missing": "Push or pull it here first, or pass it with --adapter",
    "recipe-adapter-moved": "Pass the right one with --adapter",
    "recipe-base-elsewhere": "Pass its path with --base",
    "recipe-base-required": "Pass it as --base",
    "recipe-name-taken": "Choose another name, or remove that recipe: `adapterhub rebuild --remove {name}`",
    "ref-as-remote": "Use A-Z a-z 0-9 _ -; a ref comes before --remote",
    "removed": "`adapterhub restore {name}` brings it back, unless gc has removed its data",
    "removed-name": "`adapterhub restore {name}` first, or choose another name",
    "repository-of-hub": "Rename it at the hub: `adapterhub mv OLD NEW --remote`",
    "requirements-unmet": "`adapterhub promote {ref} {tag} --dry-run` shows each requirement with its evidence",
    "keys-to-approve": "Pass --key or --keyless, or approve it on a hub where you are logged in, with --remote",
    "signed-version": "Pass --key with the key that signed it, or ask an admin",
    "withdrawn-by-another": "Ask who withdrew it, or an admin",
    "reason-required": "Pass -m REASON",
    "latest-tag": "Choose another tag; it moves back if `adapterhub withdraw {name}:VERSION -m REASON` takes each later version out of use",
    "version-stays": "`adapterhub withdraw {ref} -m REASON` takes it out of every use; or remove the name {name}, or a tag",
    "withdrawn": "Use another version: `adapterhub list {name}`",
    "repair": "Run `adapterhub fsck --repair --from SRC`, where SRC is another registry or the adapter's folder, or delete that file and push the same files again",
    "repair-missing": "Run `adapterhub fsck --repair --from SRC`, where SRC is another registry or the adapter's folder, or push the same files again",
    "rows-not-whole-blocks": "Choose --dtype f16",
    "several-models": "Convert one model at a time: --allow-drop '{drop}'",
    "source-damaged": "Nothing was stored; if it comes from the local registry, run `adapterhub fsck`",
    "store-of-registry": "Name an adapter in that registry, like team/sql, and the registry with --registry",
    "signature-missing": "Ask its owner to sign it, or copy it from where it is signed with `adapterhub copy FROM REF`",
    "signature-name": "Pass --signed-as {name} if you accept it under this name",
    "sum-too-large": "Write bfloat16 instead (--dtype bf16)",
    "t-for-weights": "Pass --set t=T instead",
    "token-without-tls": "Write hub+https://, or set HF_ENDPOINT to an https address; for no token, unset HF_TOKEN and set HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
    "torchtune-export": "Convert the adapter_model.pt next to it, with --unsafe-pickle and --base",
    "training-memory": "{change}. --dry-run shows the memory plan, --force starts anyway",
    "training-stopped": "Run the same command to resume",
    "unknown-folder": "Allow it with ADAPTERHUB_ALLOW_HOSTS={owner}, or name it with an option",
    "unknown-host": "Allow it with ADAPTERHUB_ALLOW_HOSTS={owner}, or with a remote of your own: `adapterhub remote add NAME URL`",
    "two-types": "Pass either --dtype or --requantize",
    "trained": "Pass its base with --base and each file of its data with --data, to train it again from its record",
    "type-not-writable": "Choose a type for such tensors: --requantize {types} or --dtype bf16|f16|f32",
    "unknown-method": "`adapterhub merge --explain` lists them",
}


# Hints for errors of another registry, whose address is a field.
_HINTS_ELSEWHERE = {"no-such-adapter": "Run `adapterhub list {registry}`"}
# Code of an error to a field that only some have, and to the hint with it.
_HINTS_WITH_FIELD = {
    "base-not-here": ("recorded", "Pass --base FOLDER, or --base {recorded}, which downloads it from the Hub"),
    "base-required": ("recorded", "Pass --base FOLDER, or --base {recorded}, which the adapter records"),
}
# Code of an error to an option, and to the hint for a command line that has it.
_HINTS_WITH_OPTION = {
    "not-stored": (
        "base",
        "Push it first: `adapterhub push {path} {name}`; `adapterhub run {path} Hello --base BASE` tries it without",
    ),
}
# Code of an error to the option in its hint, and to the hint for commands without that option.
_HINTS_WITHOUT_OPTION = {
    "bundled-embeddings": ("allow_drop", "`adapterhub convert SRC DST --to peft --allow-drop embeddings` leaves them out"),
    "alpha-or-rslora-required": ("alpha", "Restore adapter_config.json, or make one: `adapterhub fix SRC --alpha N`"),
}


def hint_of(finding: Finding) -> str:
    """Return the hint of a finding, with the command that helps."""
    return _filled(HINTS.get(finding.remedy, ""), finding.fields) or finding.hint


def _filled(template: str, fields: Mapping[str, object], context: click.Context | None = None) -> str:
    """Return a hint with its fields; empty if one is missing, as from another machine, which did not send it.

    Texts of strangers are among the fields and the arguments: each is filled in once, as one word of a shell where a command or
    an option is copied into one, and never searched for backticks, braces or further words.
    """
    texts = _with_flags(fields)
    words = {name: shlex.quote(str(text)) for name, text in texts.items()}
    user_words = _words_of_user(context, fields) if context else {}

    def command_line(part: str) -> str:
        line = " ".join(user_words[word] if word in user_words else word.format_map(words) for word in part.split(" "))
        return _at_same_place(context, line) if context else line

    def sentence(part: str) -> str:
        text_words = part.split(" ")
        follows_option = [False, *(word.startswith("--") for word in text_words)]
        pairs = zip(text_words, follows_option, strict=False)
        return " ".join(word.format_map(words if is_value else texts) for word, is_value in pairs)

    parts = template.split("`")
    try:
        return "`".join(command_line(part) if part.startswith(_PROGRAM) else sentence(part) for part in parts)
    except KeyError:
        return ""


def _completed(hint: str, context: click.Context) -> str:
    """Return a hint of the library, with what the user has given in its commands; unchanged if it quotes a text."""
    parts, user_words = hint.split("`"), _words_of_user(context, {})
    if "'" in hint:
        return hint
    for number, line in enumerate(parts):
        if number % 2 and line.startswith(_PROGRAM):
            parts[number] = _at_same_place(context, " ".join(user_words.get(word, word) for word in line.split(" ")))
    return "`".join(parts)


# Options of `formats.lossy.ReducedAdapter`.
_LOSSES = {"approx": "--allow-approx", "weights": "--base with a Hugging Face folder that has the weights"}


def _with_flags(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of an error; `options` that would allow a conversion become a list of flags."""
    options = fields.get("options")
    if not isinstance(options, tuple):
        return dict(fields)
    words = [_LOSSES.get(word, word.replace("drop", "--allow-drop", 1)) for word in options]
    return {**fields, "options": " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)}


def reword(error: AdapterhubError) -> AdapterhubError:
    """Replace the parameter of an error by its option, and its hint by that of its code; return the error.

    The error itself changes, once, while the command that raised it is known: nothing but its report reads it after that.
    """
    if not error.worded:
        context = click.get_current_context(silent=True)
        parameters = context.command.params if context else []
        if isinstance(error, ParameterError) and error.where == error.parameter:
            error.where = _option(error.parameter, {flag for parameter in parameters for flag in parameter.opts})
        error.hint = _hint(error, {parameter.name for parameter in parameters}, context)
        error.worded = True
    return error


def _words_of_user(context: click.Context, fields: Mapping[str, object]) -> dict[str, str]:
    """Return what the user has given for words in capitals of hints, by the word, quoted for a shell.

    Only arguments, and options that are named like their word, mean the same in another command: the URL of a database is not
    that of a remote. A value that is a field as well, like the name of a base, has its place already.
    """
    values: dict[str, str] = {}
    for parameter in context.command.params:
        value, word = context.params.get(parameter.name or ""), parameter.make_metavar(context).strip("[].…")
        items = value if isinstance(value, tuple) else (value,)
        is_same = (isinstance(parameter, click.Argument) or parameter.name == word.lower()) and word not in _OTHER_MEANINGS
        if is_same and len(items) == 1 and isinstance(items[0], str) and items[0] and items[0] not in fields.values():
            values.setdefault(word, shlex.quote(items[0]))
    return values


def _at_same_place(context: click.Context, line: str) -> str:
    """Return a command of a hint with the remote and the registry that the user has named, if it is about them."""
    return _at_remote(context, line) + (registry_words(context) if _is_about_registry(line) else "")


def registry_words(context: click.Context | None = None) -> str:
    """Return --registry as this command line was given it, after a blank, for a command that a message shows; else empty.

    A variable or a file of the project means the same registry where the command is pasted.
    """
    context = context or click.get_current_context(silent=True)
    while context and context.get_parameter_source("registry") is not ParameterSource.COMMANDLINE:
        context = context.parent
    return f" --registry {shlex.quote(context.find_root().obj.registry)}" if context else ""


def _is_about_registry(line: str) -> bool:
    """Return whether the command of a line means something else in another registry."""
    command, *words = line.removeprefix(_PROGRAM).split()
    operands = [word for word in words if not word.startswith("-")]
    is_elsewhere = bool(operands) and all("://" in word for word in operands)
    return not (command in _WITHOUT_REGISTRY or is_elsewhere or {"--help", "--registry", "--explain"} & {*words})


def _at_remote(context: click.Context, line: str) -> str:
    """Return a command of a hint with the remote that the user has named, if it takes one."""
    remote = context.params.get("remote")
    if remote is None or "://" in line or " --remote" in line or not _takes_remote(context, line):
        return line
    return f"{line} --remote {shlex.quote(remote) if remote else ''}".rstrip()


def _takes_remote(context: click.Context, line: str) -> bool:
    """Return whether the command of a line has the option --remote."""
    group = context.find_root().command
    command = group.get_command(context, line.split()[1]) if isinstance(group, click.Group) else None
    return command is not None and any(parameter.name == "remote" for parameter in command.params)


def _option(parameter: str, flags: Set[str]) -> str:
    """Return the option for a parameter; --set if the command, with these `flags`, has none of its own for it."""
    flag = OPTIONS.get(parameter, f"--{parameter.replace('_', '-')}")
    return f"--set {parameter}" if "--set" in flags and flag not in flags else flag


def _hint(error: AdapterhubError, parameters: Set[str | None], context: click.Context | None = None) -> str:
    """Return the hint of an error of a command with these parameters; none if the command is not known."""
    own_hint = _completed(error.hint, context) if context else error.hint
    option, alternative = _HINTS_WITHOUT_OPTION.get(error.code, ("", ""))
    if option and parameters and option not in parameters:
        return _filled(alternative, error.fields, context)
    option, better_hint = _HINTS_WITH_OPTION.get(error.code, ("", ""))
    if context and context.params.get(option):
        return _filled(better_hint, error.fields, context)
    field, better_hint = _HINTS_WITH_FIELD.get(error.code, ("", ""))
    if field in error.fields:
        return _filled(better_hint, error.fields, context)
    if error.code == "no-such-adapter" and not error.fields and Path(error.where).exists():
        from adapterhub.operations import source_names  # which few commands need

        fields = source_names.not_stored_error(error.where).fields
        return f"It is a path here. {_filled(HINTS['not-stored'], fields, context)}"
    # A similar name is the better hint.
    if error.code not in HINTS or "meant" in error.fields:
        return own_hint or _hint_for_folder(error)
    elsewhere = _HINTS_ELSEWHERE if "registry" in error.fields else {}
    hint = _filled(elsewhere.get(error.code, HINTS[error.code]), error.fields, context) or own_hint
    return hint + (_hub_hint(context) if context and error.code == "no-registry" else "")


def _hub_hint(context: click.Context) -> str:
    """Return where an adapter is that a newcomer without a registry may have meant: on the Hugging Face Hub."""
    from adapterhub.ref import hub_address

    arguments = [parameter.name for parameter in context.command.params if isinstance(parameter, click.Argument)]
    texts = [text for name in arguments if isinstance(text := context.params.get(name or ""), str)]
    address = hub_address(texts[0]) if texts and not Path(texts[0]).parent.exists() else ""
    return f"; {address} means one on the Hub" if address else ""


def _hint_for_folder(error: AdapterhubError) -> str:
    """Return how to move the user's folder of adapterhub that cannot be used, as in a container with a read-only home."""
    variable = variable_for(Path(error.where), os.environ) if isinstance(error, LocalIOError) else ""
    return f"Set {variable} to a folder where you can write" if variable else ""


# Limits of what a stranger's adapter can print on a terminal.
_MAX_LINE, _MAX_LINES = 2000, 50


def error_lines(error: AdapterhubError) -> list[str]:
    """Return the lines to print for an error: its problems, or the error itself, with the whole hint at the end.

    Names from others are in them, and lists of such names; others choose their number and length, so both are limited.
    """
    problem_lines = [_shorten(problem) for problem in error.problems[:_MAX_LINES]]
    if len(error.problems) > _MAX_LINES:
        problem_lines.append(f"{len(error.problems) - _MAX_LINES:,} more problems")
    hint = f". {_shorten(error.hint)}" if error.hint else ""
    return problem_lines or [_shorten(str(error).removesuffix(f". {error.hint}")) + hint]


def _shorten(text: str) -> str:
    surplus = len(text) - _MAX_LINE
    return f"{text[:_MAX_LINE]} … and {surplus:,} characters more" if surplus > 0 else text


def add_hint(error: AdapterhubError, addition: str, *, separator: str = ". ") -> None:
    """Append to the hint of an error, in the words of the command line."""
    reword(error)
    separator = " " if error.hint.endswith("?") else separator
    error.hint = f"{error.hint}{separator}{addition}" if error.hint else addition


def say(error: AdapterhubError, *, about: str = "") -> None:
    """Print an error to stderr, with a line for each of its problems, and its code as the last word of the first line.

    The code is one that `adapterhub explain` knows: the code of the class replaces one of another server.
    """
    from .explanations import ERRORS, FINDINGS  # long texts, which only an error or `explain` needs

    code = error.code if error.code in ERRORS or error.code in FINDINGS else error.default_code
    for number, line in enumerate(error_lines(reword(error))):
        output.say(output.one_line(f"error: {about}{line}"), aside=f"[{code}]" if not number else "")
