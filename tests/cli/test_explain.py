"""Every code has an explanation, which `adapterhub explain` prints and messages lead to."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from adapterhub.checks import CODES
from adapterhub.cli.errors import HINTS
from adapterhub.cli.explanations import ERRORS, FINDINGS, codes, explanation
from tests.cli.test_commands import terminal
from tests.conftest import ROOT, Run
from tests.support.folders import adapter, pairs

# Answers of the gateway have the codes of OpenAI's API, which docs/serving.md lists.
_OF_OPENAI = {"ProblemError", "ApiError"}


def raised() -> set[str]:
    """The codes that are written where an error is made."""
    found = set()
    for path in [path for root in ("adapterhub", "converters", "schemas") for path in (ROOT / root).rglob("*.py")]:
        if "code=" in (text := path.read_text()):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            words = [word for call in calls if ast.unparse(call.func) not in _OF_OPENAI for word in call.keywords]
            values = [node for word in words if word.arg == "code" for node in ast.walk(word.value)]
            found |= {node.value for node in values if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {code for code in found if code and "_" not in code and code != "nf4"}


def test_every_code_that_is_raised_is_explained_and_no_other() -> None:
    assert set(FINDINGS) == set(CODES)
    assert sorted(raised() - set(codes())) == []
    assert sorted(set(HINTS) - set(codes())) == []
    assert sorted(set(ERRORS) - raised() - set(HINTS)) == []


@pytest.mark.parametrize("code", codes())
def test_an_explanation_is_sentences(code: str) -> None:
    found = explanation(code)
    assert found is not None
    assert found.text.endswith((".", "?"))
    assert "{" not in found.fix


def test_the_command_explains_one_lists_all_and_knows_what_was_meant(run: Run) -> None:
    shown = run("explain", "rank-config").stdout
    assert shown.startswith("rank-config: an error of `adapterhub validate`\n")
    assert "`adapterhub fix` writes the ranks" in shown
    assert "Run `adapterhub list REPOSITORY`" in run("explain", "no-such-tag").stdout
    assert [row["code"] for row in json.loads(run("explain", "--json").stdout)["codes"]] == list(codes())
    assert "Did you mean rank-config?" in run("explain", "rank-confg", code=3).stderr


def test_a_report_with_problems_leads_to_it_on_a_terminal(tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2), r=3)
    shown = terminal([sys.executable, "-m", "adapterhub", "validate", "sql"], tmp_path, 80)
    assert "`adapterhub explain CODE`" in shown
