"""Errors in the words of the command line: the option behind a parameter, the command that helps.

The library names parameters and codes; flags and commands are written here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapterhub_converters.errors import AdapterhubError, ParameterError


def _options_that_help(fields: Mapping[str, object]) -> str:
    """`--allow-drop biases and --allow-approx would help`, of the `options` of `formats.lossy.Reduced`."""
    known = {"approx": "--allow-approx", "weights": "--base with a Hugging Face folder that has the weights"}
    options = fields["options"]
    words = [known.get(word, word.replace("drop", "--allow-drop", 1)) for word in options] if isinstance(options, tuple) else []
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) + " would help"


# Parameter to the option that sets it, where the two differ in more than dashes.
OPTIONS = {
    "conversion": "--to",
    "runtimes": "--for",
}
# Code to hint, or to a function of the error's fields; `{name}` is a field.
HINTS: dict[str, str | Callable[[Mapping[str, object]], str]] = {
    "alpha-or-rslora-required": "Pass --alpha N, and --rslora if it was trained with it",
    "alpha-recorded": "Leave out --alpha and --rslora",
    "alpha-required": "Pass --alpha N, the alpha it was trained with",
    "base-required": "Pass --base BASE",
    "loss-not-allowed": _options_that_help,
    "peft-type-missing": "`adapterhub fix` adds a missing peft_type",
    "pickle": "Save the adapter again with safe_serialization=True, or convert it with --unsafe-pickle",
    "several-models": "Convert one model at a time: --allow-drop '{drop}'",
    "torchtune-export": "Convert the adapter_model.pt next to it, with --unsafe-pickle and --base",
}


def in_words_of_the_command_line(error: AdapterhubError | None) -> AdapterhubError | None:
    """The same error with options for parameters, and the hint of its code."""
    if error is None:
        return None
    if isinstance(error, ParameterError):
        error.where = OPTIONS.get(error.parameter, f"--{error.parameter.replace('_', '-')}")
    if error.code in HINTS:
        hint = HINTS[error.code]
        error.hint = hint.format_map(error.fields) if isinstance(hint, str) else hint(error.fields)
    return error
