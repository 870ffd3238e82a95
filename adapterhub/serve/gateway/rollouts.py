"""Rollouts of a gateway: each route's candidate gets its share of the requests, which is in the log of the registry.

At each poll, every gateway adds its pairs of requests to the state in the log and writes the state that follows, by
compare-and-swap: the next step, or rolled back. Pairs are written when there are a tenth more, so a long rollout has some
dozens of entries. Time is that of a monotonic clock, counted while a gateway runs. A gateway that cannot reach the registry
keeps its step and says so; it stops a candidate that breaks a bound there, and writes that once it can.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import field

from adapterhub.evidence import rollout_rules
from adapterhub.evidence.sequential_test import PairCounts
from adapterhub.manifest.rollout_state import DONE, ROLLED_BACK, RUNNING, RolloutState
from adapterhub.ref import LATEST, Ref
from adapterhub.registry import withdrawals
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import rollouts as rollout_log
from adapterhub.serve import model_names
from adapterhub.serve.usage import answer_log
from adapterhub.serve.usage.answer_log import Feedback
from adapterhub.serve.usage.record_place import Place
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, LocalIOError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .lookup import RegistryLookup, ResolvedVersion
from .rollout_evidence import AnswerOutcome, Evidence, Trial
from .rollout_plan import RolloutPlan, bucket
from .route_file import Route, Routes

log = logging.getLogger("adapterhub.serve.rollouts")
_MIN_GROWTH, _MIN_PAIRS = 0.1, 5  # pairs are written once a test has a tenth more, and at least so many more
_ENTRIES_OF_STEP = 8  # the most entries for the time of a step alone
_LATE_SECONDS = 60.0  # in which another gateway has written the feedback that it got
FindVersion = Callable[[Ref], Awaitable[ResolvedVersion]]


@dataclass(slots=True)
class Track:
    """A candidate that a route of this gateway follows.

    Attributes:
        candidate: The version, as it was when the rollout began here.
        stable: The version that it is compared with.
        state: The state in the log, as last seen; None before.
        seen_at: When that state was first seen, by the gateway's clock.
        evidence: The pairs of this gateway that the log does not have yet.
        stopped: Why the candidate gets nothing now although the log does not say so; empty otherwise.
        checked_seq: The last entry of the log that was searched for a promotion of the candidate.
        cut_off: Why the registry cannot be reached; empty while it can.
    """

    route: Route
    plan: RolloutPlan
    candidate: ResolvedVersion
    stable: ResolvedVersion
    evidence: Evidence
    state: RolloutState | None = None
    seen_at: float = 0.0
    stopped: str = ""
    checked_seq: int = 0
    cut_off: str = ""

    @property
    def ref(self) -> Ref:
        """The candidate with its digest."""
        return Ref(self.candidate.name, digest=self.candidate.digest)

    @property
    def share(self) -> float:
        """The candidate's share of the requests, in percent."""
        return self.state.share if self.state and not self.stopped else 0.0

    def seconds(self, now: float) -> float:
        """Return the seconds that the current step has taken."""
        if self.state is None or self.state.state != RUNNING:
            return self.state.seconds if self.state else 0.0
        return self.state.seconds + now - self.seen_at

    def document(self, now: float) -> dict[str, object]:
        """Return where it stands, as JSON."""
        state = rollout_rules.with_evidence(self.state, self.seconds(now), self.evidence.counts) if self.state else None
        return {
            "route": self.route.name,
            "candidate": self.candidate.model,
            "stable": self.stable.model,
            "share": self.share,
            **(rollout_rules.document(state) if state else {}),
            "stopped": self.stopped or None,
            "cut_off": self.cut_off or None,
        }


@dataclass(slots=True)
class Choice:
    """The arm that a rollout chose for a request.

    Attributes:
        arm: The name of the arm, as routes name it.
        ref: The candidate with its digest; None for the route's own target.
        trial: The request as half of a pair; None if it is no evidence.
        evidence: Where the trial is counted.
    """

    arm: str
    ref: Ref | None = None
    trial: Trial | None = None
    evidence: Evidence | None = field(default=None, repr=False)

    def finish(self, outcome: AnswerOutcome) -> None:
        """Record how the request was answered."""
        if self.trial is not None and self.evidence is not None:
            self.evidence.finish(self.trial, outcome)


