"""Merge adapters into one adapter, module by module, without the base.

Ranks, targets, alphas and rsLoRA may differ: the terms of a module have their true scales. Anything that a method cannot merge
is refused by name (see the table in docs/merge.md). The result is in float32 with alpha = r, so that its scaling is 1 in every
program, even if modules differ in rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace

import numpy as np

from adapterhub.analysis.low_rank import Factors, norm
from adapterhub.merging.adapter_checks import check_adapter
from adapterhub_converters import display
from adapterhub_converters.adapter import Adapter, LowRank, LowRankConv, Meta, refuse_conditions, with_factored_as_pairs
from adapterhub_converters.errors import ParameterError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import other_parts
from .matrices import (
    Mergeable,
    base_oriented_terms,
    check_size,
    delta_like,
    mergeable_deltas,
    reorient,
    rounding_error,
    sign_conflict,
    stack_cosines,
    unscaled_terms,
    zeros_like,
)
from .methods import Matrix, Method, Random, method_named
from .tiled_matrix import TiledMatrix, residual
from .truncation import ModuleSpectra, Truncation, lost_share, ranks_within, spectra
from .untruncated_merge import UntruncatedMerge

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModuleMerge:
    """The merge of one module.

    Attributes:
        ranks: The ranks of the adapters that change it, in their order.
        rank: The rank of the result.
        error: The norm of the result minus the method's exact result, over the norm of the latter: truncation and the rounding
            to float32; up to 1e-7 is rounding.
        lost: The share of the energy, the sum of all squares, that truncation left out.
        cosines: Between the deltas of those adapters, without their weights.
        signs: The share of elements that some of the weighted adapters raise and others lower.
        exact: Whether all elements were compared for `signs`, not a sample of 65,536.
    """

    ranks: tuple[int, ...]
    rank: int
    error: float
    cosines: tuple[tuple[float, ...], ...]
    lost: float = 0.0
    signs: float = 0.0
    exact: bool = True


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The results of a merge of adapters, by module path; `seed` is None if no random number was drawn."""

    method: str
    weights: tuple[float, ...]
    modules: Mapping[str, ModuleMerge]
    notes: tuple[str, ...] = ()
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    seed: int | None = None

    @property
    def error(self) -> float:
        """The largest error of a module."""
        return max((module.error for module in self.modules.values()), default=0.0)

    def __repr__(self) -> str:
        return f"<MergeReport: {self.method}, {len(self.modules)} modules, largest relative error {self.error:.2g}>"

    def _repr_html_(self) -> str:
        rows = [
            (name, "+".join(map(str, module.ranks)), module.rank, f"{module.lost:.2%}", f"{module.error:.1e}")
            for name, module in self.modules.items()
        ]
        return display.table(rows, head=("module", "ranks", "r", "energy lost", "error"), caption=repr(self))


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    seed: int = 0,
    parameters: Mapping[str, float | str] | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, MergeReport]:
    """Merge weighted adapters into one by a method.

    Args:
        adapters: Adapters trained on the same base.
        weights: One for each adapter; a negative weight subtracts.
        method: A name in `METHODS`.
        rank: The rank of every module; None for the method's own.
        energy: The share of the sum of squares of every module to keep, in place of a rank.
        budget: The largest number of bytes of the result's tensors, in place of a rank.
        seed: The seed of random numbers, for methods and sketches of dense matrices that draw any.
        parameters: The method's parameters by name; defaults for those that are missing.
        progress: Called with the number of modules done and of all modules.

    Returns:
        The merged adapter and a report.

    Raises:
        RefusedError: The method cannot merge these adapters, or they do not belong together.
        UsageError: The method or a parameter does not exist, or cannot take this value.
    """
    merge_method, cut = method_named(method), Truncation(rank, energy, budget)
    resolved = _resolve_parameters(merge_method, cut, adapters, weights, parameters or {})
    for adapter, weight in zip(adapters, weights, strict=True):
        check_adapter(adapter, weight)
        refuse_conditions(adapter)
        if adapter.meta.method:
            reason = f"an adapter by {adapter.meta.method} is no sum of deltas"
            raise RefusedError(next(iter(adapter.replaced), "adapter"), reason, "Merge it into its base")
    other_parts.check_unmerged(adapters, merge_method)
    # LoHa, LoKr and others as the pairs they equal, so that every method sees plain factors.
    factored = [with_factored_as_pairs(adapter) for adapter in adapters]
    meta, notes = _meta(factored)
    run = _MergeRun(merge_method, cut, resolved, seed)
    weighted = list(zip(factored, weights, strict=True))
    targets = dict.fromkeys(target for adapter in factored for target in adapter.deltas)
    deltas: dict[str, Mergeable] = {}
    modules: dict[str, ModuleMerge] = {}
    for count, (target, delta, merged) in enumerate(run.modules(targets, weighted), 1):
        deltas[target], modules[target] = delta, merged
        if progress:
            progress(count, len(targets))
    # A vanished module loads without an error and does nothing, so the report has to say it.
    if vanished := [target for target, delta in deltas.items() if not (delta.lora_A.any() and delta.lora_B.any())]:
        notes += (f"{len(vanished)} of {len(deltas)} modules became zero, for example {vanished[0]}",)
    # A bias has no low-rank form, so only a plain sum can merge it.
    bias_sums = other_parts.merged_biases(weighted) if merge_method.sums else {}
    for target, bias in bias_sums.items():
        deltas[target] = _with_bias(deltas[target], bias)
    result = Adapter(
        deltas,
        replaced=other_parts.merged_replacements(weighted) if merge_method.sums else {},
        rows=other_parts.merged_rows(weighted) if merge_method.sums else {},
        meta=meta,
    )
    notes += tuple(dict.fromkeys(note for adapter in factored for note in adapter.notes))
    return result, MergeReport(method, tuple(weights), modules, notes, resolved, seed if run.random else None)


