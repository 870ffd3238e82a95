"""The state of a rollout, as the log of the candidate's name has it: the message of an entry `rollout` about its digest.

The plan is part of it, so that all gateways follow the plan that the rollout began with, whatever their own route files say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

RUNNING, PAUSED, ROLLED_BACK, DONE = "running", "paused", "rolled back", "done"
STATES = (RUNNING, PAUSED, ROLLED_BACK, DONE)
_MAX_LENGTH = 20_000  # characters of a document
_MAX_STEPS, _MAX_COUNT = 64, 2**53
_MIN_ERROR = 1e-9  # the smallest error of a document; the logarithm of one near 0 is infinite


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """A step: the candidate's share of the requests in percent, and its seconds; 0 to wait for a person."""

    share: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutState:
    """Where a rollout stands.

    Attributes:
        route: The name of the gateways' route.
        stable: The version that the candidate is compared with, as `name@digest`.
        steps: The steps; after the last one, the candidate answers all requests.
        bounds: The bounds by name, as the route file has them.
        error: The chance that a candidate which is no worse is ever rolled back.
        state: One of STATES.
        step: The current step, from 0.
        seconds: Seconds that it has taken so far, of a clock that never jumps.
        counts: Worse, same and better pairs of requests, by bound.
        reason: Why it was paused or rolled back.
    """

    route: str
    stable: str
    steps: tuple[RolloutStep, ...]
    bounds: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.01
    state: str = RUNNING
    step: int = 0
    seconds: float = 0.0
    counts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    reason: str = ""

    @property
    def share(self) -> float:
        """The candidate's share of the requests now, in percent."""
        if self.state == DONE:
            return 100.0
        return 0.0 if self.state == ROLLED_BACK else self.steps[self.step].share

    @property
    def has_just_begun(self) -> bool:
        """Whether it is at its first step, without any evidence."""
        return self.state == RUNNING and self.step == 0 and not self.seconds and not self.counts

    @property
    def summary(self) -> str:
        """The state in one line, for people."""
        place = f"{self.route}: {self.state}"
        if self.state in (RUNNING, PAUSED):
            place += f" at {self.share:g} %, step {self.step + 1} of {len(self.steps)}"
        return f"{place}: {self.reason}" if self.reason else place

    def dump(self) -> str:
        """Return the text for a log."""
        return json.dumps(asdict(self), sort_keys=True)


def parse(message: str) -> RolloutState | None:
    """Parse the message of a log entry; None if it is malformed: a log copied from elsewhere may have any text."""
    try:
        document = json_file.parse(message, "") if len(message) <= _MAX_LENGTH else None
        return _from_document(document) if isinstance(document, dict) else None
    except (FormatError, TypeError, ValueError, KeyError, AttributeError):
        return None


def _from_document(document: Mapping[str, Any]) -> RolloutState:
    """Return the state of a document; ValueError, TypeError, KeyError or AttributeError for one of another form."""
    texts = {name: document[name] for name in ("route", "stable", "state", "reason")}
    if not all(isinstance(text, str) for text in texts.values()) or texts["state"] not in STATES:
        raise ValueError(texts)
    steps = tuple(RolloutStep(_number(step["share"], 100), _number(step["seconds"])) for step in document["steps"])
    step = document["step"]
    if not 0 < len(steps) <= _MAX_STEPS or not json_file.is_integer(step) or not 0 <= step < len(steps):
        raise ValueError(step)
    bounds = {name: _number(bound) for name, bound in document["bounds"].items()}
    counts = {name: _counts(triple) for name, triple in document["counts"].items()}
    error = _number(document["error"], 1)
    if error < _MIN_ERROR:
        raise ValueError(error)
    seconds = _number(document["seconds"])
    return RolloutState(**texts, steps=steps, bounds=bounds, error=error, step=step, seconds=seconds, counts=counts)


def _number(value: object, most: float = 1e15) -> float:
    if not json_file.is_number(value) or not math.isfinite(value) or not 0 <= value <= most:
        raise ValueError(value)
    return float(value)


def _counts(triple: object) -> tuple[int, int, int]:
    if not isinstance(triple, list) or not all(json_file.is_integer(count) and 0 <= count < _MAX_COUNT for count in triple):
        raise ValueError(triple)
    worse, same, better = triple
    return worse, same, better
