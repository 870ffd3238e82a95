"""Every way to a tag with requirements leads through its gate."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.manifest.oci_manifest import Manifest, parse
from adapterhub.project import PROJECT, settings_file
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry import version_facts
from adapterhub.registry.packaging import package
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import tag_requirements
from adapterhub.remotes.local_catalog import LocalCatalog
from adapterhub.store.ref_log import TAG_MOVES
from adapterhub.store.store import Store
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError
from tests.registry.releases.test_tag_requirements import PROD, SQL, prod, require, v
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path, make: Make) -> Iterator[Registry]:
    """Three versions by ana, the first of which is prod."""
    with Registry.init(tmp_path / "registry") as opened:
        opened.author = "ana"
        for seed in (1, 2, 3):
            opened.push(make(f"a{seed}", seed), PROD if seed == 1 else SQL)
        yield opened


def test_every_operation_of_the_log_that_moves_tags_is_decided_or_goes_back(registry: Registry) -> None:
    from adapterhub.registry.releases import tag_gate

    assert {*tag_gate._MOVES, "restore"} == set(TAG_MOVES)


WAYS: dict[str, Callable[[Registry, Make], object]] = {
    "tag": lambda registry, _: registry.tag(v(2), "prod"),
    "promote": lambda registry, _: registry.promote(v(2), "prod"),
    "push": lambda registry, make: registry.push(make("new", 9), PROD),
    "publish with a tag": lambda registry, make: registry.publish(package(make("new", 9)), SQL, tags=["prod"]),
    "push of a version that is there": lambda registry, make: registry.push(make("a2", 2), PROD),
    "push of a manifest": lambda registry, _: registry.push_manifest(
        parse(registry.store.read_document(registry.resolve(v(2)).digest), ""), SQL, tags=("prod",)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy_owner", ["registry", "caller"])
def test_every_way_to_the_tag_is_refused_with_what_is_missing_and_moves_nothing(
    way: str, policy_owner: str, registry: Registry, make: Make
) -> None:
    require(registry, "approvals = 1")
    if policy_owner == "caller":
        policy: Policy = settings_file.read(registry.root / PROJECT).policy
        (registry.root / PROJECT).unlink()
        registry.gate.rules_of_caller = lambda: policy
    entries = registry.log(SQL)
    with pytest.raises(RefusedError, match="approvals: 0 of 1") as refused:
        WAYS[way](registry, make)
    assert refused.value.code == "requirements-unmet"
    assert registry.log(SQL) == entries


NEW_WAYS = ("push", "publish with a tag")


@pytest.mark.parametrize(
    "requirement", ["approvals = 1", 'eval = { golden = "pass>=1" }', 'age = "1h"', "from_others = true\napprovals = 2"]
)
@pytest.mark.parametrize("way", NEW_WAYS)
def test_a_new_version_that_cannot_meet_the_requirements_leaves_no_bytes(
    way: str, requirement: str, registry: Registry, make: Make
) -> None:
    require(registry, requirement)
    before = {path: path.stat().st_size for path in registry.store.root.rglob("*") if path.is_file()}
    with pytest.raises(RefusedError, match="does not meet its requirements"):
        WAYS[way](registry, make)
    assert {path: path.stat().st_size for path in registry.store.root.rglob("*") if path.is_file()} == before


def test_a_push_of_an_approved_version_moves_the_tag(registry: Registry, make: Make) -> None:
    require(registry, 'age = "1s"')
    registry.gate.evidence.clock = lambda: time.time() + 60
    registry.push(make("a2", 2), PROD)
    assert prod(registry) == 2


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_the_tag_scans_files_under_the_lock(
    way: str, registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of many gigabytes had everybody else's push wait until it was scanned."""
    require(registry, 'scan = "clean"')
    scanned: list[bool] = []
    scan = version_facts.first_stored_problem

    def watched_scan(store: Store, manifest: Manifest) -> str:
        scanned.append(registry.index.in_transaction)
        return scan(store, manifest)

    monkeypatch.setattr(tag_requirements, "first_stored_problem", watched_scan)
    WAYS[way](registry, make)
    assert (scanned, prod(registry)) == ([False], 2 if way not in ("push", "publish with a tag") else 4)


def test_no_method_of_a_catalog_moves_the_tag_but_back(registry: Registry) -> None:
    """Found by looking: each method that takes a ref is called with the tag and a version, as far as it accepts them."""
    require(registry, "approvals = 1")
    registry.tag(v(2), "other")
    refs, numbers = [v(2), PROD, Ref("team/sql", tag="other")], [1, 2, None]
    called = set()
    catalog = LocalCatalog(registry)
    for name, method in inspect.getmembers(catalog, inspect.ismethod):
        parameters = inspect.signature(method).parameters
        if name.startswith("_") or name in ("close", "rm") or not {"ref", "name"} & parameters.keys():
            continue
        called.add(name)
        for ref in refs:
            for seq in numbers:
                other_arguments = {"rule": KeepRule(1), **dict.fromkeys(("text", "reason", "message"), "x")}
                chosen = {"ref": ref, "tag": "prod", "name": "team/sql", "new": "team/other", "seq": seq, **other_arguments}
                arguments = {key: chosen[key] for key in parameters if key in chosen}
                try:
                    method(**arguments)
                except AdapterhubError:
                    continue
                finally:
                    assert prod(registry) == 1, name
                    catalog.undo_withdrawal(v(2))
                    catalog.undo_withdrawal(v(1))
    assert {"tag", "restore_tag", "promote", "rollback", "restore", "withdraw"} <= called


def test_a_tag_with_requirements_that_was_removed_is_no_range(registry: Registry) -> None:
    registry.tag(v(3), "1.2.5")
    assert registry.resolve(Ref.parse("team/sql:1.2")).number == 3
    (registry.root / PROJECT).write_text('[promote."1.2".require]\napprovals = 1\napprovers = ["keys"]\n')
    registry.__dict__.pop("policy", None)
    with pytest.raises(NotFoundError, match="no such tag"):
        registry.resolve(Ref.parse("team/sql:1.2"))
    assert registry.resolve(Ref.parse("team/sql:^1.2")).number == 3
