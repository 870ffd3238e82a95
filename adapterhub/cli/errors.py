"""Errors in the words of the command line: the option behind a parameter, the command that helps.

The library names parameters and codes; flags and commands are written here alone.
"""

from __future__ import annotations

from adapterhub_converters.errors import AdapterhubError, ParameterError

# Parameter to the option that sets it, where the two differ in more than dashes.
OPTIONS = {
    "budget": "--rank-budget",
    "conversion": "--to",
    "runtimes": "--for",
}
# Code to hint; `{name}` is a field of the error.
HINTS: dict[str, str] = {
    "adapter-lost": "Merge into 16 bits (--dtype bf16), or into the full-precision model; --force writes it anyway",
    "adapter-lost-in-nf4": (
        "Merge into 16 bits (--dequantize in place of --requantize), or into the full-precision model; --force writes it anyway"
    ),
    "as-trained": "Leave out --onto as-trained",
    "base-required": "Pass --base BASE",
    "gguf-type-for-folder": "Merge into a .gguf, or choose --requantize nf4 or --dtype",
    "quantized-base": "Merge into the full-precision model, or add --dequantize for a model in floats",
    "rows-not-whole-blocks": "Choose --dtype f16",
    "sum-too-large": "Write bfloat16 instead (--dtype bf16)",
    "t-for-weights": "Pass --t instead",
    "two-types": "Pass either --dtype or --requantize",
    "type-not-writable": "Choose a type for such tensors: --requantize {types} or --dtype bf16|f16|f32",
    "unknown-method": "Run `adapterhub merge --method list` for all methods",
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
