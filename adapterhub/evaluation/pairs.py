"""Preference pairs in an evaluation: how often a base with and without an adapter prefers the chosen side, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.training.data.document_files import DataFile
from adapterhub.training.data.packed_rows import Rows
from adapterhub.training.data.record_shapes import CHOSEN_SIDES
from adapterhub.training.loop.preference import METHODS, Sums, sums_of_pairs
from adapterhub.training.model.base_model import Base
from adapterhub.training.train_config import PreferenceConfig
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.lazy_dataclass import dataclass

from .results import PairComparison


@dataclass(frozen=True, eq=False)
class PairRows:
    """Rows of pairs, and the method of `[preference]` that compares their sides."""

    rows: Rows
    preference: PreferenceConfig

    def sums(self, base: Base, size: int) -> Sums:
        """Return the sums of all pairs under the base as it is now, computed `size` rows at a time."""
        return sums_of_pairs(base, self.rows, size)

    def compare(self, adapted: Sums, base: Sums) -> PairComparison:
        """Compare the sums with the adapter and without it."""
        (accuracy, margin), (base_accuracy, base_margin) = (self._accuracy_and_margin(sums, base) for sums in (adapted, base))
        return PairComparison(
            self.preference.method, self.preference.strength, len(base.logprobs), accuracy, margin, base_accuracy, base_margin
        )

    def _accuracy_and_margin(self, sums: Sums, reference: Sums) -> tuple[float, float]:
        """Return the share of the pairs whose margin is above 0, and the mean margin."""
        with_reference = Sums(sums.logprobs, sums.labels, reference.logprobs)
        _, margins = METHODS[self.preference.method](with_reference, self.preference.strength, self.preference.gamma)
        return float((margins > 0).double().mean()), float(margins.double().mean())


def are_pairs(files: Sequence[DataFile]) -> bool:
    """Return whether all documents are the chosen sides of preference pairs."""
    return all(file.shapes.keys() == {CHOSEN_SIDES} for file in files)


def preference_of(recorded: Mapping[str, Any]) -> PreferenceConfig:
    """Return the preference that an adapter was trained with, as its record says; `dpo` with its usual beta without one."""
    method: Any = recorded.get("method")
    beta, gamma = recorded.get("beta"), recorded.get("gamma")
    # The record of another trainer may contain anything.
    if not isinstance(method, str) or method not in METHODS:
        return PreferenceConfig("dpo")
    valid_beta = float(beta) if is_number(beta) and beta > 0 else None
    valid_gamma = float(gamma) if is_number(gamma) else PreferenceConfig.gamma
    return PreferenceConfig(method, valid_beta, valid_gamma)  # type: ignore[arg-type]  # a key of METHODS
