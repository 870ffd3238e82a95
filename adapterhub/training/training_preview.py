"""A preview of a training run: its data, its steps, and the least time that they take."""

from __future__ import annotations

from adapterhub.prompts import chat_template
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.lazy_dataclass import dataclass

from .cost import memory
from .data.dataset import configured_prompt
from .data.survey import Count, Survey, survey
from .train_config import TrainConfig


@dataclass(frozen=True)
class Preview:
    """The data of a training run, and the time of its steps.

    Attributes:
        matmul: Floating-point operations per second of a matrix product on this machine, measured now; None without torch,
            and for another machine.
        seconds: The time of the steps' arithmetic at that rate: a lower bound, without loading and evaluations.
        dtype_notes: Notes on the dtype, which this machine may lack or multiply slowly.
    """

    data: Survey
    matmul: float | None = None
    seconds: float | None = None
    dtype_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """All notes for the user, one line each."""
        return *self.dtype_notes, *self.data.notes


def preview(config: TrainConfig, *, can_train: bool, on_this_machine: bool) -> Preview:
    """Preview a training run as `adapterhub.training.preview` does; `can_train` tells whether the extra is installed."""
    if not can_train or not config.base_path.exists():  # the training downloads its base first
        return Preview(survey(config, None))
    from .model.base_files import BaseFiles

    with BaseFiles(config.base_path) as files:
        spec, (_, tokenizer) = files.spec, files.config_and_tokenizer()
    chat_template.apply(tokenizer, configured_prompt(config, tokenizer))
    data_survey = survey(config, tokenizer)
    if not on_this_machine or data_survey.count is None:
        return Preview(data_survey)
    rate, dtype_notes = _matmul_rate(config)
    return Preview(data_survey, rate, _operations(config, spec, data_survey.count) / rate, tuple(dtype_notes))


def _operations(config: TrainConfig, spec: BaseSpec, count: Count) -> int:
    """Return the floating-point operations of all steps, each of which reads and learns from its share of the rows."""
    # A number of steps may repeat rows or leave some out; epochs read all rows equally often.
    passes = count.steps * config.train.rows / count.rows if config.train.steps else config.train.epochs
    tokens, label_tokens = round(passes * count.read), round(passes * count.trained)
    trained = memory.parameters(config, spec)[1]
    return memory.flops(config, spec, tokens=tokens, label_tokens=label_tokens, trained=trained, context=count.context)


def _matmul_rate(config: TrainConfig) -> tuple[float, list[str]]:
    """Return the rate of a matrix product in the dtype that this machine would compute in, and notes on that dtype."""
    import torch

    from . import compute_device
    from .cost.meter import matmul_rate

    with compute_device.threads(config.train.threads):
        device = compute_device.select(config.base.device)
        dtype, notes = compute_device.supported_dtype(config.base.dtype, compute_device.capability(device))
        return matmul_rate(getattr(torch, dtype), device), notes + compute_device.dtype_notes(dtype, device)
