"""The rollout and the shadow of a route, as the route file describes them; `rollouts` and `shadows` carry them out.

[routes.legal]
to = "team/legal:prod"
candidate = "team/legal:v8"
steps = [{ share = 5, for = "10m" }, { share = 25, for = "30m" }, 50, 100]   # a number alone waits for a person
bounds = { errors = 5, first_token = 1.5 }        # points of requests; or so many times the stable arm's
false_rollback = 0.01                             # the chance to roll back a candidate that is no worse
sticky = ["user", "x-session"]                    # fields of the body, and headers
shadow = { to = "team/legal:v9", share = 10, running = 1, tools = false }    # or the ref alone
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from adapterhub.evidence import rollout_rules
from adapterhub.manifest.rollout_state import RolloutStep
from adapterhub.project.tag_rules import parse_duration
from adapterhub.ref import Ref, RefError
from adapterhub.serve import model_names
from adapterhub_converters.containers import json_file
from adapterhub_converters.lazy_dataclass import dataclass

NAMES = ("candidate", "steps", "bounds", "false_rollback", "sticky", "shadow")
"""The keys in the table of a route that are read here."""
STICKY_FIELDS = ("safety_identifier", "prompt_cache_key", "user")
"""The fields of a body that keep a client with one arm: the first that it has. `user` may come from Anthropic's metadata."""
_DEFAULT_BOUNDS = {"errors": 5.0, "stops": 10.0, "first_token": 2.0}
_MAX_STEPS, _MAX_STICKY, _MAX_SHADOWS = 32, 8, 16
_PLAN_NAMES = ("steps", "bounds", "false_rollback")


