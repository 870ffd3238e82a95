"""`adapterhub rollout`: show where the rollouts of a name stand, and let a person resume or abort them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import open_registry
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.evidence.rollout_rules import BoundVerdict
    from adapterhub.manifest.rollout_state import RolloutState
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Registry

_BOUNDS = (Column("BOUND"), Column("LIMIT", drop=1), Column("PAIRS", right=True, drop=2), Column("VERDICT", wrap=True))


@click.group(
    "rollout",
    cls=Group,
    example="""
    adapterhub rollout show team/legal
    adapterhub rollout resume team/legal
    adapterhub rollout abort team/legal:v8 -m "customers complain\"""",
)
def rollout() -> None:
    """Follow the rollout of a version by `adapterhub serve`, whose route file has its steps and bounds.

    The state is in the log of the candidate's name, which every gateway of the registry follows.
    """


@rollout.command(
    "show",
    short_help="Show where the rollouts of a name stand.",
    example="""
    adapterhub rollout show team/legal
    adapterhub rollout show team/legal:v8 --json""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.argument("route", required=False)
@click.pass_obj
def show(settings: Settings, *, ref: str, route: str | None) -> None:
    """Show where rollouts stand: the step, the share, and what each bound tells by the pairs of requests so far.

    REF is the name of the candidate, or one version of it; ROUTE one route of the gateways.
    """
    with open_registry(settings) as registry:
        rollouts = [_with_withdrawal(registry, *rollout) for rollout in _rollouts(registry, ref, route)]
    document = {"rollouts": [_document(candidate, state) for candidate, state in rollouts]}
    output.emit(document, as_json=settings.as_json, text=lambda: _write(rollouts))


@rollout.command(
    "resume",
    short_help="Let a rollout that waits go on.",
    example="""
    adapterhub rollout resume team/legal
    adapterhub rollout resume team/legal:v8 legal""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.argument("route", required=False)
@click.pass_obj
def resume(settings: Settings, *, ref: str, route: str | None) -> None:
    """Let a rollout go on: one that waits with its next step, one that was rolled back with its first one."""
    from adapterhub.evidence import rollout_rules

    _decide(settings, ref, route, rollout_rules.resume)


@rollout.command(
    "abort",
    short_help="Roll a candidate back.",
    example="""
    adapterhub rollout abort team/legal -m "customers complain"
    adapterhub rollout abort team/legal:v8 legal""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.argument("route", required=False)
@click.option("-m", "--message", metavar="TEXT", default="", help="Record a reason, for the log.")
@click.pass_obj
def abort(settings: Settings, *, ref: str, route: str | None, message: str) -> None:
    """Give a candidate no more requests, from the next look of each gateway on."""
    from adapterhub.evidence import rollout_rules
    from adapterhub.ref import Ref
    from adapterhub.registry.moves import checked_message

    reason = checked_message(message, Ref.parse(ref)) or "aborted"
    _decide(settings, ref, route, lambda state: rollout_rules.roll_back(state, reason))


def _decide(settings: Settings, ref: str, route: str | None, decide: Callable[[RolloutState], RolloutState]) -> None:
    """Apply a person's decision to the one rollout that a ref and a route mean, and show its state."""
    from adapterhub.registry.releases import rollouts as rollout_log

    with open_registry(settings) as registry:
        rollouts = _rollouts(registry, ref, route)
        if len(rollouts) > 1:
            names = ", ".join(sorted(f"{candidate} {state.route}" for candidate, state in rollouts))
            raise UsageError(ref, f"has several rollouts: {names}", "Name the version and the route")
        [(candidate, state)] = rollouts
        changed = rollout_log.change(registry.ledger, candidate, state.route, lambda current: current and decide(current))
    state = changed or state
    output.emit(
        _document(candidate, state), as_json=settings.as_json, text=lambda: output.write(f"{candidate.name} {state.summary}")
    )


def _rollouts(registry: Registry, text: str, route: str | None) -> list[tuple[Ref, RolloutState]]:
    """Return the candidates and states that a ref and a route mean; NotFoundError if there are none."""
    from adapterhub.ref import Ref
    from adapterhub.registry.releases import rollouts as rollout_log

    target = Ref.parse(text)
    row = registry.row(target)
    is_name = str(target) == target.name
    rollouts = [
        (Ref(row.name, digest=digest), state)
        for (digest, name), state in rollout_log.states(registry.index, row.name).items()
        if route in (None, name) and (is_name or digest == row.digest)
    ]
    if not rollouts:
        raise NotFoundError(text, "has no rollout", "Name a candidate in the file of routes, and serve it", code="no-rollout")
    return rollouts


def _with_withdrawal(registry: Registry, candidate: Ref, state: RolloutState) -> tuple[Ref, RolloutState]:
    """Return a rollout as rolled back if its candidate was withdrawn, even where no gateway has written that to the log."""
    from adapterhub.evidence import rollout_rules
    from adapterhub.manifest.rollout_state import ROLLED_BACK
    from adapterhub.registry import withdrawals

    reason = withdrawals.reasons(registry.index, candidate.name).get(str(candidate.digest))
    if reason is not None and state.state != ROLLED_BACK:
        state = rollout_rules.roll_back(state, f"the candidate was withdrawn: {reason}")
    return candidate, state


def _document(candidate: Ref, state: RolloutState) -> Mapping[str, Any]:
    """Return a rollout as JSON, with the verdicts on its bounds."""
    from adapterhub.evidence import rollout_rules

    facts = {"route": state.route, "candidate": str(candidate), "stable": state.stable, "share": state.share}
    return {**facts, **rollout_rules.document(state)}


def _write(rollouts: Sequence[tuple[Ref, RolloutState]]) -> None:
    from adapterhub.evidence import rollout_rules

    for candidate, state in rollouts:
        output.write(output.one_line(state.summary))
        output.write(f"candidate: {output.pinned(str(candidate))}")
        output.write(f"stable:    {output.pinned(state.stable)}")
        output.write(_drawing(state))
        rows = [
            [verdict.name, verdict.limit, f"{verdict.pairs:,}", _verdict_text(verdict)]
            for verdict in rollout_rules.verdicts(state)
        ]
        output.write_table(_BOUNDS, rows)


def _verdict_text(verdict: BoundVerdict) -> str:
    """Return a verdict with its reason, but for a broken bound: the first line has that."""
    from adapterhub.evidence import rollout_rules

    if verdict.verdict == rollout_rules.BROKEN:
        return verdict.verdict
    return verdict.text if verdict.text.startswith(verdict.verdict) else f"{verdict.verdict}: {verdict.text}"


def _drawing(state: RolloutState) -> str:
    """Return the steps in one line, the current one in brackets with its time."""
    minutes = f" {state.seconds / 60:.0f}"
    parts = []
    for number, step in enumerate(state.steps):
        length = f" of {step.seconds / 60:.0f} min" if step.seconds else " min, then a person"
        is_current = number == state.step and state.state in ("running", "paused")
        parts.append(f"[{step.share:g} %{minutes}{length}]" if is_current else f"{step.share:g} %")
    return " -> ".join([*parts, "[100 %]" if state.state == "done" else "100 %"])
