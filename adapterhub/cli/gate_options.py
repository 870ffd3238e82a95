"""Gates on the numbers of an evaluation: the option `--gate`, its verdicts and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from adapterhub.registry.releases.metric_gates import Gate

Verdicts = Sequence[tuple["Gate", bool]]


def parse(texts: Sequence[str], names: Mapping[str, str] | None) -> list[Gate]:
    """Parse the values of `--gate`; `names` is as in `registry.releases.metric_gates.parse_gate`."""
    from adapterhub.registry.releases.metric_gates import parse_gate

    return [parse_gate(text, "--gate", names) for text in texts]


def verdicts(gates: Sequence[Gate], metrics: Mapping[str, float]) -> list[tuple[Gate, bool]]:
    """Return each gate with whether it holds; UsageError for a metric that was not measured."""
    return [(gate, gate.passes(metrics)) for gate in gates]


def documents(items: Verdicts, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the verdicts as JSON."""
    return [{"gate": gate.text, "metric": gate.metric, "value": metrics[gate.metric], "ok": passed} for gate, passed in items]


def write(items: Verdicts, metrics: Mapping[str, float]) -> None:
    """Write a line for each gate."""
    for gate, passed in items:
        output.write(f"{'passed' if passed else 'FAILED'}: {output.one_line(gate.text)} ({metrics[gate.metric]:.4g})")