class PlanError(ValueError):
    """A malformed part of a route: its name, the problem, and a hint."""

    def __init__(self, name: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{name}: {problem}")
        self.name, self.problem, self.hint = name, problem, hint


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A rollout as a route describes it; `steps` has only those below 100 %."""

    candidate: Ref
    steps: tuple[RolloutStep, ...]
    bounds: Mapping[str, float]
    error: float


@dataclass(frozen=True, slots=True)
class ShadowPlan:
    """A version that gets copies of requests, whose answers nobody sees.

    Attributes:
        share: The percent of the requests that are copied.
        running: Copies at once; more are dropped.
        tools: Whether requests with tools are copied too, whose answers may ask a client to act.
    """

    to: Ref
    share: float = 100.0
    running: int = 1
    tools: bool = False


@dataclass(frozen=True, slots=True)
class Stickiness:
    """What keeps a client with one arm."""

    names: tuple[str, ...] = field(default=STICKY_FIELDS)

    def unit_of(self, headers: Mapping[str, str], identifiers: Mapping[str, str]) -> str:
        """Return the value that keeps a request's client with one arm; empty if the request has none."""
        values = (identifiers.get(name) if name in STICKY_FIELDS else headers.get(name) for name in self.names)
        return next((value for value in values if value), "")


def bucket(route: str, candidate: str, key: str, unit: str) -> float:
    """Return a client's position, from 0 to below 100: the same at every gateway, so that a growing share keeps its clients."""
    text = f"{route}\0{candidate}\0{key}\0{unit}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64 * 100


def read_rollout(table: Mapping[str, Any]) -> RolloutPlan | None:
    """Read the rollout of a route; None without one, PlanError for a malformed one."""
    if "candidate" not in table:
        if name := next((name for name in _PLAN_NAMES if name in table), None):
            raise PlanError(name, "belongs to a `candidate`", 'Write candidate = "team/legal:v8"')
        return None
    steps, error = _steps(table.get("steps")), table.get("false_rollback", 0.01)
    if not json_file.is_number(error) or not 1e-6 <= error <= 0.2:
        raise PlanError("false_rollback", "not a chance from 0.000001 to 0.2")
    if not isinstance(table.get("to"), str) or len(_parts(table["to"], "to")) != 1:
        raise PlanError("to", "a rollout compares with one ref", 'Write to = "team/legal:prod"')
    return RolloutPlan(
        _ref(table["candidate"], "candidate"), steps, _bounds(table.get("bounds", _DEFAULT_BOUNDS)), float(error)
    )


def read_shadow(table: Mapping[str, Any]) -> ShadowPlan | None:
    """Read the shadow of a route; None without one, PlanError for a malformed one."""
    if (shadow := table.get("shadow")) is None:
        return None
    members = {"to": shadow} if isinstance(shadow, str) else shadow
    if not isinstance(members, dict) or set(members) - {"to", "share", "running", "tools"}:
        raise PlanError("shadow", "neither a ref nor a table of to, share, running and tools")
    running, tools = members.get("running", 1), members.get("tools", False)
    if not json_file.is_integer(running) or not 1 <= running <= _MAX_SHADOWS or not isinstance(tools, bool):
        raise PlanError("shadow", f"`running` is a number from 1 to {_MAX_SHADOWS}, and `tools` is true or false")
    return ShadowPlan(_ref(members.get("to"), "shadow"), _share(members.get("share", 100), "shadow"), running, tools)


def read_stickiness(table: Mapping[str, Any]) -> Stickiness:
    """Read what keeps a client with one arm; PlanError if it is malformed."""
    names = table.get("sticky", list(STICKY_FIELDS))
    if not isinstance(names, list) or len(names) > _MAX_STICKY or not all(isinstance(name, str) and name for name in names):
        raise PlanError(
            "sticky", f"not a list of at most {_MAX_STICKY} fields and headers", 'Write sticky = ["user", "x-session"]'
        )
    return Stickiness(tuple(name if name in STICKY_FIELDS else name.lower() for name in names))


def _ref(text: object, name: str) -> Ref:
    parts = _parts(text, name)
    if len(parts) != 1:
        raise PlanError(name, "is a blend", "Name one version")
    return parts[0].ref


def _parts(text: object, name: str) -> tuple[model_names.BlendPart, ...]:
    if not isinstance(text, str) or len(text) > 1000:
        raise PlanError(name, "not a ref", f'Write {name} = "team/legal:v8"')
    try:
        return model_names.parse(text)
    except RefError as error:
        raise PlanError(name, f"{error.where}: {error.what}", error.hint) from error


def _share(share: object, name: str) -> float:
    if not json_file.is_number(share) or not 0 < share <= 100:
        raise PlanError(name, "a share is a percentage above 0, of at most 100")
    return float(share)


def _steps(steps: object) -> tuple[RolloutStep, ...]:
    """Return the steps below 100 %."""
    hint = 'Write steps = [{ share = 5, for = "10m" }, 25, 100]'
    if not isinstance(steps, list) or not 0 < len(steps) <= _MAX_STEPS:
        raise PlanError("steps", f"not a list of 1 to {_MAX_STEPS} steps", hint)
    parsed: list[RolloutStep] = []
    for step in steps:
        members = step if isinstance(step, dict) else {"share": step}
        duration = members.get("for", "")
        seconds = parse_duration(duration) if isinstance(duration, str) else 0
        if set(members) - {"share", "for"} or ("for" in members and not seconds):
            raise PlanError("steps", "a step is a share, or a table of share and for", hint)
        parsed.append(RolloutStep(_share(members.get("share"), "steps"), float(seconds)))
    shares = [step.share for step in parsed]
    if shares != sorted(set(shares)) or shares[0] >= 100:
        raise PlanError("steps", "each share is larger than the one before, and the first below 100", hint)
    return tuple(step for step in parsed if step.share < 100)


def _bounds(bounds: object) -> Mapping[str, float]:
    bound_names = (*rollout_rules.SHARES, *rollout_rules.RATIOS)
    if not isinstance(bounds, dict) or not bounds:
        raise PlanError("bounds", "not a table of bounds", "Write bounds = { errors = 5 }")
    for name, bound in bounds.items():
        if name not in bound_names:
            raise PlanError("bounds", f"{name[:40]!r} is unknown", f"There are {', '.join(bound_names)}")
        if not json_file.is_number(bound):
            raise PlanError("bounds", f"{name} is not a number")
        if name in rollout_rules.SHARES and not 0.1 <= bound <= 90:
            raise PlanError("bounds", f"{name} is a number of points from 0.1 to 90")
        if name in rollout_rules.RATIOS and not 1.01 <= bound <= 1000:
            raise PlanError("bounds", f"{name} is a number of times from 1.01 to 1,000", "1.5 allows half as much again")
    return {name: float(bound) for name, bound in bounds.items()}
