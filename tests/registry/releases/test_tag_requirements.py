"""A tag with requirements moves only to a version that meets all of them, whoever moves it; each has its evidence."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.oci_manifest import parse
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.project import PROJECT, settings_file
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log
from adapterhub.registry.packaging import package
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.registry.releases.tag_requirements import Requirement
from adapterhub.remotes.local_catalog import LocalCatalog
from adapterhub.store.ref_log import TAG_MOVES
from adapterhub.trust import attestation, bundle, keys, release_claims, statement
from adapterhub_converters.errors import AdapterhubError, ConflictError, NotFoundError, RefusedError, UsageError
from tests.registry.forks import finished, fork
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


@pytest.mark.parametrize(
    ("metrics", "gate", "value", "is_met"),
    [
        (
            {"pass_rate": 0.975, "cases": 40.0},
            "pass>=0.95",
            "cannot tell yet: 40 of about 300 needed (0.975 so far)",
            False,
        ),
        ({"pass_rate": 0.9, "cases": 40.0}, "pass>=0.95", "0.9 (40 samples)", False),
        ({"pass_rate": 1.0, "cases": 100.0}, "pass>=0.95", "1 (100 samples)", True),
        ({"pass_rate": 1.0, "cases": 3.0}, "pass>=1", "1 (3 samples)", True),
        ({"perplexity": 9.5}, "ppl<12", "9.5", True),
        ({"exact_match": 0.71, "exact_match_stderr": 0.02, "samples": 500.0}, "exact_match>0.6", "0.71 (500 samples)", True),
        ({"loss": 1.0}, "ppl<12", "perplexity was not measured", False),
    ],
)
def test_a_gate_holds_by_the_last_record_if_there_are_enough_samples(
    metrics: dict[str, float], gate: str, value: str, is_met: bool, registry: Registry
) -> None:
    require(registry, f'eval = {{ tests = "{gate}" }}')
    assert (requirement(registry).rule, requirement(registry).value) == ("eval.tests", "was not measured")
    measurement_log.record(registry, v(2), Evaluation("tests", metrics))
    assert (requirement(registry).value, requirement(registry).is_met) == (value, is_met)
    assert requirement(registry).evidence == "log entry 4"
    assert not requirement(registry, 3).is_met  # the record is of these bytes only


def test_a_gate_against_the_tag_compares_the_same_tests_of_both_versions(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass>=against" }')
    measurement_log.record(registry, v(2), GOOD)
    assert requirement(registry).value == "v1, which it means now, was not measured"
    measurement_log.record(registry, v(1), Evaluation("tests", {}, cases={"other": 1.0}))
    assert requirement(registry).value == "v1 was measured on other tests"
    worse = {f"t{n}": float(n > 20) for n in range(100)}
    measurement_log.record(registry, v(1), Evaluation("tests", {}, cases=worse))
    assert requirement(registry).is_met
    assert requirement(registry).evidence == "log entry 4, log entry 6"
    measurement_log.record(registry, v(3), Evaluation("tests", {}, cases=worse))
    registry.tag(v(2), "prod")
    assert not requirement(registry, 3).is_met


def test_a_gate_against_a_tag_that_was_removed_compares_with_what_it_meant_last(registry: Registry, make: Make) -> None:
    require(registry, 'eval = { tests = "pass>=against" }')
    worse = Evaluation("tests", {}, cases={f"t{n}": float(n > 20) for n in range(100)})
    for number, measured in ((1, GOOD), (2, worse)):
        measurement_log.record(registry, v(number), measured)
    before = requirement(registry)
    registry.rm(PROD)
    assert (requirement(registry), before.is_met) == (before, False)
    with pytest.raises(RefusedError, match="eval.tests"):
        registry.tag(v(2), "prod")
    with pytest.raises(RefusedError, match="eval.tests: was not measured"):
        registry.push(make("a4", 4), PROD)
    assert requirement(registry, 1).value == "is what prod meant last"
    registry.tag(v(1), "prod")
    assert prod(registry) == 1


def test_a_gate_that_cannot_be_read_is_not_met(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass is good" }')
    assert not requirement(registry).is_met
    assert requirement(registry).value.startswith("cannot be read: ")


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
    assert requirement(registry).value.endswith("own.pub (by ana) pushed, signed or moves it")
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


# ---- no way around


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
@pytest.mark.parametrize("of", ["registry", "caller"])
def test_every_way_to_the_tag_is_refused_with_what_is_missing_and_moves_nothing(
    way: str, of: str, registry: Registry, make: Make
) -> None:
    require(registry, "approvals = 1")
    if of == "caller":
        policy: Policy = settings_file.read(registry.root / PROJECT).policy
        (registry.root / PROJECT).unlink()
        registry.gate.rules_of_caller = lambda: policy
    entries = registry.log(SQL)
    with pytest.raises(RefusedError, match="approvals: 0 of 1") as refused:
        WAYS[way](registry, make)
    assert refused.value.code == "requirements-unmet"
    assert registry.log(SQL) == entries


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
                texts = dict.fromkeys(("text", "reason", "message"), "x")
                chosen = {"ref": ref, "tag": "prod", "name": "team/sql", "new": "team/other", "seq": seq, **texts}
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


def test_a_name_that_is_restored_has_the_tag_as_it_was(registry: Registry) -> None:
    require(registry, "approvals = 1")
    registry.rm(SQL)
    registry.restore("team/sql")
    assert prod(registry) == 1


# ---- promotion and rollback


def test_a_promotion_moves_the_tag_with_its_reason(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass>=0.95" }')
    measurement_log.record(registry, v(2), GOOD)
    assessment, version = registry.promote(v(2), "prod", "as agreed")
    assert (assessment.missing, version.number, prod(registry)) == ([], 2, 2)
    entry = registry.log(PROD)[0]
    assert (entry.op, entry.message, entry.author) == ("tag", "as agreed", "ana")


def test_latest_has_no_requirements_and_is_promoted_to_by_nobody(registry: Registry) -> None:
    with pytest.raises(UsageError, match="is always the newest push"):
        settings_file.parse("[promote.latest]\n", Path(PROJECT))
    with pytest.raises(RefusedError) as refused:
        registry.promote(v(1), "latest")
    assert refused.value.code == "latest-tag"


def test_who_looked_before_another_moved_the_tag_is_told(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    look = registry.assess

    def and_another_moves(ref: Ref, tag: str) -> object:
        assessment = look(ref, tag)
        registry.tag(v(3), "prod")
        return assessment

    monkeypatch.setattr(registry, "assess", and_another_moves)
    with pytest.raises(ConflictError, match="moved in the meantime: it is sha256:"):
        registry.promote(v(2), "prod")
    assert prod(registry) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_ten_promoters_at_once_each_move_is_in_the_log_and_the_losers_are_told(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass>=0.95" }')
    for number in (2, 3):
        measurement_log.record(registry, v(number), GOOD)
    root = registry.root
    before = len(registry.log(SQL))

    def promote(number: int) -> Callable[[], None]:
        def work() -> None:
            with Registry.open(root) as opened:
                opened.author = f"promoter {number}"
                try:
                    opened.promote(v(2 + number % 2), "prod")
                except ConflictError:
                    os._exit(7)

        return work

    codes = finished([fork(promote(number)) for number in range(10)])
    assert set(codes) <= {0, 7}
    moves = registry.log(SQL)[: len(registry.log(SQL)) - before]
    # Those who found the tag where they wanted it moved nothing, and nobody moved it unseen.
    assert 1 <= len(moves) <= codes.count(0)
    assert all(newer.number != older.number for newer, older in itertools.pairwise(moves))
    assert prod(registry) == moves[0].number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_storm_of_moves_approvals_and_rollbacks_loses_nothing(registry: Registry) -> None:
    root, rounds, before = registry.root, 6, len(registry.log(SQL))

    def work(kind: int) -> Callable[[], None]:
        def moves() -> None:
            with Registry.open(root) as opened:
                for turn in range(rounds):
                    if kind == 0:
                        statement_ = ReleaseStatement(f"{turn}", "", "")
                        release_moves.approve(opened.ledger, v(2), "prod", statement_)
                    elif kind == 1:
                        opened.tag(v(2 + turn % 2), "other")
                    else:
                        measurement_log.record(opened, v(1), Evaluation(f"e{kind}-{turn}", {"loss": float(turn)}))

        return moves

    assert finished([fork(work(kind)) for kind in range(4)]) == [0] * 4
    entries = registry.log(SQL)
    assert len(entries) == before + 4 * rounds
    assert registry.rebuild_index() == []


def test_a_rollback_goes_one_step_back_and_never_forth(registry: Registry) -> None:
    registry.tag(v(2), "prod")
    registry.tag(v(3), "prod")
    require(registry, "approvals = 1")
    assert [version.number for version in release_moves.rollback(registry.ledger, PROD, "wrong dates")] == [3, 2]
    entry = registry.log(PROD)[0]
    assert (entry.op, entry.message, prod(registry)) == ("rollback", "wrong dates", 2)
    release_moves.rollback(registry.ledger, PROD, "")
    assert prod(registry) == 1
    with pytest.raises(AdapterhubError, match="had no other version before that can be used"):
        release_moves.rollback(registry.ledger, PROD, "")
    assert registry.rebuild_index() == []
    assert prod(registry) == 1


def test_a_rollback_skips_what_was_withdrawn_and_a_protected_tag_stays(registry: Registry) -> None:
    registry.tag(v(2), "prod")
    registry.tag(v(3), "prod")
    release_moves.withdraw(registry.ledger, v(2), ReleaseStatement("leaked"))
    registry.protect(PROD)
    with pytest.raises(RefusedError) as refused:
        release_moves.rollback(registry.ledger, PROD, "")
    assert refused.value.code == "protected"
    registry.protect(PROD, on=False)
    assert release_moves.rollback(registry.ledger, PROD, "")[1].number == 1