def join(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str,
    seed: int = 0,
    parameters: Mapping[str, float | str] | None = None,
) -> UntruncatedMerge | None:
    """Return a method for a merge into a base, where the result needs no rank; None for a sum, which the merge does itself.

    Raises:
        UsageError: As in `combine`; also for a method that merges `lora_A` and `lora_B` separately.
    """
    merge_method = method_named(method)
    resolved = _resolve_parameters(merge_method, Truncation(), adapters, weights, parameters or {})
    return None if merge_method.sums else UntruncatedMerge(method, resolved, weights, seed)


def _with_bias(delta: Mergeable, bias: np.ndarray) -> Mergeable:
    return replace(delta, bias=bias) if isinstance(delta, LowRank | LowRankConv) else delta


def _resolve_parameters(
    method: Method,
    cut: Truncation,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    user_parameters: Mapping[str, float | str],
) -> dict[str, float | str]:
    """Return the method's parameters, defaults included; raise for a count, weights or a truncation that it cannot take."""
    if len(weights) != len(adapters) or not adapters:
        raise ParameterError("weights", f"{len(weights)} weights for {len(adapters)} adapters")
    count_min, count_max = method.count
    if not count_min <= len(adapters) <= count_max:
        limit = count_min if len(adapters) < count_min else count_max
        bound = "exactly" if count_min == count_max else "at least" if len(adapters) < count_min else "at most"
        count = f"{bound} {limit} {'adapter' if limit == 1 else 'adapters'}"
        raise ParameterError("method", f"{method.name} merges {count}, not {len(adapters)}")
    if method.weights == "none" and any(weight != 1 for weight in weights):
        reason = f"{method.name} takes no weights"
        if "t" in method.parameters:
            raise ParameterError("weights", reason, "Set t instead", code="t-for-weights")
        raise ParameterError("weights", reason, "Leave them out")
    if method.weights == "shares" and not (min(weights) >= 0 and sum(weights) > 0):
        raise ParameterError("weights", f"for {method.name} they are shares of a whole: none may be negative, nor all 0")
    cut.check()
    if cut.is_set and not method.cuts:
        raise ParameterError("rank", f"{method.name} keeps the sum exactly and takes no rank", "Use svd to choose one")
    return method.resolve_parameters(user_parameters)


def _meta(adapters: Sequence[Adapter]) -> tuple[Meta, tuple[str, ...]]:
    """Return the facts that the adapters share, and notes; refuse adapters of different bases."""
    bases = _distinct(adapter.meta.base_model for adapter in adapters)
    if len(bases) > 1:
        raise RefusedError("base", f"the adapters were trained on different models: {', '.join(bases)}", code="different-bases")
    revisions = _distinct(adapter.meta.revision for adapter in adapters)
    if len(revisions) > 1:
        raise RefusedError(
            "base", f"the adapters were trained on different revisions of it: {', '.join(revisions)}", code="different-bases"
        )
    tasks = _distinct(adapter.meta.task_type for adapter in adapters)
    notes = (f"task_type is left out: the adapters have {', '.join(tasks)}",) if len(tasks) > 1 else ()
    meta = Meta(_only(bases), _only(revisions), _only(tasks))
    return meta, notes


def _distinct(values: Iterable[str | None]) -> list[str]:
    """Return the distinct values that are set."""
    return list(dict.fromkeys(value for value in values if value))


def _only(values: list[str]) -> str | None:
    """Return the value if there is exactly one, else None."""
    return values[0] if len(values) == 1 else None


@dataclass
class _MergedModule:
    """A module with its merged matrices: one, or one for each expert of a stack."""

    first: Mergeable
    ranks: tuple[int, ...]
    matrices: list[Matrix]
    scaled: list[list[Factors]]  # by matrix, by adapter
    weights: list[float]


