"""Base models: read from their headers, or converted as a whole between the two kinds that runtimes load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, source_names, sources
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.merging import ModelMergeReport
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.formats import ModelDtype


def read_base(base: StrPath, *, workspace: Workspace | None = None) -> BaseSpec:
    """Read a base model from its headers, for several calls that need it.

    Args:
        base: A folder, a file, `hf://org/model`, a URL, or the name of a base in the registry or in the cache of the Hub.
        workspace: Where names are looked up, and which hub is asked.

    Example:
        >>> tiny = ah.read_base("./tiny")
        >>> [ah.check(path, base=tiny).ok for path in ("./sql", "./french")]
        [True, True]
    """
    return base_sources.read_base(base, workspace or Workspace())


@dataclass(frozen=True, repr=False)
class ConvertedModel:
    """A whole model in another format.

    Attributes:
        path: The folder or the GGUF file.
        files: Names of the files.
        size: Bytes of all files.
        report: For a GGUF file: its tensors, and what was rounded.
    """

    path: Path
    files: tuple[str, ...]
    size: int
    report: ModelMergeReport | None = None

    def __repr__(self) -> str:
        return f"<ConvertedModel {self.path}: {len(self.files)} files, {self.size:,} bytes>"


def convert_model(
    source: StrPath,
    target: StrPath,
    *,
    to: Literal["gguf", "hf"],
    dtype: ModelDtype = "source",
    imatrix: StrPath | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> ConvertedModel:
    """Convert a base model: a Hugging Face folder to a GGUF file, or a GGUF file to a Hugging Face folder.

    Args:
        source: The model's folder or file.
        target: The file or folder to write, whole or not at all.
        to: `gguf` or `hf`.
        dtype: The type of numbers in a GGUF: `source`, `f32`, `f16`, `bf16`, `q8_0`, `q4_k` …, or a mixture of types, `q4_k_m`,
            `q4_k_s`, `q5_k_m` or `q5_k_s`; a folder has bf16.
        imatrix: An importance matrix of llama-imatrix, for the quantization to a GGUF.
        replace: Replace a model at `target`; else it must not exist.
        progress: Called with bytes done and bytes in all.
        workspace: Where progress is reported to, if not to `progress`.

    Raises:
        RefusedError: The architecture or a tensor is not supported.
        OutputExistsError: `target` exists.

    Example:
        >>> ah.convert_model("./bare", "bare.gguf", to="gguf").files
        ('bare.gguf',)
    """
    path, out = source_names.existing_path(os.fspath(source)), source_names.output_path(target)
    sources.check_apart(out, path)
    if to == "hf":
        from adapterhub_converters.formats.gguf_model import to_folder

        if path.is_dir():
            raise UsageError(str(path), "is a folder, and a GGUF base model is needed", "Name the .gguf file")
        to_folder.to_hf(path, out, replace=replace)
        sizes = {item.name: item.stat().st_size for item in sorted(out.iterdir())}
        return ConvertedModel(out, tuple(sizes), sum(sizes.values()))
    from adapterhub.merging import Options, prepare_merge
    from adapterhub_converters.containers import atomic

    atomic.check_free(out, folder=False, replace=replace)
    float_type = dtype if dtype in ("f32", "f16", "bf16") else None
    block_type = None if float_type or dtype == "source" else dtype
    importance = None
    if imatrix is not None:
        from adapterhub.merging.into_base.importance import read_importance

        importance = read_importance(Path(imatrix))
    options = Options(dtype=float_type, requantize=block_type, dequantize=True, importance=importance)
    model = prepare_merge([], path, options, gguf=True)
    with (workspace or Workspace()).with_progress(progress).bar("converting") as progress_:
        report = model.write(out, progress_, replace=replace)
    return ConvertedModel(out, (out.name,), out.stat().st_size, report)
