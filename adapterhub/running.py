"""Generation with an adapter that is named as on the command line; the computation is in `adapterhub.generation`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import MissingExtraError, ParameterError, UsageError

from . import base_sources, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.generation import Engine, Generated, OnText

_TORCH = ("torch", "transformers", "tokenizers", "jinja2")


def generate(
    source: StrPath,
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
) -> Generated:
    """Generate text with an adapter on its base, and without it.

    A Hugging Face folder runs in torch, which needs `adapterhub[train]`; a GGUF file in llama.cpp, which needs
    `adapterhub[run]` and for which the adapter is converted to a temporary GGUF.

    Args:
        source: A folder, a file, a ref or an address.
        prompt: What the model is asked.
        base: The model's folder or GGUF file, its name in the cache of the Hub, or `hf://org/model`, which is downloaded. None
            for the one that the adapter records, by its name.
        system: The message of the system before the prompt.
        raw: Continue the prompt as it is, without the model's chat template.
        compare: Also answer without the adapter.
        max_tokens: The largest number of tokens of an answer.
        temperature: 0 for the likeliest token each time; more for more variety.
        seed: Of the random numbers of a temperature.
        on_text: Called with whether the adapter is on, and with each piece of text; first with it, then without.
        workspace: Where names are looked up; its `steps` show the loading.

    Raises:
        MissingExtraError: What runs the base is not installed.
        NotFoundError: The base is not here.
        RefusedError: The adapter is for another base, cannot be run, or prompt and answer are too long.

    Example:
        >>> made = ah.generate("./letters", "a b c", base="./tiny", raw=True, max_tokens=4)
        >>> made.engine
        'torch'
    """
    from adapterhub.generation import Prompt, answered

    if raw and system is not None:
        raise ParameterError("system", "a raw prompt has no system message", "Put it into the prompt")
    here = workspace or Workspace()
    with contextlib.ExitStack() as stack:
        path = None if base is None else base_sources.weights(base, here)
        found = stack.enter_context(sources.opened(source, here))
        if base is None or path is None:
            base = base_sources.recorded(found)
            here.tell(f"base: {base}, which the adapter records")
            path = base_sources.weights(base, here)
        engine = stack.enter_context(_engine(found, path, here))
        made = answered(
            engine,
            Prompt(prompt, system, raw),
            compare=compare,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_text=on_text or (lambda _adapted, _piece: None),
        )
    return dataclasses.replace(made, base=os.fspath(base))


@contextlib.contextmanager
def _engine(found: sources.Source, base: Path, workspace: Workspace) -> Iterator[Engine]:
    if base.suffix == ".gguf":
        from adapterhub.generation import llama_cpp

        llama_cpp.check_extra()
        with _as_gguf(found, base) as adapter, llama_cpp.opened(adapter, base, where=found.where) as engine:
            yield engine
        return
    if not base.is_dir():
        raise UsageError(str(base), "is not a model", "Name the model's folder, or a .gguf file")
    for name in _TORCH:
        if importlib.util.find_spec(name) is None:
            what = f"running a Hugging Face model needs {name}, which is not installed"
            raise MissingExtraError("", what, "Run `pip install 'adapterhub[train]'`")
    from adapterhub.generation import torch_engine

    cache = Path(workspace.cache) if workspace.cache is not None else None
    with contextlib.ExitStack() as stack:
        with workspace.steps("loading") as progress:
            opened = torch_engine.opened(sources.given(found), base, progress=progress, cache=cache)
            torch_model = stack.enter_context(opened)
        yield torch_model


@contextlib.contextmanager
def _as_gguf(found: sources.Source, base: Path) -> Iterator[Path]:
    """The adapter as a GGUF file: itself, or a temporary one."""
    if found.path.suffix == ".gguf":
        yield found.path
        return
    from adapterhub_converters import bases
    from adapterhub_converters.formats import convert

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        target = Path(temporary, os.path.basename(found.folder) or "adapter").with_suffix(".gguf")
        convert.convert(found.path, target, to="gguf", base=bases.read_base(base))
        yield target
