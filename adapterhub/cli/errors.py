"""Errors in the words of the command line: the option behind a parameter, the command that helps.

The library names parameters and codes; flags and commands are written here alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, ParameterError

if TYPE_CHECKING:
    from adapterhub.maintenance.fsck import Finding

# Parameter to the option that sets it, where the two differ in more than dashes.
OPTIONS = {
    "budget": "--rank-budget",
    "conversion": "--to",
    "runtimes": "--for",
}
# Code of an error, or remedy of a finding, to hint; `{name}` is a field of the error.
HINTS: dict[str, str] = {
    "adapter-lost": "Merge into 16 bits (--dtype bf16), or into the full-precision model; --force writes it anyway",
    "adapter-lost-in-nf4": "Merge into 16 bits (--dequantize in place of --requantize), or into the full-precision model; --force writes it anyway",
    "add-base": "Add it again: `adapterhub base add NAME … --force`",
    "alpha-required": "Pass --alpha N, and --rslora if it was trained with rsLoRA",
    "as-trained": "Leave out --onto as-trained",
    "base-required": "Pass --base BASE",
    "base-name-taken": "Choose another name, or replace it with --force",
    "broken-index": "`adapterhub fsck --rebuild-index` rebuilds it from .adapterhub, keeping this one as registry.db.old",
    "check-registry": "Run `adapterhub fsck`",
    "collect-garbage": "`adapterhub gc` removes what is old enough",
    "config-key": "`adapterhub train --explain` lists them",
    "convert-to-peft": "Convert it with `adapterhub convert --to peft`",
    "delete-and-rebuild": "Delete that file, then run `adapterhub fsck --rebuild-index`",
    "gguf-type-for-folder": "Merge into a .gguf, or choose --requantize nf4 or --dtype",
    "has-children": "--force removes it all the same",
    "look-at-log": "Run `adapterhub log {ref}`",
    "newer-index": "Upgrade adapterhub. Or `adapterhub fsck --rebuild-index` rebuilds it, keeping this one as registry.db.old",
    "no-registry": "Run `adapterhub init`",
    "no-such-adapter": "Run `adapterhub list`",
    "no-such-base": "Run `adapterhub base list`",
    "no-such-recipe": "Run `adapterhub materialize --list`",
    "no-such-version": "Run `adapterhub list {name}`",
    "other-base": "Pass the right one as --base",
    "other-base-shapes": "`adapterhub validate {adapter} --base {base}` lists the differences",
    "protected": "Run `adapterhub tag {ref} --unprotect` first",
    "quantized-base": "Merge into the full-precision model, or add --dequantize for a model in floats",
    "rebuild-index": "Run `adapterhub fsck --rebuild-index`",
    "recipe-base-required": "Pass it as --base",
    "recipe-name-taken": "Choose another name, or remove that recipe: `adapterhub materialize --forget {name}`",
    "repair": "Run `adapterhub fsck --repair --from` another registry or the adapter's folder, or delete that file and push the same files again",
    "repair-missing": "Run `adapterhub fsck --repair --from` another registry or the adapter's folder, or push the same files again",
    "rows-not-whole-blocks": "Choose --dtype f16",
    "sum-too-large": "Write bfloat16 instead (--dtype bf16)",
    "t-for-weights": "Pass --t instead",
    "training-memory": "{change}. --plan shows what needs how much memory, --force starts anyway",
    "training-stopped": "Run the same command to resume",
    "two-types": "Pass either --dtype or --requantize",
    "type-not-writable": "Choose a type for such tensors: --requantize {types} or --dtype bf16|f16|f32",
    "unknown-method": "Run `adapterhub merge --method list` for all methods",
}


def hint_of(finding: Finding) -> str:
    """Return the hint of a finding, with the command that helps."""
    return HINTS.get(finding.remedy, finding.hint)


def in_words_of_the_command_line(error: AdapterhubError | None) -> AdapterhubError | None:
    """The same error with options for parameters, and the hint of its code."""
    if error is None:
        return None
    if isinstance(error, ParameterError):
        error.where = OPTIONS.get(error.parameter, f"--{error.parameter.replace('_', '-')}")
    if error.code in HINTS:
        error.hint = HINTS[error.code].format_map(error.fields)
    return error
