"""A tag with requirements moves only to a version that meets all of them, whoever moves it; each has its evidence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.manifest.measurement import Evaluation
from adapterhub.project import PROJECT
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases.tag_requirements import Requirement
from adapterhub.trust import attestation, bundle, keys, statement
from tests.support.adapters import Make

SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")
GOOD = Evaluation("tests", {"pass_rate": 1.0, "cases": 100.0}, cases={f"t{n}": 1.0 for n in range(100)})


def v(number: int) -> Ref:
    return Ref("team/sql", number=number)


@pytest.fixture
def registry(tmp_path: Path, make: Make) -> Iterator[Registry]:
    """Three versions by ana, the first of which is prod."""
    with Registry.init(tmp_path / "registry") as opened:
        opened.author = "ana"
        for seed in (1, 2, 3):
            opened.push(make(f"a{seed}", seed), PROD if seed == 1 else SQL)
        yield opened


def require(registry: Registry, text: str, table: str = "") -> None:
    """Have prod require something, in the registry's folder."""
    rules = f"[promote.prod]\n{table}\n[promote.prod.require]\n{text}\n"
    (registry.root / PROJECT).write_text(rules)
    registry.__dict__.pop("policy", None)


def requirement(registry: Registry, number: int = 2) -> Requirement:
    """The only requirement, as a version meets it."""
    (only,) = registry.assess(v(number), "prod").requirements
    return only


def prod(registry: Registry) -> int:
    return queries.tags(registry.index, "team/sql")["prod"]


# ---- each requirement


def test_a_version_must_be_or_have_been_the_tag_before(registry: Registry) -> None:
    require(registry, "", 'from = "staging"')
    assert (requirement(registry).value, requirement(registry).is_met) == ("was never staging", False)
    registry.tag(v(2), "staging")
    registry.tag(v(3), "staging")
    assert (requirement(registry).is_met, requirement(registry).evidence) == (True, "log entry 4")


def test_signatures_and_attestations_are_by_the_signers(registry: Registry, tmp_path: Path) -> None:
    _, public = keys.generate(tmp_path / "registry" / "release")
    private = keys.read_private(tmp_path / "registry" / "release.key")
    require(registry, 'signers = ["release.pub"]\nattestations = ["tests"]')
    assert [item.is_met for item in registry.assess(v(2), "prod").requirements] == [False, False]
    version = registry.resolve(v(2))
    manifest = registry.oci_manifest(version)
    files = {layer.path: layer.digest for layer in manifest.layers}
    for raw in (
        attestation.Attestation(attestation.TYPES["tests"], "team/sql", version.digest, {"result": "PASSED"}).sign(private),
        bundle.sign(statement.Statement("team/sql", files), private),
    ):
        registry.store.signatures.add(version.digest, raw, 10)
    met = registry.assess(v(2), "prod").requirements
    assert [item.is_met for item in met] == [True, True]
    assert public.title in met[0].value
    (tmp_path / "registry" / "release.pub").unlink()
    assert [item.is_met for item in registry.assess(v(2), "prod").requirements] == [False, False]


def test_a_scan_must_find_nothing(registry: Registry, make: Make) -> None:
    require(registry, 'scan = "clean"')
    assert (requirement(registry).value, requirement(registry).is_met) == ("clean", True)
    folder = make("bad", 9)
    (folder / "README.md").write_text("# SQL\n<img src=x onerror=alert(1)>")
    registry.push(folder, SQL)
    assert requirement(registry, 4).value == "active-markup: README.md"


def test_a_version_must_be_old_enough_and_a_clock_that_jumps_makes_none_older(registry: Registry) -> None:
    require(registry, 'age = "1h"')
    now = registry.gate.evidence.clock()
    for later, value, is_met in (
        (0, "pushed 0s ago", False),
        (3700, "pushed 1h ago", True),
        (-3700, "pushed in the future, by the clock of this machine", False),
    ):
        registry.gate.evidence.clock = lambda later=later: now + later  # type: ignore[misc]
        assert (requirement(registry).value.replace("1s", "0s"), requirement(registry).is_met) == (value, is_met)


# ---- approvals


# ---- no way around


def test_a_name_that_is_restored_has_the_tag_as_it_was(registry: Registry) -> None:
    require(registry, "approvals = 1")
    registry.rm(SQL)
    registry.restore("team/sql")
    assert prod(registry) == 1


# ---- promotion and rollback
