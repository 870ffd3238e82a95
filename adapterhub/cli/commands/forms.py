"""`--as` of push and pull: an adapter stored or written in another format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings
from adapterhub_converters import formats
from adapterhub_converters.errors import UsageError

from .convert import here

if TYPE_CHECKING:
    from adapterhub.registry.recipe import Conversion
    from adapterhub_converters.bases import BaseSpec

_IMAGE = "image"  # no format of adapters, but what an adapter is packaged as elsewhere


def options(help_of_as: str, *, more: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that say a conversion; the command gets `conversion`, None without --as."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        import functools

        @functools.wraps(function)
        def call(
            *args: Any, style: str | None, dtype: str, allow_approx: bool, allow_drop: tuple[str, ...], **kwargs: Any
        ) -> Any:
            return function(*args, conversion=_conversion(style, dtype, allow_approx, allow_drop), **kwargs)

        for option in reversed(_OPTIONS):
            call = option(call)
        return click.option("--as", "style", type=click.Choice((*formats.FORMATS, *more)), help=help_of_as)(call)

    return decorate


_OPTIONS = (
    click.option(
        "--dtype", type=click.Choice(formats.DTYPES), default="source", help="With --as gguf: what it stores numbers as."
    ),
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


@contextmanager
def packaged(found: inputs.Source, conversion: Conversion | None, base: BaseSpec | None, *, name: str) -> Iterator[Path]:
    """The folder to push: the adapter's own, or one with what it was converted to."""
    if conversion is None:
        with inputs.as_folder(found) as folder:
            yield folder
        return
    from adapterhub.registry import recipe

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        recipe.convert(inputs.parent(found), folder, conversion, name=name.rpartition("/")[2], base=base)
        yield folder


def pull(settings: Settings, ref: str, out: str | None, base: str | None, conversion: Conversion, *, model: str | None) -> None:
    """What `pull --as` does."""
    from adapterhub.ref import Ref
    from adapterhub.registry import conversion_cache

    if model and conversion.to not in formats.PACKAGES:
        raise UsageError("--model", f"{conversion.to} names no base", "Leave it out")
    wanted = Ref.parse(ref)
    target = (
        Path(out)
        if out
        else Path(
            wanted.name.rpartition("/")[2] + (formats.FORMATS[conversion.to].suffix if conversion.to in formats.FORMATS else "")
        )
    )
    spec = inputs.read_base(base, settings) if base else None
    with open_registry(settings) as registry:
        named = model or (here(base) if conversion.to in formats.PACKAGES else None)
        form = conversion_cache.pull(registry, wanted, target, conversion, base=spec, model=named)
    document = {
        "ref": str(form.version.ref),
        "digest": form.version.digest,
        "deprecated": form.version.deprecated,
        "output": str(target),
        "format": conversion.to,
        "loss": form.loss,
        "cached": form.cached,
    }
    output.deprecated(str(form.version.ref), form.version.deprecated)
    losses = ", ".join(f"{count} {name}" for name, count in form.loss.items())
    kept = ", kept from before" if form.cached else ""
    text = f"{target}: {form.version.ref} as {conversion.to}, {sum(form.loss.values())} tensors: {losses}{kept}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
