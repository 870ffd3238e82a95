"""Preference losses: DPO, ORPO and SimPO as functions of the summed log-probabilities of both sides.

The documents of a row are pairs, the chosen side before the rejected one (`data.packed_rows`). DPO compares with a reference,
the base, which is the model itself with deltas scaled by 0, so that no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from adapterhub.training.data.packed_rows import IGNORED, Rows, document_numbers
from adapterhub.training.layers.lora import without_delta
from adapterhub.training.model.base_model import Base
from adapterhub.training.train_config import PreferenceConfig
from adapterhub_converters.lazy_dataclass import dataclass

from .loss import Loss, evaluated_passes, logprobs, sum_of_parts

_MAX_MEAN_LOGPROB = -1e-6  # the odds of a mean log-probability of 0 would be infinite


@dataclass(frozen=True, eq=False)
class Sums:
    """The sums of pairs, the chosen side before the rejected one, all float32 `(pairs, 2)`.

    Attributes:
        logprobs: The log-probability of the answer, in nats.
        labels: The number of its tokens.
        reference: Its log-probability under the base; None if the method has no reference.
    """

    logprobs: Tensor
    labels: Tensor
    reference: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """The mean log-probability of a token."""
        return self.logprobs / self.labels


def dpo(sums: Sums, beta: float, _: float) -> tuple[Tensor, Tensor]:
    """Return losses and margins `(pairs,)` of direct preference optimization (arXiv 2305.18290, equation 7)."""
    rewards = beta * (sums.logprobs - sums.reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return -logsigmoid(margins), margins


def orpo(sums: Sums, beta: float, _: float) -> tuple[Tensor, Tensor]:
    """Return losses and margins `(pairs,)` of odds ratio preference optimization (arXiv 2403.07691, equations 6 and 7)."""
    means = sums.means.clamp(max=_MAX_MEAN_LOGPROB)
    odds = means - torch.log(-torch.expm1(means))
    margins = odds[:, 0] - odds[:, 1]
    return -means[:, 0] - beta * logsigmoid(margins), margins


def simpo(sums: Sums, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return losses and margins `(pairs,)` of simple preference optimization (arXiv 2405.14734, equation 6)."""
    rewards = beta * sums.means
    margins = rewards[:, 0] - rewards[:, 1]
    return -logsigmoid(margins - gamma), margins


METHODS: dict[str, Callable[[Sums, float, float], tuple[Tensor, Tensor]]] = {"dpo": dpo, "orpo": orpo, "simpo": simpo}


def preference_loss(base: Base, config: PreferenceConfig, pairs: int) -> Loss:
    """Return the loss for rows of a step with `pairs` pairs: the mean over all pairs of the step."""
    return lambda label_logprobs, rows: _pair_losses(base, config, label_logprobs, rows)[0].sum() / max(1, pairs)


def evaluate(base: Base, rows: Rows, size: int, config: PreferenceConfig) -> tuple[float, float, float]:
    """Return the mean loss of the pairs of all rows, the share with a margin above 0, and the mean margin."""
    sums: tuple[list[Tensor], ...] = ([], [], [])  # of losses, of margins above 0, and of margins, in each pass
    for batch, label_logprobs in evaluated_passes(base, rows, size):
        losses, margins = _pair_losses(base, config, label_logprobs, batch)
        # Sums, not means: the passes may have different numbers of pairs.
        for pass_sums, values in zip(sums, (losses, margins > 0, margins), strict=True):
            pass_sums.append(values.sum())
    loss, accuracy, margin = (sum_of_parts(pass_sums) / max(1, pair_count(rows)) for pass_sums in sums)
    return loss, accuracy, margin


def sums_of_pairs(base: Base, rows: Rows, size: int) -> Sums:
    """Return the sums of the pairs of all rows, without a reference, computed `size` rows at a time."""
    parts: list[tuple[Tensor, Tensor]] = []
    for batch, label_logprobs in evaluated_passes(base, rows, size):
        answer_lengths = _answer_lengths(batch)
        pairs = _complete_pairs(answer_lengths)
        parts.append((_sums_by_side(label_logprobs, batch).cpu()[pairs], answer_lengths[pairs]))
    return Sums(*(torch.cat(values) for values in zip(*parts, strict=True)))


def pair_count(rows: Rows) -> int:
    """Return the number of pairs in rows."""
    # A document counts once if it has any label; two documents are a pair.
    labeled = rows.labels != IGNORED
    return len(np.unique((np.arange(len(rows))[:, None] * rows.labels.shape[1] + document_numbers(rows))[labeled])) // 2


def _pair_losses(base: Base, config: PreferenceConfig, label_logprobs: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return losses and margins `(pairs,)` of rows whose label log-probabilities are given."""
    answer_logprobs, answer_lengths = _sums_by_side(label_logprobs, rows), _answer_lengths(rows)
    reference = None
    if config.method == "dpo":
        with without_delta(base.model):
            reference = _sums_by_side(logprobs(base, rows), rows)
    pairs = _complete_pairs(answer_lengths)
    complete_pairs, counts = (tensor.to(label_logprobs.device, non_blocking=True) for tensor in (pairs, answer_lengths[pairs]))
    sums = Sums(answer_logprobs[complete_pairs], counts, None if reference is None else reference[complete_pairs])
    return METHODS[config.method](sums, config.strength, config.gamma)


def _answer_lengths(rows: Rows) -> Tensor:
    """Return the number of labels of each document, float32, two per pair: `(pairs, 2)`."""
    return _sums_by_side(torch.from_numpy(rows.labels != IGNORED).float(), rows)


def _complete_pairs(answer_lengths: Tensor) -> Tensor:
    """Return the numbers of the pairs that both have labels: padding has none."""
    return (answer_lengths > 0).all(dim=1).nonzero().view(-1)


def _sums_by_side(values: Tensor, rows: Rows) -> Tensor:
    """Return the sums of `values` `(rows, tokens)` over each document, two per pair: `(pairs, 2)`."""
    documents = document_numbers(rows)
    places, width = torch.from_numpy(documents).to(values.device, non_blocking=True), 2 * (int(documents.max()) // 2 + 1)
    return values.new_zeros(len(values), width).scatter_add(1, places, values).view(-1, 2)
