"""Options of commands that convert an adapter or a model: the format, the type of numbers, and what may be lost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub_converters import formats
from adapterhub_converters.errors import UsageError

from .options import Choice, Decorator, dtype_option

if TYPE_CHECKING:
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat
    from adapterhub_converters.formats import GgufDtype


class _AnyFormat(Choice):
    """The formats that an adapter or a model can be converted to.

    Those of other packages are looked up for a name that is not built in alone, since that takes as long as a conversion.
    """

    BUILT_IN = (*formats.WRITTEN, *formats.PACKAGES, *formats.MODELS)

    def __init__(self) -> None:
        self.case_sensitive = True

    @functools.cached_property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]  # click's is an attribute, set at once
        """The names, those of other packages among them."""
        return (*formats.names(), *formats.MODELS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does."""
        return value if value in self.BUILT_IN else super().convert(value, param, ctx)


class _AnyFormatOption(click.Option):
    """The option `--to` with such a format, whose help names those of other packages too."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help as click does."""
        self.help = _to_help(_AnyFormat().choices)
        return super().get_help_record(ctx)


def _to_help(names: Sequence[str]) -> str:
    return f"Format: convert to {', '.join(names)}."


def to_option(names: Sequence[str], **attributes: Any) -> Decorator:
    """Return the option `--to FORMAT`, the argument `style`."""
    attributes = {"type": Choice(names), "help": _to_help(names), **attributes}
    return click.option("--to", "style", metavar="FORMAT", **attributes)


any_format_option = to_option(_AnyFormat.BUILT_IN, type=_AnyFormat(), cls=_AnyFormatOption)
MODEL_DTYPES = tuple(dict.fromkeys((*formats.DTYPES, *formats.QUANTIZED)))
"""Types of a whole model in GGUF."""
_LOSSES = (
    click.option("--allow-approx", is_flag=True, help="Approximate what the format cannot express by low-rank deltas."),
    click.option("--allow-drop", metavar="WHAT", multiple=True, help="Leave out norms, biases, weights, rows, … or names."),
)


def loss_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that allow a conversion of an adapter to lose something: `dtype`, `allow_approx`, `allow_drop`."""
    return loss_options_with(formats.DTYPES)(function)


def loss_options_with(dtypes: Sequence[str]) -> Decorator:
    """Return `loss_options` with these choices of `dtype`."""

    dtype = dtype_option(dtypes, "a GGUF file", default="source")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_LOSSES):
            function = option(function)
        return dtype(function)

    return decorate


def split_drops(values: Sequence[str]) -> tuple[str, ...]:
    """Return the words of every `--allow-drop`, which may be separated by commas."""
    return tuple(word.strip() for text in values for word in text.split(",") if word.strip())


def conversion_options(*other_names: str) -> Decorator:
    """Add `--to` and `loss_options` to a command, which gets them as one argument `conversion`; None without --to."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(
            *args: Any,
            style: ConversionFormat | None,
            dtype: GgufDtype,
            allow_approx: bool,
            allow_drop: tuple[str, ...],
            **kwargs: Any,
        ) -> Any:
            return function(*args, conversion=_conversion(style, dtype, allow_approx, allow_drop), **kwargs)

        return to_option((*formats.WRITTEN, *other_names))(loss_options(call))

    return decorate


def _conversion(style: ConversionFormat | None, dtype: GgufDtype, approx: bool, drop: tuple[str, ...]) -> Conversion | None:
    if style is None:
        if dtype != "source" or approx or drop:
            raise UsageError("--to", "is required by --dtype, --allow-approx and --allow-drop", "Add --to FORMAT")
        return None
    if style == "image" and (dtype != "source" or approx or drop):
        raise UsageError("--to image", "does not convert the adapter", "Leave the other options out, or convert it first")
    from adapterhub.registry.adapter_recipe import Conversion

    return Conversion(style, dtype, approx, split_drops(drop))
