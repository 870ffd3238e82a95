"""Approvals count by the key or account that gives them, once for each person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.remotes.local_catalog import LocalCatalog
from adapterhub.trust import keys, release_claims
from adapterhub_converters.errors import RefusedError, UsageError
from tests.registry.releases.test_tag_requirements import PROD, SQL, require, requirement, v
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path, make: Make) -> Iterator[Registry]:
    """Three versions by ana, the first of which is prod."""
    with Registry.init(tmp_path / "registry") as opened:
        opened.author = "ana"
        for seed in (1, 2, 3):
            opened.push(make(f"a{seed}", seed), PROD if seed == 1 else SQL)
        yield opened


def approve(registry: Registry, name: str, *, author: str = "", tag: str = "prod", about: int = 2, digest: str = "") -> None:
    """Have the owner of a key approve a version."""
    path = registry.root / "keys" / name
    path.parent.mkdir(exist_ok=True)
    if not path.with_name(f"{name}.key").exists():
        keys.generate(path)
    version = registry.resolve(v(about))
    private = keys.read_private(path.with_name(f"{name}.key"))
    claim = release_claims.sign(release_claims.APPROVAL, "team/sql", digest or version.digest, private, text="read it", tag=tag)
    registry.author, mover = author or name, registry.author
    release_moves.approve(registry.ledger, v(about), "prod", ReleaseStatement("read it", claim.decode()))
    registry.author = mover


def test_two_approvals_are_of_two_keys_that_are_named(registry: Registry) -> None:
    require(registry, 'approvals = 2\napprovers = ["keys/bo.pub", "keys/cy.pub"]')
    approve(registry, "cy", about=3)  # of another version
    approve(registry, "bo")
    approve(registry, "bo")
    assert requirement(registry).value == "1 of 2: bo.pub"
    approve(registry, "eve")
    assert requirement(registry).value.startswith("1 of 2")
    assert "which is not accepted" in requirement(registry).value
    approve(registry, "cy", tag="staging")  # a claim about another tag, recorded for prod
    approve(registry, "cy", digest=registry.resolve(v(3)).digest)
    assert not requirement(registry).is_met
    approve(registry, "cy")
    assert (requirement(registry).is_met, requirement(registry).evidence) == (True, "log entries 5, 6, 10")


def test_the_approval_of_who_pushed_or_moves_it_does_not_count_among_others(registry: Registry) -> None:
    require(registry, 'approvals = 1\nfrom_others = true\napprovers = ["keys"]')
    approve(registry, "own", author="ana")
    assert requirement(registry).value.endswith("own.pub (of ana, who pushed, signed or moves it)")
    registry.author = "bo"
    approve(registry, "bo")
    assert not requirement(registry).is_met
    approve(registry, "cy")
    assert requirement(registry).is_met


def test_an_author_approves_a_version_for_a_tag_only_so_often(registry: Registry) -> None:
    for _ in range(10):
        release_moves.approve(registry.ledger, v(2), "prod", ReleaseStatement("read it"))
    with pytest.raises(RefusedError, match="approved 10 times for prod by the same author"):
        release_moves.approve(registry.ledger, v(2), "prod", ReleaseStatement("read it"))
    release_moves.approve(registry.ledger, v(2), "staging", ReleaseStatement("read it"))


def test_an_account_and_its_key_are_one_person(registry: Registry) -> None:
    require(registry, 'approvals = 2\napprovers = ["keys/bo.pub"]')
    approve(registry, "bo")
    registry.author = "bo"
    version, private = registry.resolve(v(2)), keys.read_private(registry.root / "keys" / "bo.key")
    claim = release_claims.sign(release_claims.APPROVAL, "team/sql", version.digest, private, text="x", tag="prod").decode()
    for statement_ in (
        ReleaseStatement("by both", claim, "bo"),
        ReleaseStatement("by the account", "", "bo"),
        ReleaseStatement("as somebody whom the log does not name", "", "cy"),
    ):
        release_moves.approve(registry.ledger, v(2), "prod", statement_)
    assert requirement(registry).value.startswith("1 of 2: ")
    registry.author = "cy"
    release_moves.approve(registry.ledger, v(2), "prod", ReleaseStatement("by another", "", "cy"))
    assert requirement(registry).is_met


def test_an_unsigned_approval_is_refused_in_a_registry_of_files(registry: Registry) -> None:
    with pytest.raises(UsageError) as refused:
        LocalCatalog(registry).approve(v(2), "prod", "fine")
    assert refused.value.code == "keys-to-approve"
