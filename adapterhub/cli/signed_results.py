"""The signature of `adapterhub eval`: results as attestations, if `--key` or `--keyless` asks for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import UsageError

from . import output, signing_options
from .options import Settings
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.manifest.measurement import Evaluation


def sign(
    settings: Settings,
    signer: signing_options.SignerOption | None,
    ref: str | None,
    digest: str,
    evaluations: Sequence[Evaluation],
    *,
    ok: bool,
    gates: Sequence[Mapping[str, Any]],
    failed: Collection[str] | None = None,
) -> list[dict[str, object]]:
    """Sign evaluations of a version; return the attestations as JSON, none without a signer.

    `failed` is that of `operations.attest_results`.
    """
    if signer is None:
        return []
    from adapterhub.operations import attest_results

    if ref is None:
        raise UsageError("--key or --keyless", "is for a version, and a path is not one", "Push it, and name the version")
    statements = attest_results.attest_results(
        ref, evaluations, signer.read(), digest=digest, ok=ok, gates=gates, failed=failed, workspace=workspace(settings)
    )
    return [signing_options.attestation_document(statement) for statement in statements]


def write(attestations: Sequence[object]) -> None:
    """Write that results were signed."""
    if attestations:
        output.write(f"signed: {output.plural(len(attestations), 'test result')}, attached to the version")
