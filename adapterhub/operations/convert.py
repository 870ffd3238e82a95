"""Conversions of an adapter by path, ref or address; the formats are in `adapterhub_converters.formats`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import base_sources, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub_converters.adapter import LossReport
    from adapterhub_converters.formats import AdapterFormat, GgufDtype


def convert(
    source: StrPath,
    target: StrPath,
    *,
    to: AdapterFormat,
    base: base_sources.Base | None = None,
    dtype: GgufDtype = "source",
    allow_approx: bool = False,
    allow_drop: Sequence[str] = (),
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    unsafe_pickle: bool = False,
    model: str | None = None,
    replace: bool = False,
    workspace: Workspace | None = None,
) -> LossReport:
    """Write an adapter in another format, and report what became of every tensor.

    Args:
        source: A folder, a file, a ref or an address.
        target: The folder or file to write, whole or not at all.
        to: The format: `peft`, `gguf`, `mlx`, `kohya`, `diffusers`, `raw`, `torchtune`, `litgpt`, `megatron`, `ollama`, or the
            `InstalledFormat` of another package.
        base: The model it is for, where names or shapes are needed.
        dtype: The type of numbers in a GGUF: `source`, `f32`, `f16`, `bf16`, `q8_0` or `q4_0`.
        allow_approx: Replace deltas that the format cannot express by the nearest of low rank.
        allow_drop: Leave out `norms`, `biases`, `weights`, `rows`, `magnitudes`, `copies`, `embeddings`, or names and patterns.
        rank: The rank of an approximation; the adapter's own if None.
        alpha: The alpha of a state dict without a config.
        rslora: Whether a state dict without a config scales by alpha / sqrt(r).
        unsafe_pickle: Accept a pickle, loaded in a process of its own under limits.
        model: The name of the base in Ollama.
        replace: Replace an earlier output at `target`; else it must not exist.
        workspace: Where names are looked up.

    Raises:
        RefusedError: The format cannot express part of the adapter; the error names every part.
        OutputExistsError: `target` exists.

    Example:
        >>> report = ah.convert("./sql", "sql-mlx", to="mlx", base="./tiny")
        >>> report.worst.name
        'EXACT'
    """
    from adapterhub_converters.formats import convert as formats
    from adapterhub_converters.formats.lossy import LossAllowance

    workspace = workspace or Workspace()
    spec = base_sources.base_spec(base, workspace)
    with sources.open_source(source, workspace, as_stored=False) as adapter_source:
        # `replace` removes what is at the target, which must not be the source.
        sources.check_apart(Path(target), adapter_source.path)
        return formats.convert(
            adapter_source.path,
            Path(target),
            to=to,
            base=spec,
            allowed=LossAllowance(approx=allow_approx, drop=list(allow_drop), rank=rank),
            alpha=alpha,
            rslora=rslora,
            unsafe_pickle=unsafe_pickle,
            dtype=dtype,
            model=model or (base_sources.local_path(spec) if to == "ollama" else None),
            replace=replace,
        )