class Rollouts:
    """The rollouts of a gateway's routes.

    Args:
        registry: The registry with the log, which is asked in a thread of its own.
        find: Returns the version that a ref means now.
        usage: The file with the feedback that other gateways got; None without one.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        registry: RegistryLookup,
        find: FindVersion,
        usage: Place | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._find, self._usage, self._clock = registry, find, usage, clock
        self._feedback_read_at, self._feedback_problem = time.time(), ""
        self._tracks: dict[str, Track] = {}
        self._reasons: dict[str, str] = {}  # why the rollouts of routes could not begin, as last logged

    def close(self) -> None:
        """Close the registry."""
        self._registry.close()

    def choose(
        self, route: Route, headers: Mapping[str, str], identifiers: Mapping[str, str], key: str, *, request: str = ""
    ) -> Choice | None:
        """Return the arm for a request; None if the route has no rollout now, or a rule of it decides.

        Args:
            request: The id of the request; empty for one that is not to be answered, and so is no evidence.
        """
        track = self._tracks.get(route.name)
        if track is None or track.state is None or route.special_target(headers, identifiers.get("user", ""), key):
            return None
        unit = route.stickiness.unit_of(headers, identifiers)
        position = bucket(route.name, track.candidate.digest, key, unit) if unit else random.random() * 100  # noqa: S311
        is_candidate = position < track.share
        trial = None
        if request and track.state.state not in (DONE, ROLLED_BACK) and not track.stopped:
            trial = track.evidence.admit(key, unit, request, is_candidate=is_candidate)
        arm = str(track.plan.candidate) if is_candidate else route.to.shares[0][0]
        return Choice(arm, track.ref if is_candidate else None, trial, track.evidence)

    def stop(self, route: str, reason: str) -> None:
        """Give a route's candidate no more requests, and write the reason at the next look."""
        if track := self._tracks.get(route):
            track.stopped = reason

    def add_feedback(self, feedback: Feedback) -> None:
        """Count the first feedback on an answer of this gateway, if its version is an arm of its route's rollout now."""
        track = self._tracks.get(feedback.route)
        if track is not None and feedback.version in (track.candidate.model, track.stable.model):
            is_candidate = feedback.version == track.candidate.model
            track.evidence.add_feedback(feedback.key, feedback.request, is_candidate=is_candidate, is_bad=feedback.is_bad)

    def documents(self) -> list[dict[str, object]]:
        """Return where the rollouts stand, as JSON."""
        return [track.document(self._clock()) for track in self._tracks.values()]

    async def _read_feedback(self) -> None:
        """Count the feedback on answers of this gateway that other gateways with its record got."""
        if self._usage is None or not any("feedback" in track.plan.bounds for track in self._tracks.values()):
            return
        now = time.time()
        since = min(self._feedback_read_at, now) - _LATE_SECONDS
        try:
            recent_feedback = await asyncio.to_thread(answer_log.feedback_since, self._usage, since)
        except AdapterhubError as error:
            if self._feedback_problem != (problem := str(error)):
                log.error("feedback that other gateways got is counted later: %s", problem)
            self._feedback_problem = problem
            return
        self._feedback_read_at, self._feedback_problem = now, ""
        for feedback in recent_feedback:
            self.add_feedback(feedback)

    async def refresh(self, routes: Routes) -> None:
        """Look at the log, and write what follows from this gateway's evidence."""
        await self._read_feedback()
        plans = {name: (route, route.rollout) for name, route in routes.routes.items() if route.rollout}
        for name in self._tracks.keys() - plans.keys():
            del self._tracks[name]
        for route, plan in plans.values():
            try:
                await self._follow(route, plan)
            except AdapterhubError as error:
                self._keep_step(route.name, error)
            except Exception:
                log.exception("the rollout of %s cannot be followed; it will be tried again", route.name)

    def _keep_step(self, name: str, error: AdapterhubError) -> None:
        """Keep the step while the registry cannot be reached, but stop a candidate that breaks a bound here."""
        track = self._tracks.get(name)
        if track is None:
            self._warn_once(name, str(error))
            return
        if not track.cut_off:
            log.error("the rollout of %s stays as it is, at %g %%: %s", name, track.share, error)
        track.cut_off = str(error)
        if track.state is not None:
            following = rollout_rules.next_state(rollout_rules.with_evidence(track.state, 0.0, track.evidence.counts))
            if following.state == ROLLED_BACK and not track.stopped:
                track.stopped = following.reason
                log.error("%s gets no more requests of %s: %s", track.candidate.model, name, following.reason)

    def _warn_once(self, name: str, reason: str) -> None:
        """Log why the rollout of a route does not begin, unless that was the last reason."""
        if self._reasons.get(name) != reason:
            log.warning("the rollout of %s waits: %s", name, printable(reason))
        self._reasons[name] = reason

    async def _follow(self, route: Route, plan: RolloutPlan) -> None:
        track = await self._track(route, plan)
        if track is None:
            return
        if not await self._registry.can_find():  # an open database does not notice that its disk is gone
            raise LocalIOError("the registry", "cannot be reached")
        unlogged, now = dict(track.evidence.counts), self._clock()
        state, is_written = await self._registry.run(lambda registry: self._write_next_state(registry, track, unlogged, now))
        if is_written:
            track.evidence.forget(unlogged)
        if track.cut_off:
            log.info("the rollout of %s is in the registry again", route.name)
        track.cut_off = track.stopped = ""  # a reason to stop is in the log now
        if state != track.state:
            if state is not None and (track.state is None or state.summary != track.state.summary):
                log.warning(
                    "%s", printable(state.summary), extra={"fields": {"route": route.name, "version": track.candidate.model}}
                )
            if state is not None and (track.state is None or state.stable != track.state.stable):
                track.evidence = Evidence(state.bounds)
            track.state, track.seen_at = state, now

    async def _track(self, route: Route, plan: RolloutPlan) -> Track | None:
        """Return the candidate that a route follows now; None if it is what the route means anyway."""
        track = self._tracks.get(route.name)
        try:
            candidate = await self._find(plan.candidate)
        except RefusedError as error:
            if track is None or error.code != withdrawals.CODE:
                raise
            candidate, track.stopped = track.candidate, error.what
        stable = await self._find(route.stable_ref)
        if candidate.digest == stable.digest:
            if self._tracks.pop(route.name, None) is None:
                self._warn_once(route.name, f"{plan.candidate} is what {route.to.shares[0][0]} means already, {stable.model}")
            return None
        if track is None or track.candidate != candidate:
            track = self._tracks[route.name] = Track(route, plan, candidate, stable, Evidence(plan.bounds))
        track.route, track.plan, track.stable = route, plan, stable
        return track

    def _write_next_state(
        self, registry: Registry, track: Track, unlogged: Mapping[str, PairCounts], now: float
    ) -> tuple[RolloutState | None, bool]:
        """Write the next state; return the state in the log, and whether it has the evidence now. Runs in a thread."""
        is_written = False

        def decide(current: RolloutState | None) -> RolloutState | None:
            nonlocal is_written
            following, is_written = self._next_state(current, track, unlogged, now)
            return following

        current = rollout_log.state_of(registry.index, track.ref, track.route.name)
        if current is not None and current.state != ROLLED_BACK:
            self._stop_if_left(registry, track)
        if decide(current) == current:  # without the write lock, as nearly always
            return current, False
        return rollout_log.change(registry.ledger, track.ref, track.route.name, decide), is_written

    def _stop_if_left(self, registry: Registry, track: Track) -> None:
        """Stop a candidate that the route's own target was moved to and away from, whether or not this gateway saw both."""
        stable, seq = track.route.stable_ref, registry.ledger.current(track.ref.name).seq
        tag = stable.tag or (LATEST if model_names.is_moving(stable) and not stable.range else "")
        if seq == track.checked_seq or stable.name != track.ref.name or not tag:
            return
        if registry.row(stable).digest == track.candidate.digest:  # moved to it since this look began
            return
        log, after = registry.store.log, track.checked_seq
        if rollout_log.was_promoted(log, track.ref, track.route.name, tag, after=after, last=seq):
            track.stopped = track.stopped or f"{stable} was moved to it, and away from it"
        track.checked_seq = seq

    def _next_state(
        self, current: RolloutState | None, track: Track, unlogged: Mapping[str, PairCounts], now: float
    ) -> tuple[RolloutState | None, bool]:
        """Return the state that follows the one in the log, and whether it has this gateway's evidence."""
        plan, stable = track.plan, track.stable.model
        if current is None:
            if track.stopped:
                return None, False
            return RolloutState(track.route.name, stable, plan.steps, plan.bounds, plan.error), False
        if track.stopped and current.state != ROLLED_BACK:
            return rollout_rules.roll_back(current, track.stopped), False
        if current.state == ROLLED_BACK or (current.state == DONE and current.stable == stable):
            return current, False
        if current.stable != stable:  # the evidence is about another comparison
            return rollout_rules.restart(current, stable), False
        is_same_step = track.state is not None and (current.step, current.state) == (track.state.step, track.state.state)
        seconds = track.seconds(now) if is_same_step else current.seconds
        updated = rollout_rules.with_evidence(current, seconds, unlogged)
        following = rollout_rules.next_state(updated)
        has_changed = (following.state, following.step) != (current.state, current.step)
        return (following, True) if has_changed or _is_worth_writing(current, updated) else (current, False)


def _is_worth_writing(current: RolloutState, updated: RolloutState) -> bool:
    """Return whether there are enough new pairs, or enough time has passed, for an entry of the log."""
    totals = [(sum(current.counts.get(test, ())), sum(counts)) for test, counts in updated.counts.items()]
    has_pairs = any(after - before >= max(_MIN_PAIRS, _MIN_GROWTH * before) for before, after in totals)
    length = current.steps[current.step].seconds
    return has_pairs or (length > 0 and current.seconds < length <= _ENTRIES_OF_STEP * (updated.seconds - current.seconds))
