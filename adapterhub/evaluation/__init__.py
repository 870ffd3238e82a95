"""The evaluation of an adapter on held-out data, beside its base.

It reads the data, loads the base and computes the losses with the modules of `training`, so that it measures what a training
measures. Importing this package does not import torch.

results          the settings and the results
comparison       a base with and without an adapter: the same rows, one model in memory
document_losses  the loss of each document; `pairs`, how often the chosen side of a pair is preferred
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from adapterhub.training import InitialAdapter, check_extra

from .results import EvaluationOptions, EvaluationResult, PairComparison

__all__ = ["EvaluationOptions", "EvaluationResult", "PairComparison", "evaluate", "evaluate_sets"]


def evaluate(
    adapter: InitialAdapter,
    base: Path,
    files: list[Path],
    options: EvaluationOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> EvaluationResult:
    """Return the loss of the base model at `base` with and without an adapter, on the documents of `files`.

    The model is loaded once; the adapter's deltas are disabled to compute the loss of the base. Of preference pairs, the losses
    are those of the chosen sides, and `pairs` tells how often and by how much those are preferred.

    Args:
        progress: Called with the number of layers loaded so far and the total.
        cache: The folder for quantized bases and digests of unchanged files; None for no cache.

    Raises:
        MissingExtraError: torch or another library of the extra is not installed.
        RefusedError: The adapter is for another base, or has parts that the layers cannot represent.

    Example:
        `evaluate(adapter, Path("Qwen3-0.6B"), [Path("heldout.jsonl")], EvaluationOptions()).metrics["perplexity"]`
    """
    [result] = evaluate_sets(adapter, base, [files], options, progress=progress, cache=cache)
    return result


def evaluate_sets(
    adapter: InitialAdapter,
    base: Path,
    data_sets: Sequence[Sequence[Path]],
    options: EvaluationOptions,
    *,
    against: InitialAdapter | None = None,
    against_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> list[EvaluationResult]:
    """Return the result of each data set, as `evaluate` does, for one loading of the base.

    Args:
        data_sets: The files of each data set.
        against: Another adapter, to compare with on the same documents; it is read and rendered as for the first.
        against_base: Compare with the base alone instead.
    """
    check_extra()
    from .comparison import compare

    return compare(
        adapter, base, data_sets, options, against=against, against_base=against_base, progress=progress, cache=cache
    )
