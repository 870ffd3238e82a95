"""Training and evaluation of adapters by path, ref or address.

The computation is in `adapterhub.training` and `adapterhub.evaluation`; this module looks up the adapter and records an
evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.measurement import DEFAULT, Evaluation, check_name
from adapterhub_converters.bases import hub_layout
from adapterhub_converters.errors import NotFoundError, ParameterError, UsageError

from . import base_sources, evaluation_log, sources
from .workspace import Progress, StrPath, Workspace, as_list

if TYPE_CHECKING:
    from adapterhub.evaluation import EvaluationResult
    from adapterhub.training import OnEvent, TrainConfig, TrainingResult
    from adapterhub.training.cost.budget import Forecast
    from adapterhub.training.train_config import BaseForm, LossTokens
    from adapterhub.training.trainer import Trainer
    from adapterhub_converters.formats import FloatDtype

BASE_ALONE = "base"
"""What `against` calls the base without an adapter."""
# Data types as the other functions name them, to the names of torch.
_DTYPES = {None: None, "bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def train(
    config: StrPath | TrainConfig,
    out: StrPath | None = None,
    *,
    on_event: OnEvent | None = None,
    start: StrPath | None = None,
    force: bool = False,
    replace: bool = False,
    workspace: Workspace | None = None,
) -> TrainingResult:
    """Train a LoRA adapter on a base held in four bits (QLoRA). Needs `pip install 'adapterhub[train]'`.

    The same config, data, base, machine and library versions give the same bytes. After an interrupt the same call resumes
    from the checkpoint next to `out`.

    Args:
        config: A TOML file, or a config that was read.
        out: The folder to write, whole or not at all; the config's path without its suffix if None.
        on_event: Called with each event: `Ready`, `StepEvent`, `EvaluationEvent`, `SaveEvent` … (`adapterhub.training`).
        start: An adapter to continue from: training begins with its factors, and it becomes the parent of the result.
        force: Start even if memory will not suffice.
        replace: Replace an adapter at `out`; else it must not exist.
        workspace: Where names are looked up; its `cache` keeps quantized bases.

    Raises:
        MissingExtraError: torch or another library of the extra is not installed.
        RefusedError: The data contain nothing to learn, the base is not supported, or memory will not suffice.

    Example:
        >>> result = ah.train("letters.toml", on_event=print)
        >>> result.folder.name
        'letters'
    """
    with open_trainer(
        config, out, on_event=on_event, start=start, force=force, replace=replace, workspace=workspace
    ) as trainer:
        trainer.run()
        return trainer.save()


@contextmanager
def open_trainer(
    config: StrPath | TrainConfig,
    out: StrPath | None = None,
    *,
    on_event: OnEvent | None = None,
    start: StrPath | None = None,
    force: bool = False,
    replace: bool = False,
    workspace: Workspace | None = None,
) -> Iterator[Trainer]:
    """Load a training for a program that does its own steps, such as with its own loss; arguments are those of `train`.

    Example:
        >>> with ah.open_trainer("letters.toml", "stepped") as trainer:
        ...     for batch in trainer.batches():
        ...         loss = trainer.forward_backward(batch)
        ...         stepped = trainer.optim_step()
        ...     result = trainer.save()
        >>> (result.steps, loss == stepped.loss)
        (30, True)
    """
    from adapterhub.training import InitialAdapter, read_config
    from adapterhub.training import open_trainer as opened

    workspace = workspace or Workspace()
    if isinstance(config, str | os.PathLike):
        out, config = out or Path(config).stem, read_config(Path(config))
    if out is None:
        raise ParameterError("out", "a config that was read has no name for the folder", "Name the folder")
    with ExitStack() as stack:
        initial = (
            InitialAdapter(*sources.initial_adapter(stack.enter_context(sources.open_source(start, workspace))))
            if start is not None
            else None
        )
        cache = Path(workspace.cache) if workspace.cache is not None else None
        config = _with_local_base(config, workspace)
        yield stack.enter_context(
            opened(config, Path(out), on_event=on_event, force=force, start=initial, cache=cache, replace=replace)
        )


def forecast(config: TrainConfig, *, memory: int | None = None, workspace: Workspace | None = None) -> Forecast:
    """Predict the needs of a training from the headers of its base; nothing is downloaded.

    Args:
        memory: The memory to plan for, in bytes, of a CUDA device if the config names one; None for this machine's device.
    """
    from adapterhub.training import card_memory
    from adapterhub.training.cost.budget import forecast as predicted

    path = config.base_path
    with _name_config_key(config):
        spec = base_sources.read_base(path if path.exists() else config.base.path, workspace or Workspace())
    card = card_memory(config) if memory is None else memory if config.base.device == "cuda" else None
    return predicted(config, spec, memory=memory, card=card)


@contextmanager
def _name_config_key(config: TrainConfig) -> Iterator[None]:
    """Prefix the error for a missing base with the key of the config that names it."""
    try:
        yield
    except NotFoundError as error:
        error.where = f"{config.location}: [base] path: {error.where}"
        raise


def _with_local_base(config: TrainConfig, workspace: Workspace) -> TrainConfig:
    """Return the config with its base on this disk, and with the name and the commit of a base from the Hub."""
    if config.base_path.exists():
        return config
    with _name_config_key(config):
        path = base_sources.weights(config.base.path, workspace)
    repo, commit = hub_layout.snapshot_of(path)
    base = replace(config.base, name=config.base.name or repo, revision=config.base.revision or commit)
    return replace(config, base=base, model=path)


def evaluate(
    source: StrPath,
    *,
    data: StrPath | Sequence[StrPath],
    base: StrPath,
    against: StrPath | None = None,
    trained_on: Sequence[StrPath] = (),
    tokens: int | None = None,
    sequence: int | None = None,
    loss: LossTokens | None = None,
    quantize: BaseForm | None = None,
    dtype: FloatDtype | None = None,
    threads: int | None = None,
    record: str | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> EvaluationResult:
    """Measure the perplexity of held-out data under a base with and without an adapter. Needs `adapterhub[train]`.

    Of preference pairs, `pairs` tells how often and by how much the chosen side is preferred, and the perplexity is that of the
    chosen sides.

    Args:
        source: A folder, a file, a ref or an address.
        data: Files that the adapter was not trained on, in the formats of a training.
        base: The model's folder, with its weights, or a GGUF file.
        against: Another adapter, named as `source` is, or `base`, the base alone: `against` of the result compares the
            perplexities, document by document.
        trained_on: Files that it was trained on; overlaps between `data` and these are noted.
        tokens: Use about so many tokens, evenly spread; all of them if None.
        sequence: The length of a sequence; this and the next three are as in the training if None.
        loss: The tokens that count, `all` or `completion`.
        quantize: How the base is kept in memory, `nf4` or `none`.
        dtype: The type to compute in, `bf16`, `f16` or `f32`.
        threads: The number of threads; torch's if None.
        record: Record the result under this name in the log of the version, where `source` is in the registry: a search finds
            `NAME_perplexity`. The version does not change.
        progress: Called while the base is loaded, with tensors done and in all.
        workspace: Where names are looked up.

    Raises:
        MissingExtraError: torch or another library of the extra is not installed.
        RefusedError: The adapter is for another base, or has parts that cannot be evaluated.

    Example:
        >>> measured = ah.evaluate("./letters", data="heldout.jsonl", base="./tiny")
        >>> measured.perplexity < measured.base_perplexity
        True
    """
    [result] = evaluate_sets(
        source,
        data={record or DEFAULT: as_list(data)},
        base=base,
        against=against,
        trained_on=trained_on,
        tokens=tokens,
        sequence=sequence,
        loss=loss,
        quantize=quantize,
        dtype=dtype,
        threads=threads,
        record=record is not None,
        progress=progress,
        workspace=workspace,
    ).values()
    return result


def evaluate_sets(
    source: StrPath,
    *,
    data: Mapping[str, Sequence[StrPath]],
    base: StrPath,
    against: StrPath | None = None,
    trained_on: Sequence[StrPath] = (),
    tokens: int | None = None,
    sequence: int | None = None,
    loss: LossTokens | None = None,
    quantize: BaseForm | None = None,
    dtype: FloatDtype | None = None,
    threads: int | None = None,
    record: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate several data sets by name with one loading of the base; arguments and errors are those of `evaluate`.

    Args:
        record: Record each result under the name of its data set, where `source` is in the registry or on a hub.
    """
    from adapterhub.evaluation import EvaluationOptions
    from adapterhub.evaluation import evaluate_sets as measured
    from adapterhub.training import InitialAdapter

    for name in data:
        check_name(name, "record")
    workspace = workspace or Workspace()
    model = base_sources.weights(base, workspace)
    if not (model.is_dir() or model.suffix == ".gguf"):
        raise UsageError(
            str(base), "is not a model", "Name the model's folder, with config.json and its weights, or a .gguf file"
        )
    training_files = tuple(Path(file) for file in trained_on)
    options = EvaluationOptions(quantize, _DTYPES[dtype], sequence, loss, tokens, threads=threads, trained_on=training_files)
    cache = Path(workspace.cache) if workspace.cache is not None else None
    sets = [[Path(file) for file in files] for files in data.values()]
    with ExitStack() as stack:

        def opened(adapter: StrPath) -> InitialAdapter:
            return InitialAdapter(*sources.initial_adapter(stack.enter_context(sources.open_source(adapter, workspace))))

        is_base = against == BASE_ALONE
        judged, other = opened(source), None if against is None or is_base else opened(against)
        results = measured(judged, model, sets, options, against=other, against_base=is_base, progress=progress, cache=cache)
    named = dict(zip(data, results, strict=True))
    if not record:
        return named
    evaluations = [Evaluation(name, result.metrics, result.data, result.base) for name, result in named.items()]
    is_recorded = evaluation_log.record(results[0].ref, results[0].digest, evaluations, workspace)
    return {name: replace(result, recorded=is_recorded) for name, result in named.items()}
