"""Options that several commands share, and those of every command.

An option has one name and one meaning in all commands, so its help begins the same in all of them; a test compares. The
exception is `adapterhub search`: its options are filters, each named for the field it compares.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import AdapterhubError, OutputExistsError
from adapterhub_converters.lazy_dataclass import dataclass

from .errors import reword
from .progress import EVENTS, QUIET
from .suggestions import SwappedOption, refuse_unknown

if TYPE_CHECKING:
    from adapterhub.serve.usage.record_place import Place


@dataclass
class Settings:
    """The options that every command understands."""

    registry: str | None = None
    as_json: bool = False
    debug: bool = False


def _store_in_meta(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(context: click.Context, _option: click.Parameter, value: Any) -> None:
        context.meta[key] = value

    return store


class Command(click.Command):
    """A command with an example in its help and the options that all commands share, wherever they are written."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        # Each command has them, so that they can be written after its name as well as before it.
        self.params += [
            click.Option(
                ["--json", "as_json"], is_flag=True, expose_value=False, callback=set_shared, help="Print one JSON document."
            ),
            click.Option(
                ["--registry"],
                metavar="DIR",
                expose_value=False,
                callback=set_shared,
                help="Registry to use: a folder, or the registry.db in it.",
            ),
            click.Option(
                ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_store_in_meta(QUIET), help="Show no progress."
            ),
            click.Option(
                ["--debug"], is_flag=True, expose_value=False, callback=set_shared, hidden=True, help="Show tracebacks."
            ),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, and name the command in the error for an option without its value."""
        words = [*args]
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            self._refuse_swapped(ctx, words)
            raise
        self._refuse_swapped(ctx, words)
        return rest

    def _refuse_swapped(self, context: click.Context, words: Sequence[str]) -> None:
        for option in self.params:
            if isinstance(option, SwappedOption):
                option.refuse(context, words)

    def invoke(self, ctx: click.Context) -> Any:
        """Run as click does, and add a hint for this command to its errors."""
        if not gc.isenabled():  # since the process began: what was imported until here needs no traversal later
            gc.freeze()
            gc.enable()
        try:
            return super().invoke(ctx)
        except AdapterhubError as error:
            # --replace does not apply to a picture, so its hint would mislead there.
            if isinstance(error, OutputExistsError) and "replace" in ctx.params and error.where != ctx.params.get("plot"):
                error.code = "output-exists"
            reword(error)
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example as it is typed."""
        formatter.write_paragraph()
        formatter.write_text("Example:")
        # Not `write_text`, which would wrap a command in the middle of a word.
        for line in self.example.strip().splitlines():
            formatter.write(f"  $ {line.strip()}\n")


class Group(Command, click.Group):
    """Commands of one subject, like `adapterhub base add`."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; a group alone shows its help, which newer versions of click call an error."""
        if not args and not ctx.resilient_parsing:  # which a shell that completes the line asks for
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve as click does, and suggest the command that was probably meant."""
        refuse_unknown(ctx, args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


def set_shared(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Set a field of the run's settings, wherever the option was written; a variable or a file does not replace it."""
    settings, name = context.ensure_object(Settings), str(option.name)
    if value and (context.get_parameter_source(name) is ParameterSource.COMMANDLINE or not getattr(settings, name)):
        setattr(settings, name, value)


def command(name: str, *, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator that makes a function a command of the program."""
    return click.command(name, cls=Command, example=example)


# ---- one option each

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def base_option(detail: str, **attributes: Any) -> Decorator:
    """Return the option `--base BASE`: the base model."""
    return click.option("--base", metavar="BASE", help=f"Base model: {detail}", **attributes)


def adapter_swapped_with_base(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse `BASE --adapter SRC`, and `--adapters`, in a command that takes `SRC --base BASE`."""
    return click.option("--adapter", "--adapters", "swapped", cls=SwappedOption, multiple=True, hidden=True, is_eager=True)(
        function
    )


def output_option(detail: str, **attributes: Any) -> Decorator:
    """Return the option `-o OUT`, the argument `out`: the file or folder to write."""
    return click.option("-o", "--output", "out", metavar="OUT", help=f"Output: {detail}", **attributes)


def replace_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option `--replace`: an earlier output may be replaced."""
    return click.option("--replace", is_flag=True, help="Replace OUT if it is an earlier output.")(function)


def force_option(detail: str) -> Decorator:
    """Return the option `--force`: do what would be refused."""
    return click.option("--force", is_flag=True, help=f"Override a refusal: {detail}")


def plot_option(detail: str) -> Decorator:
    """Return the option `--plot PNG`: draw a picture as well."""
    return click.option("--plot", metavar="PNG", help=f"Also draw {detail} (needs matplotlib).")


def adapter_option(detail: str, **attributes: Any) -> Decorator:
    """Return the option `--adapter SRC`, repeatable; the argument `adapters`."""
    return click.option(
        "--adapter", "adapters", metavar="SRC", multiple=True, help=f"Adapter: {detail}; repeatable.", **attributes
    )


def headers_only_option(detail: str) -> Decorator:
    """Return the option `--headers-only`: no tensor is read."""
    return click.option("--headers-only", is_flag=True, help=f"Read headers only: {detail}")


def _parse_place(_context: click.Context, _option: click.Parameter, text: str | None) -> Place | None:
    from adapterhub.serve.usage import record_place

    return record_place.parse(text) if text else None


def usage_file_option(detail: str) -> Decorator:
    """Return the option `--usage-file PLACE`: the record of a gateway's requests."""
    return click.option(
        "--usage-file",
        "usage_place",
        metavar="PLACE",
        type=click.Path(),
        callback=_parse_place,
        help=f"Usage database, a file or postgresql://…: {detail} [default: usage.db beside the registry]",
    )


def explain_option(detail: str, **attributes: Any) -> Decorator:
    """Return the option `--explain NAME`: documentation of one thing."""
    return click.option("--explain", "about", metavar="NAME", help=f"Explain a {detail}", **attributes)


def set_option(detail: str, **attributes: Any) -> Decorator:
    """Return the repeatable option `--set KEY=VALUE`: the value of a setting that has no option of its own."""
    return click.option(
        "--set", "changes", metavar="KEY=VALUE", multiple=True, help=f"Set a value: {detail}; repeatable.", **attributes
    )


def rank_option(detail: str) -> Decorator:
    """Return the option `--rank R`: the rank of the result."""
    return click.option("--rank", metavar="R", type=click.IntRange(1), help=f"Rank of {detail}")


def max_rank_option(detail: str, **attributes: Any) -> Decorator:
    """Return the option `--max-rank R`: the largest rank that is allowed."""
    return click.option("--max-rank", metavar="R", type=click.IntRange(1), help=f"Maximum rank: {detail}", **attributes)


class Choice(click.Choice[str]):
    """One of several words; the error for any other word ends with the one that was probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            import difflib

            # click lists the choices; with many of them, the probable one is easier to see at the end.
            close = difflib.get_close_matches(str(value).lower(), self.choices, 1)
            if not close:
                raise
            raise click.BadParameter(f"{error.message.rstrip('.')}. Did you mean {close[0]}?", ctx, param) from error


def dtype_option(choices: Sequence[str], subject: str, *, default_text: str = "", **attributes: Any) -> Decorator:
    """Return the option `--dtype DTYPE`: the type of numbers; `default_text` describes a default that varies."""
    help_text = f"Data type of {subject}: {', '.join(choices)}." + (f" [default: {default_text}]" if default_text else "")
    return click.option("--dtype", metavar="DTYPE", type=Choice(choices), help=help_text, **attributes)


energy_option = click.option(
    "--energy",
    metavar="E",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the energy to keep, with the smallest ranks that do so, like 0.99.",
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show what would be done, and write nothing.")
expect_option = click.option("--expect", metavar="DIGEST", help="Fail (exit 7) unless the tag has this digest, or is `absent`.")
weights_option = click.option("--weights", metavar="W,W…", help="Weight of each adapter, like 0.7,-0.4. [default: 1 each]")
alpha_option = click.option(
    "--alpha", metavar="N", type=float, help="Alpha of a bare .safetensors file, which does not record it."
)
rslora_option = click.option("--rslora", is_flag=True, help="A bare .safetensors file scales by alpha / sqrt(r).")
project_option = click.option(
    "--project", is_flag=True, help="Write the project's adapterhub.toml instead of files of your own."
)
onto_option = click.option(
    "--onto",
    type=click.Choice(("original", "as-trained")),
    help="Merge onto BASE as it is, or as training quantized it. [default: original]",
)
model_option = click.option(
    "--model", metavar="MODEL", help="With --to ollama: Ollama's name of the base. [default: the path of --base]"
)


# ---- answers of models


def answer_options(*, hottest: float) -> Decorator:
    """Add the options of a request for text: `system`, and those of `sampling_options`."""
    system = click.option("--system", metavar="TEXT", help="System message before the prompt.")
    return lambda function: system(sampling_options(hottest=hottest)(function))


def sampling_options(*, hottest: float) -> Decorator:
    """Add the options of how text is drawn: `max_tokens`, `temperature` up to `hottest`, `seed`."""
    options = (
        click.option(
            "--max-tokens",
            metavar="N",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Maximum length of an answer.",
        ),
        click.option(
            "--temperature",
            metavar="T",
            type=click.FloatRange(0, hottest),
            default=0.0,
            show_default=True,
            help="Randomness; with 0 the likeliest token is taken.",
        ),
        click.option(
            "--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed."
        ),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# ---- transfers

JOBS, RATE = f"{__name__}.jobs", f"{__name__}.rate"
_COUNT = safe_regex.Pattern(r"(?i)([0-9]{1,9}(?:\.[0-9]{1,3})?)([kmg]?)")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}


class _Rate(click.ParamType[float]):
    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = _COUNT.fullmatch(str(value))
        rate = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
        if rate < 1:
            self.fail(f"{value!r} is not a number of bytes per second, like 500k or 10M", param, ctx)
        return rate


def transfer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a command that moves bytes; their values go into the context's `meta`, for remotes and bars."""
    jobs, rate, default_jobs = click.IntRange(1, 32), _Rate(), {"default": 4, "show_default": True}
    for name, key, help_text, attributes in (
        ("--events", EVENTS, "Report progress as JSON lines on stderr.", {"is_flag": True}),
        ("--limit-rate", RATE, "Limit the transfer rate, in bytes per second, like 10M.", {"metavar": "RATE", "type": rate}),
        ("--jobs", JOBS, "Number of files to transfer in parallel.", {"metavar": "N", "type": jobs, **default_jobs}),
    ):
        option = click.option(name, expose_value=False, callback=_store_in_meta(key), help=help_text, **attributes)
        function = option(function)
    return function
