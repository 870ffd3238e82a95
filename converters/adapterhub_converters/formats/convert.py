"""Conversion between any two formats of the table, and recognition of a path's format.

A conversion reads into the canonical form and writes from it. The result appears under its final name complete or not at all:
it is written next to it under a temporary name and then renamed. Nothing that exists is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters import bases, gc_pause
from adapterhub_converters.adapter import (
    Adapter,
    Loss,
    LossReport,
    StackedLowRank,
    TensorLoss,
    refuse_tuned,
    with_factored_as_pairs,
)
from adapterhub_converters.adapter_files import ADAPTER_JSON, whole_model_error
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import (
    AdapterhubError,
    FormatError,
    NotFoundError,
    NotUnderstoodError,
    ParameterError,
    RefusedError,
)
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import (
    PACKAGES,
    Format,
    adapter_claims,
    find,
    in_order,
    names,
    peft,
    pickle_conversion,
    pipeline,
    target_matching,
)
from .allowed_losses import with_rounding_notes, without_base_dependence, write_with_losses
from .candidate import Candidate
from .lossy import LossAllowance

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

NO_LOSSES = LossAllowance()
Check = Callable[[Candidate, str, "BaseSpec | None", Callable[[], Adapter]], Adapter]
"""Called with a source, its format, the base that it is read with and the function that reads it; returns the adapter."""
_PROMPT_VARIABLES = "options or a date of its base's chat template are in the source, and not in what was written"


def sniff(path: Path | Candidate) -> str:
    """Return the format name of the adapter at `path`.

    Raises:
        NotFoundError: `path` does not exist, or is a folder without an adapter.
        RefusedError: It is a pickle or a distributed checkpoint.
        NotUnderstoodError: Its config is not one that any known format has.
        FormatError: It is not an adapter of any format.
    """
    candidate = Candidate.of(path)
    path = candidate.path
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder", code="no-such-file")
    if row := next((row for row in in_order() if row.sniff(candidate)), None):
        return row.name
    # No reader claims it. What follows only looks for the most helpful reason.
    _refuse_distributed(path)
    pickle_conversion.refuse(candidate)
    if candidate.is_whole_model:
        raise whole_model_error(path)
    problem = "not an adapter of a known format"
    if (path / peft.CONFIG).is_file():
        json_file.parse_object(candidate.config, str(path / peft.CONFIG))  # broken JSON is a better reason
        if adapter_claims.is_foreign(path):
            raise NotUnderstoodError(str(path), f"its {peft.CONFIG} is not one that any known format has")
        problem = f"{problem}: its {peft.CONFIG} has no peft_type"
        raise FormatError(str(path), problem, "Add the peft_type to its config", code="peft-type-missing", adapter=str(path))
    if os.path.lexists(path / peft.CONFIG):
        json_file.read_text(path / peft.CONFIG)  # refuses a pipe, a folder, and a link to nothing by name
    if path.is_dir():
        problem = f"no adapter in this folder: PEFT and MLX adapters have an {peft.CONFIG}"
        hint = peft.nested_adapter_hint(path) or "Name the folder or the file of an adapter"
        raise NotFoundError(str(path), problem, hint, code="no-adapter")
    raise FormatError(
        str(path), problem, "Name the folder, the .safetensors or the .gguf file of an adapter", code="no-adapter"
    )


def _refuse_distributed(path: Path) -> None:
    """Refuse a distributed checkpoint, in a folder or an archive, which Megatron and NeMo save by default."""
    if path.is_dir():
        checkpoint = next((item for item in (path, path / "weights") if any(item.glob("*.distcp"))), None)
        problem = (
            None
            if checkpoint is None
            else "its tensors are in Megatron's distributed checkpoint (.distcp), which is not supported"
        )
    else:
        problem = "NeMo archives (a tar with a distributed checkpoint) are not supported" if path.suffix == ".nemo" else None
    if problem:
        raise RefusedError(str(path), problem, "Export it to PEFT with Megatron-Bridge (AutoBridge.export_adapter_ckpt)")


def read(path: Path | Candidate, *, base: BaseSpec | None = None, mapped: bool = False) -> Adapter:
    """Return the adapter at `path`, in any format; with `mapped`, tensors of a PEFT folder may be views of its files."""
    candidate = Candidate.of(path)
    path = candidate.path
    try:
        if peft.sniff(candidate):
            # Only PEFT's reader can map files instead of loading them.
            return peft.read(candidate, base=base, mapped=mapped)
    except AdapterhubError:
        pickle_conversion.refuse(candidate)  # which may carry the name of a safetensors file
        raise
    pickle_conversion.refuse(candidate)
    candidate = candidate.adapter
    path, format_name = candidate.path, sniff(candidate)
    try:
        return find(format_name).read(candidate, base=base)
    except RefusedError as error:
        # A registry's manifest next to the files may describe the base that the reader asks for.
        recorded_base = _recorded_base(candidate) if error.code == "base-required" and base is None else None
        if recorded_base is None:
            raise
        return find(format_name).read(candidate, base=recorded_base)


def read_unordered(path: Path | Candidate, *, base: BaseSpec | None = None) -> tuple[Adapter, bool]:
    """Return the adapter at `path` for its shapes and value ranges, and whether the order of every row is known.

    The order is unknown in a GGUF made by llama.cpp if no base is given: llama.cpp permutes the rows of q and k by the base's
    number of heads.
    """
    candidate = Candidate.of(path)
    try:
        return read(candidate, base=base), True
    except RefusedError as error:
        candidate = candidate.adapter
        if error.code != "base-required" or sniff(candidate) != "gguf":
            raise
        from . import gguf

        return gguf.read(candidate, ordered=False), False


def convert(
    src: Path,
    dst: Path,
    *,
    to: str,
    base: BaseSpec | None = None,
    allowed: LossAllowance = NO_LOSSES,
    alpha: float | None = None,
    rslora: bool = False,
    unsafe_pickle: bool = False,
    dtype: str = "source",
    model: str | None = None,
    replace: bool = False,
    check: Check | None = None,
    confirm: Callable[[LossReport], object] | None = None,
) -> LossReport:
    """Write the adapter `src` in the format `to` as `dst`.

    An adapter that already has the format is checked and copied. Everything the format cannot express is refused in one error,
    unless it is `allowed` to be approximated or dropped.

    Args:
        src: A file or folder in any format.
        dst: A file or folder, whichever the format is. It must not exist, except that a folder may be empty.
        to: One of `formats.names()`. `ollama` is a folder with a GGUF and a Modelfile.
        base: The base model; if None, what an `adapter.json` next to the source records of it.
        allowed: What may be lost.
        alpha: The alpha of a file that does not record it.
        rslora: Whether such a file scales by alpha / sqrt(r).
        unsafe_pickle: Whether `src` may be a pickle.
        dtype: The type to store tensors as: `source`, or another of the format's `dtypes`.
        model: Ollama's name of the base; for `ollama` only.
        replace: Whether an earlier output at `dst` may be replaced.
        check: Reads the source in place of its format's reader, and may refuse it.
        confirm: Called with the losses before the output appears; may refuse it.

    Returns:
        The loss of each tensor.

    Raises:
        RefusedError: The format cannot express the adapter, or its scale is not recorded.
        FormatError: `src` is malformed.
        OutputExistsError: `dst` exists.
        ParameterError: An argument does not apply to these formats.
    """
    if to in PACKAGES:
        from . import gguf, ollama

        base_name, name = ollama.check(model), ollama.adapter_name(dst)
        # The GGUF and the Modelfile appear together or not at all.
        with atomic.pending_output(dst, replace=replace) as folder:
            report = convert(
                src, folder / name, to=PACKAGES[to], base=base, allowed=allowed, alpha=alpha, rslora=rslora,
                unsafe_pickle=unsafe_pickle, dtype=dtype, check=check, confirm=confirm,
            )  # fmt: skip
            # The GGUF records whether the adapter is conditional (aLoRA); Ollama would apply it to every token.
            if gguf.is_conditional(folder / name):
                raise RefusedError(to, ollama.CONDITIONAL)
            ollama.write(folder, base_name, name)
            notes = (ollama.NOTE, *ollama.prompt_notes(TrainedPrompt.read(folder / name)))
        return dataclasses.replace(report, notes=(*report.notes, *notes))
    if model is not None:
        raise ParameterError("model", f"{to} does not name a base", "Leave it out")
    # From here on `to` is a format of its own, not a package around one.
    row = find(to)
    if not row.writes:
        raise ParameterError("to", f"{to} can be read, but not written", f"One of {', '.join(names())}")
    if dtype not in row.dtypes:
        problem = f"{to} keeps the types of the source" if len(row.dtypes) == 1 else f"{to} has no dtype {dtype!r}"
        raise ParameterError("dtype", problem, f"One of {', '.join(row.dtypes)}")
    candidate = Candidate(src)
    base = base or _recorded_base(candidate)
    with pickle_conversion.open_source(candidate, unsafe_pickle=unsafe_pickle) as source:
        source_format = find(sniff(source))
        _check_scale(source_format, source.path, alpha=alpha, rslora=rslora)
        read_source = functools.partial(_read, source_format, source, base=base, alpha=alpha, rslora=rslora)
        with atomic.pending_output(dst, folder=row.folder, replace=replace) as temporary:
            adapter = check(source, source_format.name, base, read_source) if check else read_source()
            report = _write(row, source_format, source, adapter, temporary, base=base, allowed=allowed, dtype=dtype)
            if confirm:
                confirm(report)
            return dataclasses.replace(report, notes=(*report.notes, *_copy_template(row, source, temporary)))


def _write(
    row: Format,
    source_format: Format,
    source: Candidate,
    adapter: Adapter,
    path: Path,
    *,
    base: BaseSpec | None,
    allowed: LossAllowance,
    dtype: str,
) -> LossReport:
    """Write the adapter that was read from `source` in a format."""
    # Same format: copy the bytes, which are valid already, instead of writing them anew.
    if source_format == row and dtype == "source":
        return _copy(row, source.path, path, adapter, base)
    adapter = _with_base_names(adapter, row, base, str(source.path))
    if source_format != row:
        refuse_tuned(adapter)
    options = _write_options(row, source, dtype)

    def write(adapter_to_write: Adapter, path: Path) -> LossReport:
        adapter_to_write = pipeline.single_model(adapter_to_write) if row.deltas == "all" else adapter_to_write
        return row.write(adapter_to_write, path, base=base, **options)

    if row.deltas != "pairs":
        return write_with_losses(write, adapter, path, base, allowed)
    settled = without_base_dependence(adapter, base)
    return with_rounding_notes(adapter, write_with_losses(write, with_factored_as_pairs(settled), path, base, allowed), settled)


def _copy_template(row: Format, source: Candidate, folder: Path) -> tuple[str, ...]:
    """Write the chat template that an adapter was trained with into a folder; return a note on what only adapter.json has."""
    prompt = TrainedPrompt.read(source.path, source.record, source.gguf) if row.folder else PROMPT_OF_BASE
    return () if prompt.write_template(folder) else (_PROMPT_VARIABLES,)


def _write_options(row: Format, source: Candidate, dtype: str) -> dict[str, Any]:
    """Return the arguments of a format's writer: the type of the tensors, and in a GGUF the prompt of the adapter."""
    options: dict[str, Any] = {"dtype": dtype} if len(row.dtypes) > 1 else {}
    return options | ({"prompt": TrainedPrompt.read(source.path, source.record, source.gguf)} if row.name == "gguf" else {})