@dataclass
class _MergeRun:
    """A merge in progress; `random` is set once a random number is drawn."""

    method: Method
    cut: Truncation
    parameters: Mapping[str, float | str]
    seed: int
    random: bool = False

    def modules(
        self, targets: Iterable[str], weighted: Sequence[tuple[Adapter, float]]
    ) -> Iterator[tuple[str, Mergeable, ModuleMerge]]:
        """Yield the merged modules one by one; with a budget, decompose all before the first is truncated."""
        # Without a budget each module is independent: merge and truncate it before the next, in constant memory.
        if self.cut.budget is None:
            for target in targets:
                module = self._merge(target, weighted)
                yield target, *self._truncate(target, module, self._spectra(target, module), None)
            return
        spectra_by_target = {target: self._spectra(target, self._merge(target, weighted)) for target in targets}
        ranks = ranks_within(
            self.cut.budget, {target: module_spectra for target, module_spectra in spectra_by_target.items() if module_spectra}
        )
        for target, module_spectra in spectra_by_target.items():
            # Merged again rather than kept: the dense matrices of all modules would not fit into memory.
            yield target, *self._truncate(target, self._merge(target, weighted), module_spectra, ranks[target])

    def _merge(self, target: str, weighted: Sequence[tuple[Adapter, float]]) -> _MergedModule:
        """Merge the deltas of one module by the method, matrix by matrix."""
        deltas = [adapter.deltas.get(target) for adapter, _ in weighted]
        present = mergeable_deltas(target, [delta for delta in deltas if delta is not None])
        weights = [weight for delta, (_, weight) in zip(deltas, weighted, strict=True) if delta is not None]
        ranks = tuple(delta.r for delta in present)
        if self.method.on_factors and len(set(ranks)) > 1:
            raise RefusedError(
                target,
                f"{self.method.name} merges A and B separately and needs equal ranks, not {', '.join(map(str, ranks))}",
                "Use a method without peft_, or rerank the adapters first",
            )
        scaled = list(zip(*map(base_oriented_terms, present), strict=True))
        scales = [delta.scaling for delta in present]
        for matrix_terms in scaled:
            check_size(target, matrix_terms, weights, dense=self.method.dense)
        terms_by_matrix = list(zip(*map(unscaled_terms, present), strict=True)) if self.method.on_factors else scaled
        matrices = []
        for part, matrix in enumerate(terms_by_matrix):
            terms, matrix_weights = list(matrix), list(weights)
            if self.method.missing == "zeros" and len(present) < len(deltas):
                matrix_weights = [weight for _, weight in weighted]
                filled = iter(terms)
                terms = [next(filled) if delta is not None else zeros_like(matrix[0]) for delta in deltas]
            # Seeded by module and matrix, so that the order of modules does not change the result.
            random = Random(self.seed, target, part)
            merged = self.method(terms, matrix_weights, scales=scales, random=random, parameters=self.parameters)
            matrices.append(reorient(present[0], merged) if self.method.on_factors and isinstance(merged, Factors) else merged)
        self.random |= self.method.random or any(isinstance(matrix, TiledMatrix) for matrix in matrices)
        return _MergedModule(present[0], ranks, matrices, [list(matrix) for matrix in scaled], weights)

    def _spectra(self, target: str, module: _MergedModule) -> ModuleSpectra | None:
        """Return the singular values of a module; None if its factors are kept."""
        if self.method.keeps == "factors" and not self.cut.is_set:
            return None
        return spectra(module.matrices, ranks=module.ranks, cut=self.cut, random=Random(self.seed, f"{target} sketch"))

    def _truncate(
        self, target: str, module: _MergedModule, module_spectra: ModuleSpectra | None, rank: int | None
    ) -> tuple[Mergeable, ModuleMerge]:
        """Return the module's delta at its rank, and the report on it."""
        if module_spectra is None:
            factors = [matrix for matrix in module.matrices if isinstance(matrix, Factors)]
            left_out = 0.0
        else:
            rank = rank or self._rank(module, module_spectra)
            factors, left_out = module_spectra.truncate(rank), lost_share(module_spectra, rank)
        result = delta_like(target, module.first, factors)
        total_energy, error_energy = module_spectra.energy if module_spectra else 0.0, 0.0
        for matrix, exact_factors, stored_factors in zip(module.matrices, factors, base_oriented_terms(result), strict=True):
            if isinstance(matrix, TiledMatrix):
                error_energy += residual(matrix, stored_factors) ** 2
                matrix.forget()
            else:
                total_energy += 0 if module_spectra else norm(matrix) ** 2
                error_energy += rounding_error(stored_factors, exact_factors) ** 2
        if module_spectra and not any(isinstance(matrix, TiledMatrix) for matrix in module.matrices):
            error_energy += left_out * module_spectra.energy  # at right angles to what is kept
        error = (error_energy / total_energy) ** 0.5 if total_energy else 0.0
        signs = [sign_conflict(terms, module.weights) for terms in module.scaled]
        share = sum(value for value, _ in signs) / len(signs)
        agree = stack_cosines(module.scaled)
        exact = all(exact for _, exact in signs)
        return result, ModuleMerge(module.ranks, factors[0].r, error, agree, left_out, share, exact)

    def _rank(self, module: _MergedModule, module_spectra: ModuleSpectra) -> int:
        """Return the rank that the truncation or the method asks for."""
        if self.cut.energy is not None:
            return module_spectra.rank_for(self.cut.energy) or module_spectra.rank
        rank = self.cut.rank or (max(module.ranks) if self.method.keeps == "largest" else module_spectra.rank)
        return min(rank, module_spectra.rank)
