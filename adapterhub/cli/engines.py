"""The engine that a command runs: its options, and opening it on a base."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub_converters.lazy_dataclass import dataclass

from . import environment, inputs, output
from .options import Choice, Settings, dtype_option, max_rank_option
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.serve.engines import Engine
    from adapterhub.serve.engines.pooled_engine import EngineAddress
    from adapterhub_converters.bases import BaseSpec

# Written out so that help and completion need not import the engines; a test compares.
ENGINES = ("auto", "torch", "llama.cpp", "vllm", "sglang", "mlx")
_OPTIONS = (
    click.option("--engine", type=Choice(ENGINES), default="auto", show_default=True, help="The program that answers."),
    click.option(
        "--engine-url",
        "urls",
        metavar="URL",
        multiple=True,
        help="An engine that is already running; its key is in $ADAPTERHUB_ENGINE_KEY. Repeatable, for engines of one kind.",
    ),
    click.option("--program", metavar="PATH", default="", help="Path of llama-server, or of a Python that has the engine."),
    click.option(
        "--base-name", "name", metavar="NAME", help="The base's own name in requests. [default: the name of its file or folder]"
    ),
    max_rank_option("what vLLM, SGLang and torch reserve memory for.", default=64, show_default=True),
    click.option(
        "--context",
        metavar="TOKENS",
        type=click.IntRange(1),
        help="Tokens of a conversation. [default: the base's own; with llama.cpp 4096 at most]",
    ),
    dtype_option(
        ("float32", "bfloat16", "float16"), "the computation, in torch, vLLM or SGLang", default_text="the base's own"
    ),
    click.option("--nf4", is_flag=True, help="Hold the base in NF4, in torch."),
)
OPTION_NAMES = ("engine", "urls", "program", "name", "max_rank", "context", "dtype", "nf4")
"""The arguments of `open_engine` that these options are."""


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose an engine: the arguments of `open_engine`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine that is not started, its base, and the name of the base in requests."""

    engine: Engine
    spec: BaseSpec
    name: str

    @property
    def facts(self) -> str:
        """What is known of the engine once it has started: the tokens of a conversation, and its precision."""
        context = f"{self.engine.context:,} tokens per conversation" if self.engine.context else ""
        return ", ".join(fact for fact in (context, self.engine.precision) if fact)


@contextmanager
def open_engine(
    base: str,
    settings: Settings,
    *,
    engine: str,
    urls: tuple[str, ...],
    program: str,
    name: str | None,
    max_rank: int,
    context: int | None,
    dtype: str | None,
    nf4: bool,
    listed: Sequence[EngineAddress] = (),
    **fields: Any,
) -> Iterator[EngineChoice]:
    """Open the engine of `engine_options` on a base, and print which one it is.

    Args:
        listed: The engines of a route file.
        fields: More of `EngineOptions`.
    """
    from adapterhub.operations import base_sources
    from adapterhub.serve.engines import engine_for_base, pooled_engine

    fixed = [pooled_engine.address_of(url) for url in urls]
    url = next((address.url for address in (*fixed, *listed)), "")
    spec = inputs.read_base(base, settings)
    base_name = name or _base_name(base, spec)
    with tempfile.TemporaryDirectory(prefix="adapterhub-serve-") as folder:
        choice = engine_for_base.EngineOptions(
            engine,
            spec,
            base_name,
            # An engine that runs elsewhere has its own weights.
            weights=None if url else base_sources.weights(base, workspace(settings)),
            folder=Path(folder),
            url=url,
            url_key=os.environ.get(environment.ENGINE_KEY, ""),
            program=program,
            environ=os.environ,
            max_rank=max_rank,
            context=context or 0,
            dtype=dtype or "",
            nf4=nf4,
            cache=environment.cache_folder(),
            tell=lambda note: output.say(output.one_line(note)),
            **fields,
        )
        chosen_engine = engine_for_base.open_pool(choice, fixed, listed) if url else engine_for_base.open_engine(choice)
        if chosen_engine.name == "torch":
            # Before the engine starts, which imports torch.
            environment.prepare_torch(same_bits_in_batches=True)
        output.say(
            output.one_line(
                f"engine: {chosen_engine.name}" + (" (found here; --engine chooses another)" if engine == "auto" else "")
            )
        )
        yield EngineChoice(chosen_engine, spec, base_name)


def _base_name(base: str, spec: BaseSpec) -> str:
    """Return the name of a base in requests: its name on the Hub, or the name of its file or folder."""
    if "://" in base:
        return spec.repo or base.rpartition("/")[2]
    path = Path(base)
    return path.absolute().stem if path.suffix == ".gguf" else path.absolute().name if path.exists() else base