def _check_scale(row: Format, path: Path, *, alpha: float | None, rslora: bool) -> None:
    """Refuse an alpha, or a scale by the root of the rank, for a format that records its own."""
    if alpha is not None and not row.alpha:
        raise ParameterError("alpha", f"{path} is in {row.name}, which records its own alpha", "Leave it out")
    if rslora and not row.rslora:
        scale = "scales by alpha / r" if row.alpha else "records its own scale"
        raise ParameterError("rslora", f"{path} is in {row.name}, which {scale}", "Leave it out")


def _read(row: Format, source: Candidate, *, base: BaseSpec | None, alpha: float | None, rslora: bool) -> Adapter:
    options: dict[str, Any] = {"mapped": True} if row.name == "peft" else {}
    options |= {"alpha": alpha} if row.alpha else {}
    with gc_pause.pause_gc():
        return row.read(source, base=base, **options | ({"rslora": rslora} if row.rslora else {}))


def _copy(row: Format, src: Path, dst: Path, adapter: Adapter, base: BaseSpec | None) -> LossReport:
    """Copy the files of an adapter that already has the format; upgrade the layout of files from an earlier peft."""
    if not all((src / file).is_file() for file in row.files):
        return row.write(adapter, dst)  # in shards: written as one file, which PEFT itself can load
    for file in row.files or ("",):
        shutil.copyfile(src / file, dst / file)
    newer = peft.upgrade_layout(adapter, base) if row.name == "peft" else adapter
    # Experts that the reader stacked are in another form than in the file, which then is no source.
    is_stacked = adapter.source is None and any(isinstance(delta, StackedLowRank) for delta in adapter.deltas.values())
    if newer is not adapter or (row.name == "peft" and is_stacked):
        return _rewrite(row, newer, dst, base)
    return LossReport(tuple(TensorLoss(name, Loss.EXACT) for name, _ in adapter.tensors()), adapter.notes)


