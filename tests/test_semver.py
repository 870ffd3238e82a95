"""Ranges over tags: npm's rules, semver.org's order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.ref import Ref, RefError
from adapterhub.registry.registry import Registry
from adapterhub.semver import highest, parse, parse_range
from adapterhub_converters.errors import NotFoundError, RefusedError
from tests.support.adapters import Make

# semver.org, 11.4: "Example: 1.0.0-alpha < ... < 1.0.0", and the numbers of 11.2.
IN_ORDER = (
    "1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1 1.0.0 2.0.0 2.1.0 2.1.1 10.0.0"
)


def test_versions_sort_as_in_semver() -> None:
    versions = IN_ORDER.split()
    mixed = random.Random(0).sample(versions, len(versions))
    assert sorted(mixed, key=lambda text: parse(text) or pytest.fail(text)) == versions


# node-semver's README, "Advanced Range Syntax": the range, its first version, the first beyond it.
RANGES = [
    ("~1.2.3", "1.2.3", "1.3.0"), ("~1.2", "1.2.0", "1.3.0"), ("~1", "1.0.0", "2.0.0"), ("~0.2.3", "0.2.3", "0.3.0"),
    ("~0.2", "0.2.0", "0.3.0"), ("~0", "0.0.0", "1.0.0"), ("^1.2.3", "1.2.3", "2.0.0"), ("^0.2.3", "0.2.3", "0.3.0"),
    ("^0.0.3", "0.0.3", "0.0.4"), ("^0.0", "0.0.0", "0.1.0"), ("^1", "1.0.0", "2.0.0"), ("^0", "0.0.0", "1.0.0"),
    ("1.2", "1.2.0", "1.3.0"), ("1", "1.0.0", "2.0.0"), ("1.2.3", "1.2.3", "1.2.4"), ("^0.1", "0.1.0", "0.2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "first", "beyond"), RANGES)
def test_a_range_has_the_same_bounds_as_in_npm(text: str, first: str, beyond: str) -> None:
    parsed_range = parse_range(text)
    assert parsed_range
    assert highest([first, f"{beyond}-rc.1", beyond], parsed_range) == [first]
    numbers = [int(part) for part in beyond.split(".")]
    at = max(place for place, number in enumerate(numbers) if number)
    last = ".".join(map(str, [*numbers[:at], numbers[at] - 1, *[99] * (2 - at)]))
    assert highest([*{first, last}], parsed_range) == [last]


def test_prereleases_are_in_a_range_only_where_it_names_one() -> None:
    tags = ["1.2.0", "1.3.0-rc.2", "1.2.1-rc.1"]
    for text, highest_tag in [
        ("^1.2", "1.2.0"),
        ("^1.2.1-rc.1", "1.2.1-rc.1"),
        ("~1.3.0-rc.1", "1.3.0-rc.2"),
        ("^1.3.0-rc.9", ""),
    ]:
        expected = parse_range(text)
        assert expected
        assert highest(tags, expected) == ([highest_tag] if highest_tag else [])


def test_only_what_has_a_dash_is_a_prerelease() -> None:
    assert [version.is_pre for text in ("1.2.3", "1.2.3-rc.1") if (version := parse(text))] == [False, True]


@pytest.mark.parametrize("text", ["1.2", "1.2.3.4", "01.2.3", "1.2.3-", "1.2.3-01", "1.2.3-a..b", "latest", "v1", "", "1.2.3 "])
def test_what_is_not_a_version_is_in_no_range(text: str) -> None:
    assert parse(text) is None


def test_a_ref_with_a_range_is_the_highest_matching_tag(make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        for seed, tag in enumerate(["1.2.0", "v1.10.0", "1.9.0", "2.0.0-rc.1", "prod"]):
            registry.push(make(tag, seed), Ref.parse(f"team/sql:{tag}"))
        for text, number in [("^1.2", 2), ("~1.2", 1), ("~1.9", 3), ("^2.0.0-rc.1", 4), ("1", 2), ("1.9", 3)]:
            assert registry.resolve(Ref.parse(f"team/sql:{text}")).number == number, text
        with pytest.raises(
            NotFoundError, match=r"team/sql:\^2: no tag is in this range; the version tags are 1.2.0, 1.9.0, 2.0.0-rc"
        ):
            registry.resolve(Ref.parse("team/sql:^2"))
        registry.tag(Ref.parse("team/sql:v1"), "1")
        assert registry.resolve(Ref.parse("team/sql:1")).number == 1  # the tag itself, now that there is one
        registry.tag(Ref.parse("team/sql:v1"), "1.10.0")
        with pytest.raises(RefError, match="1.10.0 and v1.10.0 are the same version number and point to different versions"):
            registry.resolve(Ref.parse("team/sql:^1.2"))


def test_a_range_is_for_reading_only(make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(make(), Ref.parse("team/sql:1.2.0"))
        with pytest.raises(RefError, match="a push assigns the number itself"):
            registry.push(make(), Ref.parse("team/sql:^1"))
        for text in ("team/sql:^1", "team/sql:1.2"):
            with pytest.raises((NotFoundError, RefusedError)):
                registry.rm(Ref.parse(text))
        with pytest.raises(RefError, match="is a range of versions, not a tag"):
            registry.tag(Ref.parse("team/sql"), "^1.2")
        assert queries.tags(registry.index, "team/sql") == {"1.2.0": 1, "latest": 1}
