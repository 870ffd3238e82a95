"""Merge methods as data: a function from weighted matrices to a matrix, with its parameters taken from its annotations.

A method gets the deltas of one module, `terms[i] = scaling_i * lora_B_i @ lora_A_i`, and depends on those matrices alone, not
on how they are factored; peft's own methods, which work on the factors, are the exception.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging.adapters.tiled_matrix import TiledMatrix
from adapterhub_converters.errors import ParameterError
from adapterhub_converters.lazy_dataclass import dataclass

Matrix = Factors | TiledMatrix
_INTERNAL = ("random", "scales")  # keyword arguments that the user does not set


@dataclass(frozen=True)
class Between:
    """A range of numbers that includes both ends, or with `above` only the upper one."""

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
    """A choice of words."""

    words: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Parameter:
    """A keyword argument of a method, which is annotated `Annotated[kind, limits, meaning]`."""

    kind: type[float] | type[str]
    default: float | str
    limits: Between | OneOf
    meaning: str

    def parse(self, text: str) -> float | str:
        """Return the value that a user wrote; the text itself if it should be a number and is none, which no limits contain."""
        try:
            return self.kind(text)
        except ValueError:
            return text


Density = Annotated[float, Between(0, 1, above=True), "share of the elements to keep"]
Lambda = Annotated[float, Between(0, above=True), "factor of the merged delta"]


class Random:
    """Random numbers by seed, module, adapter and rows, so that neither order nor tile size changes them."""

    def __init__(self, seed: int, target: str, part: int = 0) -> None:
        # A digest of the name, since Python's own hash of strings differs from run to run.
        self._key = [seed, int.from_bytes(hashlib.sha256(target.encode()).digest()[:8], "big"), part]

    def generator(self, *place: int) -> np.random.Generator:
        """Return a generator for a place, such as the index of an adapter and its first row."""
        return np.random.default_rng([*self._key, *place])


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        run: `(terms, weights, *, parameters…)` to the merged matrix; with `random` if it draws any, and `scales` if
            `on_factors`.
        keeps: The rank of the result if none is given: that of the returned factors, the least that holds the matrix exactly,
            or the largest of the adapters'.
        weights: Whether weights are factors, shares of a whole (none negative), or not taken.
        count: The least and the largest number of adapters.
        missing: Whether an adapter without a delta for a module is left out there, or counts as zeros.
        sums: Whether the result is the weighted sum, so that other parts of adapters can be summed as well.
        cuts: Whether it takes a rank, an energy or a budget.
        on_factors: Whether it works on `lora_A` and `lora_B` separately, so that ranks must be equal.
    """

    run: Callable[..., Matrix]
    keeps: Literal["factors", "least", "largest"] = "least"
    weights: Literal["factors", "shares", "none"] = "factors"
    count: tuple[int, int] = (1, 1000)
    missing: Literal["left out", "zeros"] = "left out"
    sums: bool = False
    cuts: bool = True
    on_factors: bool = False

    @property
    def name(self) -> str:
        """The name that users write."""
        return self.run.__name__

    @property
    def summary(self) -> str:
        """The first line of its description."""
        return inspect.cleandoc(self.run.__doc__ or "").partition("\n")[0]

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters by the names that users write; `lambda` is a Python keyword, so the function has `lambda_`."""
        hints = typing.get_type_hints(self.run, include_extras=True)
        parameters = {}
        for name, argument in inspect.signature(self.run).parameters.items():
            if argument.kind is argument.KEYWORD_ONLY and name not in _INTERNAL:
                kind, limits, meaning = typing.get_args(hints[name])
                parameters[name.rstrip("_")] = Parameter(kind, argument.default, limits, meaning)
        return parameters

    @cached_property
    def random(self) -> bool:
        """Whether the method itself draws random numbers."""
        return "random" in inspect.signature(self.run).parameters

    @cached_property
    def dense(self) -> bool:
        """Whether the method works on the elements of the dense delta."""
        return typing.get_type_hints(self.run)["return"] is TiledMatrix

    def parse_parameters(self, assignments: Iterable[str]) -> dict[str, float | str]:
        """Return the values of texts like `density=0.2`; ParameterError for an unknown name, or for a value out of range."""
        parameters: dict[str, float | str] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals:
                raise ParameterError("set", f"{assignment[:80]!r} is not KEY=VALUE", "Write it like density=0.2")
            parameter = self.parameters.get(name.strip())
            parameters[name.strip()] = parameter.parse(text.strip()) if parameter else text
        self.resolve_parameters(parameters)
        return parameters

    def resolve_parameters(self, user_parameters: Mapping[str, float | str]) -> dict[str, float | str]:
        """Return all parameters, with defaults; ParameterError for an unknown name, or for a value out of range."""
        resolved: dict[str, float | str] = {}
        for name in user_parameters:
            if name not in self.parameters:
                names = ", ".join(self.parameters) or "none"
                raise ParameterError(name, f"is not a parameter of {self.name}", f"It takes {names}")
        for name, parameter in self.parameters.items():
            value = user_parameters.get(name, parameter.default)
            # A string never passes for a number, whatever it says.
            if not isinstance(value, str if parameter.kind is str else int | float) or value not in parameter.limits:
                raise ParameterError(name, f"{value} is not {parameter.limits}")
            resolved[name] = value if parameter.kind is str else parameter.kind(value)
        return resolved

    def __call__(
        self,
        terms: Sequence[Factors],
        weights: Sequence[float],
        *,
        scales: Sequence[float],
        random: Random,
        parameters: Mapping[str, Any],
    ) -> Matrix:
        """Return the merged matrix of one module; for a method `on_factors` the `terms` do not include their `scales`."""
        keywords = {f"{name}_" if name == "lambda" else name: value for name, value in parameters.items()}
        if self.random:
            keywords["random"] = random
        if self.on_factors:
            keywords["scales"] = scales
        return self.run(terms, weights, **keywords)
