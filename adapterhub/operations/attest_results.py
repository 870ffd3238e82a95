"""Signed results of tests and evaluations: in-toto's test-result predicate, about exactly one version.

Unlike the statements of `operations.attest`, these cannot be computed again from a base and a version alone: the signer says
that these were the results. (github.com/in-toto/attestation, spec/predicates/test-result.md)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.trust.attestation import TESTS, TYPES, Attestation, VerifiedAttestation
from adapterhub_converters.errors import RefusedError

from . import signature_checks
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.measurement import Evaluation
    from adapterhub.trust.keys import Signer


def attest_results(
    ref: str,
    evaluations: Sequence[Evaluation],
    key: Signer,
    *,
    digest: str,
    ok: bool,
    gates: Sequence[Mapping[str, Any]] = (),
    failed: Collection[str] | None = None,
    workspace: Workspace,
) -> tuple[VerifiedAttestation, ...]:
    """Sign each evaluation of a version as a test result, and attach it to the version as signatures are.

    Args:
        ref: The version, or its address.
        evaluations: What was measured.
        key: The signer.
        digest: The digest that was measured: a tag may have moved since.
        ok: Whether the gates, or without gates the tests, passed.
        gates: The gates with their values, as the command shows them.
        failed: The names of the tests that failed, which may be satisfied by a part of their samples; None for all those of
            which a sample is wrong.
        workspace: The registry and the credentials.

    Raises:
        RefusedError: `ref` is another version by now.
    """
    with signature_checks.open_signable(ref, workspace) as version:
        if version.digest != digest:
            raise RefusedError(ref, f"is {version.digest[:19]}… now, and {digest[:19]}… was measured", code="other-version")
        statements = [
            Attestation(TYPES[TESTS], version.name, version.digest, _predicate(evaluation, ok=ok, gates=gates, failed=failed))
            for evaluation in evaluations
        ]
        for statement in statements:
            version.add(statement.sign(key))
    return tuple(VerifiedAttestation(statement, key.public) for statement in statements)


def _predicate(
    evaluation: Evaluation, *, ok: bool, gates: Sequence[Mapping[str, Any]], failed: Collection[str] | None
) -> dict[str, Any]:
    if failed is None:
        failed = {name for name, rate in evaluation.cases.items() if rate < 1}
    digests = [(str(item.get("path", "data")), str(item.get("digest", ""))) for item in evaluation.data]
    return {
        "result": "PASSED" if ok else "FAILED",
        "configuration": [
            {"name": name, **({"digest": {"sha256": digest.removeprefix("sha256:")}} if digest else {})}
            for name, digest in digests
        ],
        "passedTests": [name for name in evaluation.cases if name not in failed],
        "failedTests": [name for name in evaluation.cases if name in failed],
        "evaluation": {"name": evaluation.name, "metrics": dict(evaluation.metrics), "measuredBy": dict(evaluation.base)},
        "gates": [{"gate": gate["gate"], "value": gate["value"], "ok": gate["ok"]} for gate in gates],
    }
