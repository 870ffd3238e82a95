"""The tables `[promote.TAG]`: every key is read, and what cannot be meant is an error that names it and its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.project import settings_file
from adapterhub.project.policy import join
from adapterhub.project.tag_rules import TagRules, parse_duration
from adapterhub_converters.errors import UsageError

FILE = Path("/srv/adapterhub.toml")


def test_all_of_a_table_is_read() -> None:
    text = """
[promote.prod]
from = "staging"
keep_previous = true
[promote.prod.require]
eval = { tests = "pass>=0.95", eval = ["ppl<12", "ppl/base<0.9"] }
attestations = ["tests"]
signers = ["keys/ci.pub"]
approvals = 2
approvers = ["keys"]
from_others = true
scan = "clean"
age = "1h"
"""
    (rules,) = settings_file.parse(text, FILE).policy.promotions
    assert rules == TagRules(
        "prod",
        str(FILE),
        "staging",
        (("tests", "pass>=0.95"), ("eval", "ppl<12"), ("eval", "ppl/base<0.9")),
        ("tests",),
        (Path("/srv/keys/ci.pub"),),
        2,
        (Path("/srv/keys"),),
        from_others=True,
        scan="clean",
        age=3600,
        keep_previous=True,
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[promote.prod]\nfrm = 'x'", "'promote.prod.frm' is unknown"),
        ("[promote.prod.require]\napprovls = 2", "'promote.prod.require.approvls' is unknown"),
        ("[promote.prod.require]\napprovals = 0", "is not a whole number above 0"),
        ("[promote.prod.require]\nfrom_others = true", "needs approvals"),
        ("[promote.prod.require]\napprovers = ['k']", "needs approvals"),
        ("[promote.prod.require]\nattestations = ['tests']", "needs signers"),
        ("[promote.prod.require]\nattestations = ['x']\nsigners = ['k']", "has an unknown kind"),
        ("[promote.prod.require]\nscan = 'dirty'", "is not 'clean'"),
        ("[promote.prod.require]\nage = '1 hour'", "is not a duration"),
        ("[promote.prod.require]\neval = ['ppl<1']", 'is not a table. Write it like { tests = "pass>=0.95"'),
        ("[promote.prod.require]\neval = { tests = 3 }", "is not a gate, or a list of them"),
        ("[promote.prod]\nfrom = 'prod'", "is the tag itself"),
        ("[promote.prod]\nfrom = 'no tag'", "is not a tag"),
        ("[promote.'no tag']", "is not a tag"),
        ("[promote.latest]", "is always the newest push"),
        ("[promote]\nprod = 1", "is not a table"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_it(text: str, error: str) -> None:
    with pytest.raises(UsageError) as refused:
        settings_file.parse(text, FILE)
    assert error in str(refused.value)
    assert str(FILE) in refused.value.where


def test_the_requirements_of_all_files_are_joined() -> None:
    first, second = (settings_file.parse(f"[promote.{tag}]\n", Path(f"/{tag}.toml")).policy for tag in ("prod", "staging"))
    joined = join(first, second)
    assert joined is not None
    assert joined.gated_tags() == {"prod", "staging"}
    assert [rules.file for rules in joined.tag_rules("staging")] == ["/staging.toml"]


def test_durations() -> None:
    assert [parse_duration(text) for text in ("90s", "30m", "1h", "7d")] == [90, 1800, 3600, 604800]
    assert [parse_duration(text) for text in ("", "1", "h", "0h", "-1h", "1.5h", "1w", "1h ")] == [0] * 8
