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
    "address-with-remote": "Omit --remote, or write a ref",
    "base-required": "Pass --base BASE",
    "credentials-in-address": "Remove them; use `adapterhub login`",
    "expect-unsupported": "Omit --expect",
    "image-repacked": "Copy it with `skopeo copy --preserve-digests`, or copy the adapter that it contains",
    "login-required": "Log in with `adapterhub login {host}`",
    "no-such-tag": "Run `adapterhub list {repository}` for its tags",
    "source-damaged": "Nothing was stored; if it comes from the local registry, run `adapterhub fsck`",
    "store-of-registry": "Name an adapter in that registry, like team/sql, and the registry with --registry",
}


def in_words_of_the_command_line(error: AdapterhubError | None) -> AdapterhubError | None:
    """The same error with options for parameters, and the hint of its code."""
    if error is None:
        return None
    if isinstance(error, ParameterError):
        error.where = OPTIONS.get(error.parameter, f"--{error.parameter.replace('_', '-')}")
    if error.code in HINTS:
        words, written = HINTS[error.code].format_map(error.fields), str(error.args[2])
        if error.hint.startswith(written):  # more may have been appended to the hint it was raised with
            later = error.hint[len(written) :]
            error.hint = words + (later if written or not later else f". {later}")
    return error
