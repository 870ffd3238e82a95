"""Errors in the words of the command line: the option behind a parameter, the command that helps.

The library names parameters and codes; flags and commands are written here alone.
"""

from __future__ import annotations

from adapterhub_converters.errors import AdapterhubError, ParameterError

# Parameter to the option that sets it, where the two differ in more than dashes.
OPTIONS = {
    "conversion": "--to",
    "runtimes": "--for",
}
# Code to hint; `{name}` is a field of the error.
HINTS: dict[str, str] = {
    "alpha-required": "Pass --alpha N, and --rslora if it was trained with rsLoRA",
    "base-required": "Pass --base BASE",
    "convert-to-peft": "Convert it with `adapterhub convert --to peft`",
}


def in_words_of_the_command_line(error: AdapterhubError | None) -> AdapterhubError | None:
    """The same error with options for parameters, and the hint of its code."""
    if error is None:
        return None
    if isinstance(error, ParameterError):
        error.where = OPTIONS.get(error.parameter, f"--{error.parameter.replace('_', '-')}")
    if error.code in HINTS:
        error.hint = HINTS[error.code].format_map(error.fields)
    return error
