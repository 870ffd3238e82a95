"""The options that commands share, and what every command understands."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from adapterhub_converters.errors import UsageError

from .progress import EVENTS, QUIET

if TYPE_CHECKING:
    from adapterhub.registry.recipe import Conversion

# Spelled out here so that help and completion need not import the formats (numpy); a test compares.
FORMATS = ("peft", "gguf", "mlx", "kohya", "diffusers", "raw", "torchtune", "litgpt", "megatron")
DTYPES = ("source", "f32", "f16", "bf16", "q8_0", "q4_0")
EXPECT = "Fail (exit 7) unless the tag still has this digest, or is `absent`."


@dataclass
class Settings:
    """What every command understands."""

    registry: str | None = None
    as_json: bool = False
    debug: bool = False


class Command(click.Command):
    """A command with an example in its help, and with the options that all commands share, wherever they are written."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.params += [
            click.Option(
                ["--json", "as_json"],
                is_flag=True,
                expose_value=False,
                callback=set_shared,
                help="One JSON document, for programs.",
            ),
            click.Option(
                ["--registry"],
                metavar="DIR",
                expose_value=False,
                callback=set_shared,
                help="The registry to use: a folder, or the registry.db in it.",
            ),
            click.Option(
                ["--debug"], is_flag=True, expose_value=False, callback=set_shared, hidden=True, help="Show tracebacks."
            ),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; of an option that lacks its value click doesn't say whose it is."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, as it is typed."""
        formatter.write_paragraph()
        formatter.write_text("Example:")
        for line in self.example.strip().splitlines():
            formatter.write(f"  $ {line.strip()}\n")


class Group(Command, click.Group):
    """Commands of one subject, like `adapterhub base add`."""

    command_class = Command


def set_shared(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Have the settings of the run take an option, wherever it was written."""
    if value:
        setattr(context.ensure_object(Settings), str(option.name), value)


def command(name: str, *, short: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command of the program; `short` is its line in the program's help."""
    return click.command(name, cls=Command, short_help=short, example=example)


JOBS, RATE = f"{__name__}.jobs", f"{__name__}.rate"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}


class _Rate(click.ParamType[float]):
    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([kmg]?)", str(value), re.IGNORECASE)
        rate = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
        if rate < 1:
            self.fail(f"{value!r} is no number of bytes a second; write it like 500k or 10M", param, ctx)
        return rate


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, _option: click.Parameter, value: Any) -> None:
        context.meta[key] = value

    return keep


def transfer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that moves bytes; what they say is kept for `how` and for the bars."""
    for option in (
        click.option(
            "--events",
            is_flag=True,
            expose_value=False,
            callback=_keep(EVENTS),
            help="Progress as JSON lines on stderr.",
        ),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_keep(QUIET), help="Show no progress."),
        click.option(
            "--limit-rate",
            metavar="RATE",
            type=_Rate(),
            expose_value=False,
            callback=_keep(RATE),
            help="At most so many bytes a second, like 10M.",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(1, 32),
            default=4,
            show_default=True,
            expose_value=False,
            callback=_keep(JOBS),
            help="Files at once.",
        ),
    ):
        function = option(function)
    return function


_IMAGE = "image"  # no format of adapters, but what an adapter is packaged as elsewhere


def conversion_options(help_of_as: str, *, more: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that say a conversion; the command gets `conversion`, None without --as."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(
            *args: Any, style: str | None, dtype: str, allow_approx: bool, allow_drop: tuple[str, ...], **kwargs: Any
        ) -> Any:
            return function(*args, conversion=_conversion(style, dtype, allow_approx, allow_drop), **kwargs)

        for option in reversed(_CONVERSION):
            call = option(call)
        return click.option("--as", "style", type=click.Choice((*FORMATS, *more)), help=help_of_as)(call)

    return decorate


_CONVERSION = (
    click.option("--dtype", type=click.Choice(DTYPES), default="source", help="With --as gguf: what it stores numbers as."),
    click.option("--allow-approx", is_flag=True, help="With --as: as convert has it."),
    click.option("--allow-drop", metavar="WHAT", multiple=True, help="With --as: as convert has it."),
)


def _conversion(style: str | None, dtype: str, approx: bool, drop: tuple[str, ...]) -> Conversion | None:
    if style is None:
        if dtype != "source" or approx or drop:
            raise UsageError("--as", "is missing: the other options of a conversion need it", "Add --as FORMAT")
        return None
    if style == _IMAGE and (dtype != "source" or approx or drop):
        raise UsageError("--as image", "converts nothing", "Leave the other options out, or convert it first")
    from adapterhub.registry.recipe import Conversion

    words = tuple(word.strip() for given in drop for word in given.split(",") if word.strip())
    return Conversion(style, dtype, approx, words)


def is_image(conversion: Conversion | None) -> bool:
    """Whether `--as image` was asked for."""
    return conversion is not None and conversion.to == _IMAGE
