"""What a merge method is: a function from weighted matrices to a matrix, its parameters read off its annotations.

A method gets what one module's adapters add, `terms[i] = scaling_i * lora_B_i @ lora_A_i`, and is a function of those
matrices alone, never of how they happen to be factored; peft's own, which work on the factors, are the exception.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub.merge.adapters.dense import Tiled
from adapterhub_converters.errors import UsageError

Matrix = Factors | Tiled
_GIVEN = ("random", "scales")  # keyword arguments that are no parameters of the user's


@dataclass(frozen=True)
class Between:
    """The numbers a parameter may be, both ends among them unless `above` leaves out the first."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.above else 'at least'} {self.low:g}"
        return f"above {self.low:g} and up to {self.high:g}" if self.above else f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class OneOf:
    """The words a parameter may be."""

    words: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Parameter:
    """A keyword argument of a method, under the name that its user writes."""

    kind: type
    default: float | str
    limits: Between | OneOf


class Random:
    """Random numbers by seed, module, adapter and rows, so that neither order nor size of the work changes them."""

    def __init__(self, seed: int, target: str, part: int = 0) -> None:
        self._key = [seed, int.from_bytes(hashlib.sha256(target.encode()).digest()[:8], "big"), part]

    def generator(self, *place: int) -> np.random.Generator:
        """One for each place, like the number of an adapter and its first row."""
        return np.random.default_rng([*self._key, *place])


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        run: `(terms, weights, *, parameters…)` to the merged matrix; with `random`, and for one that is `apart` with `scales`.
        keeps: The rank of the result when none is asked for: that of the factors it returns, the least that holds the
            matrix exactly, or the largest of the adapters'.
        weights: Whether they multiply, only count in relation to each other (none negative), or aren't taken.
        count: The fewest and the most adapters.
        missing: An adapter that leaves a module alone is left out there, or takes part with zeros.
        sums: The result is the weighted sum, so that what adapters do beside low-rank deltas can be summed as well.
        cuts: Takes a rank, an energy or a budget.
        apart: Works on `lora_A` and `lora_B` apart, so that the ranks have to be equal.
    """

    run: Callable[..., Matrix]
    keeps: Literal["factors", "least", "largest"] = "least"
    weights: Literal["factors", "shares", "none"] = "factors"
    count: tuple[int, int] = (1, 1000)
    missing: Literal["left out", "zeros"] = "left out"
    sums: bool = False
    cuts: bool = True
    apart: bool = False

    @property
    def name(self) -> str:
        """What it is called by its user."""
        return self.run.__name__

    @property
    def summary(self) -> str:
        """The first line of its description."""
        return inspect.cleandoc(self.run.__doc__ or "").partition("\n")[0]

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """Its own ones; `lambda` is a word of Python's, so the function has `lambda_`."""
        hints = typing.get_type_hints(self.run, include_extras=True)
        found = {}
        for name, argument in inspect.signature(self.run).parameters.items():
            if argument.kind is argument.KEYWORD_ONLY and name not in _GIVEN:
                kind, limits = typing.get_args(hints[name])
                found[name.rstrip("_")] = Parameter(kind, argument.default, limits)
        return found

    @cached_property
    def random(self) -> bool:
        """Whether it takes random numbers itself."""
        return "random" in inspect.signature(self.run).parameters

    @cached_property
    def dense(self) -> bool:
        """Whether it works on the elements of the dense delta."""
        return typing.get_type_hints(self.run)["return"] is Tiled

    def settled(self, given: Mapping[str, float | str]) -> dict[str, float | str]:
        """All parameters, the defaults filled in; UsageError for one it hasn't, or that may not be so."""
        settled: dict[str, float | str] = {}
        for name in given:
            if name not in self.parameters:
                known = ", ".join(f"--{own}" for own in self.parameters)
                raise UsageError(f"--{name}", f"{self.name} takes none", f"It takes {known}" if known else "")
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if not isinstance(value, str if parameter.kind is str else int | float) or value not in parameter.limits:
                raise UsageError(f"--{name}", f"{value} is not {parameter.limits}")
            settled[name] = value if parameter.kind is str else parameter.kind(value)
        return settled

    def __call__(
        self,
        terms: Sequence[Factors],
        weights: Sequence[float],
        *,
        scales: Sequence[float],
        random: Random,
        parameters: Mapping[str, Any],
    ) -> Matrix:
        """The merged matrix of one module; `terms` are without their `scales` if the method is `apart`."""
        words = {f"{name}_" if name == "lambda" else name: value for name, value in parameters.items()}
        if self.random:
            words["random"] = random
        if self.apart:
            words["scales"] = scales
        return self.run(terms, weights, **words)