def _rewrite(row: Format, adapter: Adapter, dst: Path, base: BaseSpec | None) -> LossReport:
    """Write an adapter over the copy of its files, whose experts have changed."""
    for file in row.files:
        # Writers create new files and never overwrite.
        (dst / file).unlink()
    report = row.write(adapter, dst, base=base)
    losses = [
        dataclasses.replace(line, loss=max(line.loss, Loss.REWRITTEN)) if ".experts." in line.name else line
        for line in report.losses
    ]
    return dataclasses.replace(report, losses=tuple(losses))


def _with_base_names(adapter: Adapter, row: Format, base: BaseSpec | None, location: str) -> Adapter:
    """Return the adapter after checking its targets against the base, if one was given.

    For PEFT, targets are renamed to what the modules are called in memory.
    """
    if row.name == "gguf":  # whose writer compares shapes as well
        return peft.stack_experts(adapter, base) if _has_stacked_experts_only(base) else adapter
    renamed = target_matching.match_targets(adapter, base, location)
    is_peft = adapter.source is not None and adapter.source.format == "peft"
    return renamed if row.deltas == "all" and not is_peft else adapter


def _has_stacked_experts_only(base: BaseSpec | None) -> bool:
    """Return whether the base's architecture has its experts in stacks only, even in its checkpoints."""
    with contextlib.suppress(RefusedError):
        return (
            base is not None
            and (architecture := base.llama_cpp_architecture()).experts is not None
            and not architecture.lists_experts
        )
    return False


def _recorded_base(candidate: Candidate) -> BaseSpec | None:
    """Return the base described by the `adapter.json` next to an adapter; None if it has no architecture or config."""
    base = candidate.record.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("architecture"), str) or not isinstance(base.get("config"), dict):
        return None
    config = base["config"]
    repo, revision = (value if isinstance(value := base.get(key), str) else None for key in ("repo", "revision"))
    return bases.BaseSpec(
        source=str((candidate.path if candidate.path.is_dir() else candidate.path.parent) / ADAPTER_JSON),
        kind="manifest",
        architecture=base["architecture"],
        model_type=str(base.get("model_type") or ""),
        config=config,
        # Without an entry it must not be assumed to be untied: llama.cpp would abort on a wrong guess.
        tied=config.get("tie_word_embeddings") is not False,
        repo=repo,
        revision=revision,
    )
