"""A withdrawn version is opened by nobody, its bytes stay until they are asked to go, and everything about it is in the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.index import queries
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.maintenance.verify import verify
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.operations.copy import copy
from adapterhub.ref import Ref
from adapterhub.registry import lineage_graph, withdrawals
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves, withdrawal_rights
from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub.trust import bundle, keys, release_claims, statement
from adapterhub_converters.errors import RefusedError
from tests.support.adapters import Make, made_from

SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")


def v(number: int) -> Ref:
    return Ref("team/sql", number=number)


@pytest.fixture
def registry(tmp_path: Path, make: Make) -> Iterator[Registry]:
    """Three versions, the second of which is prod."""
    with Registry.init(tmp_path / "registry") as opened:
        for seed in (1, 2, 3):
            opened.push(make(f"a{seed}", seed), PROD if seed == 2 else SQL)
        yield opened


def withdraw(registry: Registry, number: int = 2, reason: str = "a leaked key") -> Withdrawal:
    return release_moves.withdraw(registry.ledger, v(number), ReleaseStatement(reason))


WAYS: dict[str, Callable[[Registry, Path, Make], object]] = {
    "resolve": lambda registry, _, __: registry.resolve(v(2)),
    "resolve by its tag": lambda registry, _, __: registry.resolve(PROD),
    "resolve by its digest": lambda registry, _, __: registry.resolve(Ref("team/sql", digest=registry.row(v(2)).digest)),
    "pull": lambda registry, out, _: registry.pull(v(2), out),
    "pull by digest alone": lambda registry, out, _: registry.pull_digest(registry.row(v(2)).digest, out),
    "promote": lambda registry, _, __: registry.promote(v(2), "staging"),
    "tag": lambda registry, _, __: registry.tag(v(2), "staging"),
    "push again": lambda registry, _, make: registry.push(make("a2", 2), SQL),
    "push again with a tag": lambda registry, _, make: registry.push(make("a2", 2), Ref.parse("team/sql:dev")),
    "restore of a tag": lambda registry, _, __: (registry.tag(v(1), "prod"), registry.restore_tag(PROD)),
    "approve": lambda registry, _, __: release_moves.approve(registry.ledger, v(2), "prod", ReleaseStatement("fine")),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_use_is_refused_with_the_reason(way: str, registry: Registry, tmp_path: Path, make: Make) -> None:
    withdraw(registry)
    with pytest.raises(RefusedError, match="v2 was withdrawn: a leaked key") as refused:
        WAYS[way](registry, tmp_path / "out", make)
    assert refused.value.code == "withdrawn"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "function",
    [
        lambda workspace: ah.pull("team/sql:v2", "out", workspace=workspace),
        lambda workspace: ah.resolve("team/sql:v2", runtime="peft", workspace=workspace),
        lambda workspace: ah.convert("team/sql:v2", "out", to="mlx", workspace=workspace),
        lambda workspace: ah.validate("team/sql:v2", workspace=workspace),
        lambda workspace: ah.merge(["team/sql:v2", "team/sql:v1"], out="out", workspace=workspace),
        lambda workspace: copy("team/sql:v2", "team/copy", workspace=workspace),
    ],
)
def test_functions_that_open_a_version_are_refused_alike(
    function: Callable[[ah.Workspace], object], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    withdraw(registry)
    with pytest.raises(RefusedError, match="was withdrawn") as refused:
        function(ah.Workspace(registry=registry.root, policy=None, cache="cache"))
    assert refused.value.code == "withdrawn"


def test_latest_moves_to_the_newest_other_version_and_other_tags_stay(registry: Registry) -> None:
    assert (withdraw(registry, 3).latest, registry.resolve(SQL).number) == (2, 2)
    withdrawal = withdraw(registry, 2)
    assert (withdrawal.latest, withdrawal.moved_latest, withdrawal.tags) == (1, True, ("prod",))
    assert (registry.resolve(SQL).number, registry.row(PROD).number) == (1, 2)
    assert withdraw(registry, 1).latest == 0
    with pytest.raises(RefusedError, match="was withdrawn"):
        registry.resolve(SQL)


def test_it_is_shown_logged_listed_and_said_again(registry: Registry) -> None:
    withdraw(registry)
    assert registry.show(v(2))["withdrawn"] == "a leaked key"
    assert registry.show(v(1))["withdrawn"] is None
    entries = registry.log(SQL)
    assert (entries[0].op, entries[0].number) == ("withdraw", 2)
    assert len(registry.list()) == 3
    assert withdraw(registry, reason="again").reason == "a leaked key"
    assert registry.log(SQL) == entries
    assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


def test_an_audit_still_reads_it(registry: Registry, make: Make) -> None:
    registry.push(made_from(make, "child", 9, registry.resolve(v(2))), Ref.parse("team/child"))
    digest = withdraw(registry).digest
    assert verify(registry, v(2)) == []
    assert [edge.child for edge in lineage_graph.trace(registry, v(2)).children(digest)] != []


def test_it_holds_after_the_index_is_built_again_and_the_name_removed_and_restored(registry: Registry) -> None:
    withdraw(registry)
    assert registry.rebuild_index() == []
    registry.rm(SQL)
    registry.restore("team/sql")
    with pytest.raises(RefusedError, match="a leaked key"):
        registry.resolve(v(2))


def test_a_withdrawal_can_be_undone(registry: Registry, make: Make) -> None:
    withdraw(registry)
    assert release_moves.undo_withdrawal(registry.ledger, v(2)).number == 2
    assert registry.resolve(PROD).number == 2
    assert registry.push(make("a2", 2), SQL).number == 2


def test_latest_is_the_newest_version_again_once_its_withdrawal_is_undone(registry: Registry) -> None:
    for number in (3, 2):
        withdraw(registry, number)
    for number, latest in ((2, 2), (3, 3)):
        release_moves.undo_withdrawal(registry.ledger, v(number))
        assert registry.resolve(SQL).number == latest
    entries = len(registry.log(SQL))
    withdraw(registry, 2)
    release_moves.undo_withdrawal(registry.ledger, v(2))
    assert (registry.resolve(SQL).number, len(registry.log(SQL))) == (3, entries + 2)


def test_a_withdrawal_that_was_cut_off_is_finished_by_the_same_call(registry: Registry) -> None:
    release_moves._move_latest(registry.ledger, registry.row(v(3)), "leaked")  # the first of its two entries
    assert (registry.resolve(SQL).number, registry.resolve(v(3)).number) == (2, 3)
    withdrawal = withdraw(registry, 3)
    assert (withdrawal.latest, registry.resolve(SQL).number) == (2, 2)
    with pytest.raises(RefusedError, match="a leaked key"):
        registry.resolve(v(3))


def test_the_words_of_a_server_are_followed_by_the_hint_once() -> None:
    error = withdrawals.error_elsewhere("hub", ": team/sql: v2 was withdrawn: leaked. Use another version")
    assert str(error) == "hub: was withdrawn: team/sql: v2 was withdrawn: leaked. Use another version"


def test_another_name_with_the_same_bytes_goes_on(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make("a2", 2), Ref.parse("team/copy"))
    withdraw(registry)
    assert registry.resolve(Ref.parse("team/copy")).number == 1
    assert registry.pull_digest(registry.row(v(2)).digest, tmp_path / "out")


# ---- gc


def test_its_bytes_stay_for_the_audit_until_they_are_asked_to_go(registry: Registry, make: Make) -> None:
    weights = next(file.digest for file in registry.files(registry.resolve(v(2))) if file.path.endswith(".safetensors"))
    registry.tag(v(3), "prod")
    withdraw(registry)
    assert gc(registry, grace=0, last=1).dropped == [v(1)]
    assert registry.store.size(weights) is not None
    assert gc(registry, grace=0, withdrawn=True, dry_run=True).dropped == [v(2)]
    assert gc(registry, grace=0, withdrawn=True).dropped == [v(2)]
    assert registry.store.size(weights) is None
    # The same bytes do not come back under the name.
    with pytest.raises(RefusedError, match="a leaked key"):
        registry.push(make("a2", 2), SQL)
    assert registry.rebuild_index() == []
    with pytest.raises(RefusedError, match="a leaked key"):
        registry.push(make("a2", 2), SQL)


def test_what_a_tag_still_means_stays_and_what_was_made_from_it_does_not_keep_it(registry: Registry, make: Make) -> None:
    registry.push(made_from(make, "child", 9, registry.resolve(v(1))), Ref.parse("team/child"))
    withdraw(registry, 1)
    withdraw(registry, 2)
    assert gc(registry, grace=0, withdrawn=True).dropped == [v(1)]
    assert queries.tags(registry.index, "team/sql")["prod"] == 2


def test_the_previous_version_of_a_tag_is_kept_if_its_requirements_say_so(registry: Registry, make: Make) -> None:
    registry.tag(v(3), "prod")
    registry.push(make("a4", 4), SQL)
    (registry.root / "adapterhub.toml").write_text("[promote.prod]\nkeep_previous = true\n")
    registry.__dict__.pop("policy")  # which is read once
    assert gc(registry, grace=0, last=1).dropped == [v(1)]
    assert release_moves.rollback(registry.ledger, PROD, "")[1].number == 2


# ---- signed versions


def test_a_signed_version_needs_its_signer(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.oci_manifest(registry.resolve(v(2)))
    withdrawal_rights.check("team/sql", 2, manifest, [], None)  # unsigned
    signers = {}
    for name in ("release", "other"):
        keys.generate(tmp_path / name)
        signers[name] = keys.read_private(tmp_path / f"{name}.key")
    files = {layer.path: layer.digest for layer in manifest.layers}
    signature = bundle.sign(statement.Statement("team/sql", files), signers["release"])

    def claim(name: str, about: str = "") -> withdrawal_rights.WithdrawalClaim:
        digest = about or manifest.digest
        raw = release_claims.sign(release_claims.WITHDRAWAL, "team/sql", digest, signers[name], text="x")
        return withdrawal_rights.WithdrawalClaim(raw, signers[name].public)

    other_version = registry.resolve(v(1)).digest
    for refused in (None, claim("other"), claim("release", other_version)):
        with pytest.raises(RefusedError, match="only its signer or an admin may withdraw it") as error:
            withdrawal_rights.check("team/sql", 2, manifest, [signature], refused)
        assert error.value.code == "signed-version"
    withdrawal_rights.check("team/sql", 2, manifest, [signature, signature], claim("release"))
    # A signature that somebody has added makes nobody the signer who decides.
    added = bundle.sign(statement.Statement("team/sql", files), signers["other"])
    for name in ("release", "other"):
        with pytest.raises(RefusedError, match="is signed by several, and only an admin may withdraw it"):
            withdrawal_rights.check("team/sql", 2, manifest, [signature, added], claim(name))
