"""Rules about the content of a version: each lets through what it allows, and refuses what it does not by its reason."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest.document import AdapterManifest
from adapterhub.project import settings_file
from adapterhub.project.policy import Policy
from adapterhub.project.policy_rules import VersionFacts
from adapterhub_converters.errors import RefusedError

ONE, OTHER = (f"sha256:{digit * 64}" for digit in "12")
NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
ATTESTED = '[policy.attestations."*"]\ntraining = ["k.pub"]\n'
MIT: dict[str, Any] = {"license": "MIT"}
LICENSES = '[policy]\nlicenses = ["MIT"]\n'
ON_BASE = MIT | {"base": {"repo": "org/m"}}
USER_DATA = {"data_sources": [{"kind": "user", "license": "CC0-1.0"}]}
DATA = {"license": "MIT", "training": {"data": [{"name": "org/rows", "digest": ONE, "license": "MIT"}]}}
PARENT = AdapterManifest.salvage(DATA | {"expires": "2026-06-01", "license": "GPL-3.0-only"})
MERGED = {"license": "MIT", "parents": [{"digest": OTHER, "ref": "team/a:v1"}]}
CONVERTED = MERGED | {"recipe": {"kind": "convert", "rank": None, "to": "gguf"}}


def policy(text: str) -> Policy:
    return settings_file.parse(text, Path("p.toml")).policy


def weights(digest: str) -> dict[str, Any]:
    files = [{"path": "model.safetensors", "digest": digest, "size": 1}]
    return {"base": {"repo": "org/m", "revision": "r1"}, "training": {"weights": files}}


def result(**fields: Any) -> dict[str, Any]:
    return {"evaluations": [{"metric": "bleu", "value": 30, **fields}]}


NAMED_LIKE_A_DIGEST = {"training": {"data": [{"name": ONE, "digest": OTHER}]}}
BY_NAME = '[policy.base_models."org/m"]\n'
EVALUATION = f'[policy.evaluations.bleu]\nmin = 20\ndata = ["{ONE}"]\nrecorders = ["owner"]\n'


@pytest.mark.parametrize(
    ("text", "document", "reason"),
    [
        (LICENSES + 'license_parts = ["data"]', DATA, ""),
        (LICENSES + 'license_parts = ["data"]', MIT | {"training": {"data": [{"name": "x"}]}}, "data x is not rec"),
        (LICENSES + 'license_parts = ["data"]', MIT | USER_DATA, "data user is CC0"),
        (LICENSES + 'license_parts = ["base"]', ON_BASE, "base org/m is not recorded"),
        (LICENSES + 'license_parts = ["base"]\n' + BY_NAME + 'license = "MIT"', ON_BASE, ""),
        (LICENSES + 'license_parts = ["base"]\n' + BY_NAME + 'license = "GPL-2.0-only"', ON_BASE, "base org/m is GPL"),
        (LICENSES + 'license_parts = ["parents"]', MERGED, "parent team/a:v1 is GPL-3.0-only"),
        (LICENSES + 'license_parts = ["data"]', MERGED, ""),
        (BY_NAME, {"base": {"repo": "org/m"}}, ""),
        (BY_NAME, {"base": {"repo": "evil/m"}}, "its base is evil/m, which is not one of org/m"),
        (BY_NAME, {}, "its base is without a name"),
        (BY_NAME + 'revisions = ["r1"]', {"base": {"repo": "org/m", "revision": "r1"}}, ""),
        (BY_NAME + 'revisions = ["r1"]', {"base": {"repo": "org/m", "revision": "r2"}}, "in the revision r2"),
        (BY_NAME + 'revisions = ["r1"]', {"base": {"repo": "org/m"}}, "in the revision that is not recorded"),
        (BY_NAME + f'weights = ["{ONE}"]\n' + ATTESTED, weights(ONE), ""),
        (BY_NAME + f'weights = ["{ONE}"]\n' + ATTESTED, weights(OTHER), "org/m with other weights"),
        (BY_NAME + f'weights = ["{ONE}"]\n' + ATTESTED, {"base": {"repo": "org/m"}}, "no digests of its weights"),
        ('[policy]\ndata = ["org/*"]', DATA, ""),
        (f'[policy]\ndata = ["{ONE}"]', DATA, ""),
        (f'[policy]\ndata = ["{OTHER}"]', DATA, "org/rows is not one of the data"),
        (f'[policy]\ndata = ["{ONE}"]', NAMED_LIKE_A_DIGEST, f"{ONE} is not one of the data"),
        (f'[policy]\ndata = ["{ONE}"]', {"data_sources": [{"kind": "public", "name": ONE}]}, "is not one of the data"),
        ('[policy]\ndata = ["rows.jsonl"]', {"training": {"data": [{"path": "rows.jsonl"}]}}, "rows.jsonl is not one of"),
        ('[policy]\ndata = ["https://x/*"]', {"data_sources": [{"kind": "public", "address": "https://x/y"}]}, ""),
        ('[policy]\ndata = ["org/*"]', {}, "no data of the adapter is recorded"),
        ('[policy]\ndata = ["org/*"]', MERGED, ""),
        ('[policy]\ndata = ["other/*"]', MERGED, "org/rows is not one of"),
        ('[policy]\ndata = ["org/*"]', {"parents": [{"digest": ONE}]}, f"parent {ONE[:19]} is not at hand"),
        (EVALUATION, result(digest=ONE, recorder="owner"), ""),
        (EVALUATION, result(digest=OTHER, recorder="owner"), "evaluations.bleu: was measured on other data"),
        (EVALUATION, result(recorder="owner"), "does not say which data"),
        (EVALUATION, result(digest=ONE, recorder="owner", value=19), "19 is below 20"),
        (EVALUATION.replace("owner", "lm-eval"), result(digest=ONE, recorder="lm-eval"), "was recorded by owner, not lm-eval"),
        (EVALUATION.replace("owner", "lm-eval"), result(digest=ONE), "was recorded by owner, not lm-eval"),
        (EVALUATION, {}, "evaluations.bleu: was not measured"),
        ("[policy]\nunexpired = true", {}, ""),
        ("[policy]\nunexpired = true", {"expires": "2026-06-02"}, ""),
        ("[policy]\nunexpired = true", {"expires": "2026-06-01"}, "it expired on 2026-06-01"),
        ("[policy]\nunexpired = true", {"expires": "soon"}, "it expired on soon"),
        ("[policy]\nunexpired = true", {"parents": [{"digest": ONE}]}, f"its parent {ONE[:19]} is not at hand, and may have"),
        ("[policy]\nunexpired = true", CONVERTED | {"expires": "2027-01-01"}, "it expired on 2026-06-01"),
        ('[policy]\nmax_age = "30d"', {"training": {"created": "2026-05-02T00:00:00Z"}}, ""),
        ('[policy]\nmax_age = "30d"', {"training": {"created": "2026-05-01T00:00:00Z"}}, "31 days are over 30"),
        ('[policy]\nmax_age = "30d"', {"released": "2026-05-20"}, ""),
        ('[policy]\nmax_age = "30d"', {"released": "2036-05-20"}, "2036-05-20, which is yet to come"),
        ('[policy]\nmax_age = "30d"', {}, "max_age: neither the end"),
        ('[policy]\nscan = "clean"', {}, "scan: pickle: x.bin"),
    ],
)  # fmt: skip
def test_a_rule_lets_through_what_it_allows_and_nothing_else(text: str, document: Mapping[str, Any], reason: str) -> None:
    rules, manifest = policy(text), AdapterManifest.salvage(document)
    facts = VersionFacts(
        read_parent=lambda digest: PARENT if digest == OTHER else None, find_problem=lambda: "pickle: x.bin", now=NOW
    )
    assert rules.needs_manifest
    problems = [f"{check.rule}: {check.problem}" for check in rules.manifest_checks(manifest, facts) if check.problem]
    if not reason:
        assert problems == []
        rules.check_manifest(manifest, "team/sql", facts)
        return
    assert reason in problems[0]
    with pytest.raises(RefusedError, match="against the policy of p.toml: ") as caught:
        rules.check_manifest(manifest, "team/sql", facts)
    assert caught.value.items == tuple(problems)


@pytest.mark.parametrize("expires", ["2026-06-01", "20260101", "2026-W01-1", "2026-06-01T13:00:00+14:00", "soon"])
def test_the_day_of_a_parent_counts_however_it_is_written(expires: str) -> None:
    rules, parent = policy("[policy]\nunexpired = true"), AdapterManifest.salvage({"expires": expires})
    manifest = AdapterManifest.salvage(MERGED | {"expires": "2026-12-31"})
    with pytest.raises(RefusedError, match=f"it expired on {expires[:10]}"):
        rules.check_manifest(manifest, "team/sql", VersionFacts(read_parent=lambda _: parent, now=NOW))


def test_a_scan_without_the_files_at_hand_is_not_clean() -> None:
    rules, manifest = policy('[policy]\nscan = "clean"'), AdapterManifest.salvage({})
    with pytest.raises(RefusedError, match="scan: its files are not at hand"):
        rules.check_manifest(manifest, "team/sql")
    rules.check_manifest(manifest, "team/sql", VersionFacts(find_problem=lambda: ""))


def test_a_chain_of_parents_that_has_no_end_ends() -> None:
    def read(digest: str) -> AdapterManifest:
        following = f"sha256:{int(digest[7:], 16) + 1:064x}"
        return AdapterManifest.salvage({"parents": [{"digest": following}]})

    rules, manifest = policy('[policy]\ndata = ["org/*"]'), AdapterManifest.salvage(MERGED)
    with pytest.raises(RefusedError, match="is not at hand"):
        rules.check_manifest(manifest, "team/sql", VersionFacts(read_parent=read))
