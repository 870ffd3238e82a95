"""Facts and files that differ between two versions."""

from __future__ import annotations

import dataclasses

from adapterhub.manifest import fact_changes
from adapterhub.manifest.document import AdapterManifest, BaseInfo, FileEntry, Training
from adapterhub.manifest.fact_changes import FactChange

PLAIN = AdapterManifest.salvage({"r": 8, "alpha": 16, "method": "lora"})


def entry(path: str, digit: str) -> FileEntry:
    return FileEntry(path, f"sha256:{digit * 64}", 1)


def test_facts_have_dotted_keys_and_empty_values_are_absent() -> None:
    other_manifest = dataclasses.replace(PLAIN, license="MIT", base=BaseInfo(repo="org/base"), targets=("q_proj",))
    assert fact_changes.facts(PLAIN, PLAIN) == ()
    assert fact_changes.facts(PLAIN, other_manifest) == (
        FactChange("base.repo", None, "org/base"),
        FactChange("targets", None, ["q_proj"]),
        FactChange("license", None, "MIT"),
    )


def test_a_record_that_one_of_both_lacks_is_one_fact_and_other_records_are_compared_key_by_key() -> None:
    first, second = (dataclasses.replace(PLAIN, training=Training(seed=seed, metrics={"loss": 1.5})) for seed in (1, 2))
    assert [change.key for change in fact_changes.facts(PLAIN, first)] == ["training"]
    assert fact_changes.facts(first, second) == (FactChange("training.seed", 1, 2),)


def test_files_are_compared_by_digest_and_are_no_facts() -> None:
    first, second = [entry("a", "0"), entry("b", "0")], [entry("b", "1"), entry("c", "0")]
    changes = fact_changes.files(first, second)
    assert [(change.path, change.status) for change in changes] == [("a", "removed"), ("b", "changed"), ("c", "added")]
    sides = (dataclasses.replace(PLAIN, files=tuple(files)) for files in (first, second))
    assert fact_changes.facts(*sides) == ()
