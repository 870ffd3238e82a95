"""A version that was withdrawn is not found by a running gateway: at once in a registry, after a poll at a hub; it says why."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.serve.gateway.lookup import Lookup, RegistryLookup, RemoteLookup
from adapterhub.serve.gateway.openai_errors import problem_of
from adapterhub_converters.errors import RefusedError, RemoteError
from tests.hub.conftest import serving
from tests.support.adapters import Make

PROD = Ref.parse("team/sql:prod")
REASON = ReleaseStatement("a leaked key")


def check_refused(lookup: Lookup, ref: Ref) -> None:
    """The lookup has an answer, which a client of the gateway gets as 410 with the reason."""
    with pytest.raises(RefusedError) as refused:
        asyncio.run(lookup.find(ref))
    problem = problem_of(refused.value, str(ref))
    assert (refused.value.code, problem.status, problem.code) == ("withdrawn", 410, "withdrawn")
    assert "a leaked key" in str(problem)
    assert "MANIFEST_UNKNOWN" not in str(problem)
    assert lookup.is_up


def test_the_next_request_for_a_version_of_the_registry_is_refused(tmp_path: Path, make: Make) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        version = registry.push(make("a1", 1), PROD)
        lookup = RegistryLookup(Workspace(registry.root, policy=None))
        refs = (PROD, Ref("team/sql"), Ref("team/sql", digest=version.digest))
        try:
            assert [asyncio.run(lookup.find(ref)).digest for ref in refs] == [version.digest] * 3
            release_moves.withdraw(registry.ledger, PROD, REASON)
            for ref in refs:
                check_refused(lookup, ref)
            release_moves.undo_withdrawal(registry.ledger, PROD)
            assert asyncio.run(lookup.find(PROD)).digest == version.digest
        finally:
            lookup.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("protocol", ["hub+http", "oci+http"])
def test_a_version_of_a_hub_is_refused_when_it_is_asked_again_and_while_the_hub_is_away(
    protocol: str, tmp_path: Path, make: Make
) -> None:
    now = 0.0
    with ExitStack() as stack:
        with serving(tmp_path / "hub") as hub:
            with hub.registry() as registry:
                version = registry.push(make("a1", 1), PROD)
            url = hub.url.replace("http", "oci" if protocol == "oci+http" else protocol, 1)
            lookup, next_lookup = (RemoteLookup(Workspace(policy=None), url, 5.0, clock=lambda: now) for _ in range(2))
            for opened in (lookup, next_lookup):
                stack.callback(opened.close)
            by_digest = Ref("team/sql", digest=version.digest)
            assert [asyncio.run(lookup.find(ref)).digest for ref in (PROD, by_digest)] == [version.digest] * 2
            with hub.registry() as registry:
                release_moves.withdraw(registry.ledger, PROD, REASON)
            now = 6.0
            for ref in (PROD, by_digest):
                check_refused(lookup, ref)
        now = 12.0
        for opened in (lookup, next_lookup):
            with pytest.raises(RemoteError):
                asyncio.run(opened.find(by_digest))
