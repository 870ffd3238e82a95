"""The version that a ref names, now and after earlier entries of its log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.ref import Ref, RefError
from adapterhub.registry import version_lookup
from adapterhub.registry.ledger import Ledger
from adapterhub.registry.registry import Registry
from adapterhub.store.ref_log import Entry
from adapterhub_converters.errors import IntegrityError, NotFoundError

PROD = Ref.parse("team/sql:prod")
DIGESTS = ["", *("sha256:" + f"{number}" * 64 for number in range(1, 6))]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened.ledger


def logged(ledger: Ledger, *entries: tuple[str, int, tuple[str, ...]]) -> int:
    """Write a log of operations with their number and tags; `restore` and `drop` have numbers in place of tags. Its length."""
    head = ""
    for seq, (op, number, words) in enumerate(entries, 1):
        numbers = tuple(int(word) for word in words) if op in ("restore", "drop") else ()
        digest, tags = DIGESTS[number] if op in ("push", "tag") else "", () if numbers else words
        assert ledger.store.log.append(
            Entry("team/sql", seq, op, "2026-01-01T00:00:00Z", digest, 1, number, tags, head, numbers=numbers)
        )
        entry = ledger.store.log.entry("team/sql", seq)
        assert entry is not None
        head = entry[1]
    return len(entries)


MOVES = (
    ("push", 1, ("prod",)),
    ("push", 2, ()),
    ("tag", 2, ("prod",)),
    ("tag", 1, ("dev",)),
    ("untag", 0, ("prod",)),
    ("push", 3, ("prod", "dev")),
)


def test_a_tag_is_restored_to_what_it_was_before_its_last_move(ledger: Ledger) -> None:
    assert version_lookup.number_before(ledger, PROD, logged(ledger, *MOVES[:3]), None) == 1


def test_a_tag_is_known_after_each_entry(ledger: Ledger) -> None:
    end = logged(ledger, *MOVES)
    assert [version_lookup.number_before(ledger, PROD, end, seq) for seq in (1, 2, 3, 4, 6)] == [1, 1, 2, 2, 3]
    with pytest.raises(NotFoundError, match=r"team/sql:prod: did not exist at entry 5"):
        version_lookup.number_before(ledger, PROD, end, 5)
    with pytest.raises(NotFoundError, match=r"team/sql:prod: did not exist before entry 6"):
        version_lookup.number_before(ledger, PROD, end, None)


@pytest.mark.parametrize("seq", [0, 7])
def test_an_entry_that_the_log_does_not_have_is_refused(ledger: Ledger, seq: int) -> None:
    with pytest.raises(NotFoundError, match=f"there is no entry {seq}; the log has 1 to 6. Look at the log") as caught:
        version_lookup.number_before(ledger, PROD, logged(ledger, *MOVES), seq)
    assert (caught.value.code, caught.value.fields) == ("look-at-log", {"ref": "team/sql"})


def test_a_tag_that_was_never_set_is_told_from_one_that_is_gone(ledger: Ledger) -> None:
    end = logged(ledger, *MOVES)
    with pytest.raises(NotFoundError, match="this tag was never set"):
        version_lookup.number_before(ledger, Ref.parse("team/sql:other"), end, None)


def test_before_its_first_move_a_tag_did_not_exist(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError, match="team/sql:prod: did not exist before entry 1"):
        version_lookup.number_before(ledger, PROD, logged(ledger, MOVES[0]), None)


def test_a_removal_takes_a_tag_and_a_restore_brings_it_back_with_its_version(ledger: Ledger) -> None:
    end = logged(
        ledger, ("push", 1, ("prod",)), ("push", 2, ("dev",)), ("delete", 0, ()), ("restore", 0, ("1",)), ("tag", 1, ("dev",))
    )
    assert [version_lookup.number_before(ledger, PROD, end, seq) for seq in (2, 4)] == [1, 1]
    with pytest.raises(NotFoundError, match="did not exist at entry 3"):
        version_lookup.number_before(ledger, PROD, end, 3)
    with pytest.raises(NotFoundError, match="did not exist at entry 4"):
        version_lookup.number_before(ledger, Ref.parse("team/sql:dev"), end, 4)
    assert version_lookup.number_before(ledger, Ref.parse("team/sql:dev"), end, 5) == 1


def test_the_versions_that_a_removal_took_are_those_since_the_last_one_without_the_dropped(ledger: Ledger) -> None:
    logged(
        ledger,
        ("push", 1, ()),
        ("push", 2, ("prod",)),
        ("push", 3, ()),
        ("tag", 1, ("dev",)),
        ("drop", 0, ("2",)),
        ("delete", 0, ()),
    )
    assert version_lookup.removed_versions(ledger.store.log.entries("team/sql")) == {1: DIGESTS[1], 3: DIGESTS[3]}


def test_a_ref_names_a_version_by_tag_number_digest_or_range(ledger: Ledger) -> None:
    logged(ledger, ("push", 1, ("latest", "1.0.0")), ("push", 2, ("latest", "1.2.0", "prod")), ("push", 3, ("latest", "2.0.0")))

    def number(text: str) -> int:
        return version_lookup.find_row(ledger, Ref.parse(f"team/sql{text}")).number

    numbers = [
        number(text) for text in ("", ":latest", ":prod", ":1.0.0", ":v1", ":^1", ":~1.0", ":1", "@2222", f"@{DIGESTS[3]}")
    ]
    assert numbers == [3, 3, 2, 1, 1, 2, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (":dev", "no-such-tag", "no such tag; the registry has 1.0.0, latest, v1"),
        (":v2", "no-such-version", "no such version; the registry has 1.0.0, latest, v1"),
        ("@2222", "no-such-version", "no such version; the registry has"),
        (":^3", "not-found", "no tag is in this range; the version tags are 1.0.0. A range matches tags like 1.2.0"),
    ],
)
def test_a_version_that_is_not_there_is_told_with_those_that_are(ledger: Ledger, text: str, code: str, says: str) -> None:
    logged(ledger, ("push", 1, ("latest", "1.0.0")))
    with pytest.raises(NotFoundError, match=says) as caught:
        version_lookup.find_row(ledger, Ref.parse(f"team/sql{text}"))
    assert caught.value.code == code


def test_a_name_that_is_nearly_another_leads_to_it(ledger: Ledger) -> None:
    logged(ledger, ("push", 1, ("latest",)))
    version_lookup.find_row(ledger, Ref.parse("team/sql"))  # the index learns of a name when it is asked for
    for name, hint in (("team/sq1", "Did you mean team/sql?"), ("other/name", "List the adapters of the registry")):
        with pytest.raises(NotFoundError) as caught:
            version_lookup.find_row(ledger, Ref.parse(name))
        assert (caught.value.what, caught.value.hint, caught.value.code) == ("no such adapter", hint, "no-such-adapter")


def test_digits_of_two_digests_name_neither(ledger: Ledger) -> None:
    log, ends, head = ledger.store.log, ("1", "2"), ""
    for seq, end in enumerate(ends, 1):
        log.append(Entry("team/sql", seq, "push", "2026-01-01T00:00:00Z", "sha256:" + "a" * 63 + end, 1, seq, (), head))
        head = (log.entry("team/sql", seq) or (None, ""))[1]
    with pytest.raises(RefError, match="ambiguous digest prefix: 2 versions, such as team/sql:v2, team/sql:v1"):
        version_lookup.find_row(ledger, Ref.parse("team/sql@aaaa"))


def test_a_version_of_the_index_that_the_log_does_not_have_is_no_version(ledger: Ledger) -> None:
    logged(ledger, ("push", 1, ("latest",)), ("push", 2, ("prod",)))
    assert version_lookup.find_row(ledger, Ref.parse("team/sql:latest")).number == 1
    ledger.index.execute("UPDATE tags SET number = 2 WHERE tag = 'latest'")
    ledger.verified_heads.clear()  # what this process has compared before
    with pytest.raises(IntegrityError, match="Rebuild the index") as caught:
        version_lookup.find_row(ledger, Ref.parse("team/sql:latest"))
    assert caught.value.code == "rebuild-index"


def test_a_ref_that_is_about_to_change_is_no_range(ledger: Ledger) -> None:
    logged(ledger, ("push", 1, ("latest", "1.2.0")))
    assert version_lookup.find_row(ledger, Ref.parse("team/sql:1.2")).number == 1
    for text in (":1.2", ":^1"):
        with pytest.raises(NotFoundError, match="no such tag|in this range"):
            version_lookup.find_exact_row(ledger, Ref.parse(f"team/sql{text}"))
    assert version_lookup.find_exact_row(ledger, Ref.parse("team/sql:1.2.0")).number == 1
    assert version_lookup.find_exact_row(ledger, Ref.parse("team/sql")).number == 1


def test_a_version_is_deprecated_by_itself_before_its_name(ledger: Ledger) -> None:
    logged(ledger, ("push", 1, ("latest",)))
    row = version_lookup.find_row(ledger, Ref.parse("team/sql"))
    assert version_lookup.deprecation(ledger, row) is None
    for seq, number, message in ((2, 0, "all"), (3, 1, "this")):
        _, head = ledger.store.log.entry("team/sql", seq - 1) or (None, "")
        ledger.store.log.append(Entry("team/sql", seq, "deprecate", "2026-01-01T00:00:00Z", "", 0, number, (), head, message))
        assert version_lookup.deprecation(ledger, version_lookup.find_row(ledger, Ref.parse("team/sql"))) == message
        assert version_lookup.version_of(ledger, row, "latest").deprecated == message
