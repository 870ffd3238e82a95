"""Generation of text with an adapter that is named by path, ref or address; the computation is in `adapterhub.generation`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adapterhub_converters.errors import MissingExtraError, ParameterError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import base_sources, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.generation import Engine, Generation, OnText

_TORCH_MODULES = ("torch", "transformers", "tokenizers", "jinja2")


def generate(
    source: StrPath | None,
    prompt: str,
    *,
    base: StrPath | None = None,
    system: str | None = None,
    raw: bool = False,
    compare: bool = True,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: OnText | None = None,
    workspace: Workspace | None = None,
) -> Generation:
    """Generate text with an adapter on its base, and without it.

    A Hugging Face folder runs in torch, which needs `adapterhub[train]`; a GGUF file in llama.cpp, which needs
    `adapterhub[run]` and for which the adapter is converted to a temporary GGUF.

    Args:
        source: A folder, a file, a ref or an address; None for the base alone.
        prompt: The question or instruction for the model.
        base: The model's folder or GGUF file, its name in the cache of the Hub, or `hf://org/model`, which is downloaded. None
        for the base that the adapter records by name.
        system: The message of the system before the prompt.
        raw: Continue the prompt as it is, without the model's chat template.
        compare: Also answer without the adapter.
        max_tokens: The largest number of tokens of an answer.
        temperature: 0 for the most likely token each time; more for more variety.
        seed: The seed of the random numbers of a temperature.
        on_text: Called with whether the adapter is on, and with each piece of text; first with it, then without.
        workspace: Where names are looked up; its `steps` show the loading.

    Raises:
        MissingExtraError: The library that runs the base is not installed.
        NotFoundError: The base is not on this machine.
        RefusedError: The adapter is for another base, cannot be run, or prompt and answer are too long.

    Example:
        >>> result = ah.generate("./letters", "a b c", base="./tiny", raw=True, max_tokens=4)
        >>> result.engine
        'torch'
    """
    from adapterhub.generation import Prompt, answer_prompt

    if source is None and base is None:
        raise ParameterError("base", "is needed without an adapter", "Name the model")
    if raw and system is not None:
        raise ParameterError("system", "a raw prompt has no system message", "Put it into the prompt")
    with open_engine(source, base, workspace or Workspace()) as loaded:
        result = answer_prompt(
            loaded.engine,
            Prompt(prompt, system, raw),
            has_adapter=source is not None,
            compare=compare,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_text=on_text or (lambda _adapted, _piece: None),
        )
    return dataclasses.replace(result, base=loaded.base)


@dataclass(frozen=True)
class LoadedEngine:
    """An engine with an adapter, or with a base alone.

    Attributes:
        engine: The engine.
        base: The name of the base: the one that was given, or the one that the adapter records.
        source: The adapter; None without one.
    """

    engine: Engine
    base: str
    source: sources.Source | None


@contextlib.contextmanager
def open_engine(source: StrPath | None, base: StrPath | None, workspace: Workspace) -> Iterator[LoadedEngine]:
    """Open the engine for a base, with an adapter if `source` names one; arguments and errors are those of `generate`."""
    with contextlib.ExitStack() as stack:
        path = None if base is None else base_sources.weights(base, workspace)
        adapter_source = None if source is None else stack.enter_context(sources.open_source(source, workspace))
        if adapter_source is not None and path is None:
            base = base_sources.recorded_base_here(adapter_source, workspace)
            path = base_sources.weights(base, workspace)
        engine = stack.enter_context(_open_engine(adapter_source, cast(Path, path), workspace))
        yield LoadedEngine(engine, os.fspath(cast(StrPath, base)), adapter_source)


@contextlib.contextmanager
def _open_engine(adapter_source: sources.Source | None, base: Path, workspace: Workspace) -> Iterator[Engine]:
    if base.suffix == ".gguf":
        from adapterhub.generation import llama_cpp

        llama_cpp.check_extra()
        location = str(base) if adapter_source is None else adapter_source.location
        prompt = PROMPT_OF_BASE if adapter_source is None else TrainedPrompt.read(adapter_source.path)
        with (
            _as_gguf(adapter_source, base) as adapter,
            llama_cpp.open_engine(adapter, base, location=location, prompt=prompt) as engine,
        ):
            yield engine
        return
    if not base.is_dir():
        raise UsageError(str(base), "is not a model", "Name the model's folder, or a .gguf file")
    # Looked up and not imported: an import of torch takes seconds.
    for name in _TORCH_MODULES:
        if importlib.util.find_spec(name) is None:
            problem = f"running a Hugging Face model needs {name}, which is not installed"
            raise MissingExtraError("", problem, "Run `pip install 'adapterhub[train]'`")
    from adapterhub.generation import torch_engine
    from adapterhub.training import InitialAdapter

    cache = Path(workspace.cache) if workspace.cache is not None else None
    with contextlib.ExitStack() as stack:
        # The progress ends before the model is used: its line would be mixed with the generated text.
        with workspace.steps("loading") as progress:
            initial = None if adapter_source is None else InitialAdapter(*sources.initial_adapter(adapter_source))
            loading = torch_engine.open_engine(initial, base, progress=progress, cache=cache)
            torch_model = stack.enter_context(loading)
        yield torch_model


@contextlib.contextmanager
def _as_gguf(adapter_source: sources.Source | None, base: Path) -> Iterator[Path | None]:
    """Yield the adapter as a GGUF file: itself, or a temporary one; None without an adapter."""
    if adapter_source is None:
        yield None
        return
    if adapter_source.path.suffix == ".gguf":
        yield adapter_source.path
        return
    from adapterhub_converters import bases
    from adapterhub_converters.formats import convert

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        target = Path(temporary, os.path.basename(adapter_source.folder) or "adapter").with_suffix(".gguf")
        convert.convert(adapter_source.path, target, to="gguf", base=bases.read_base(base))
        yield target
