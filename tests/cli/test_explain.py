"""Every code has an explanation, which `adapterhub explain` prints and messages lead to."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from adapterhub.checks import CODES
from adapterhub.cli.errors import HINTS, say
from adapterhub.cli.explained_codes import codes, explanation
from adapterhub.cli.explanations import ERRORS, FINDINGS, STORED
from adapterhub.store import log_chain
from adapterhub_converters.errors import RefusedError
from tests.conftest import ROOT, Run, Terminal
from tests.support.folders import adapter, pairs

# Answers of the gateway have the codes of OpenAI's API, which docs/gateway.md lists.
_OF_OPENAI = {"ProblemError", "ApiError"}


def written() -> list[tuple[str, ast.Module]]:
    """The modules that name a code, by their names."""
    paths = [path for root in ("adapterhub", "converters", "schemas") for path in (ROOT / root).rglob("*.py")]
    texts = [(path.stem if path.stem != "__init__" else path.parent.name, path.read_text()) for path in paths]
    named = re.compile(r'code=|default_code|\bFinding\(|^[A-Z_]+ = "[a-z-]+"$', re.MULTILINE)
    return [(name, ast.parse(text)) for name, text in texts if named.search(text)]


def constant(node: ast.AST, names: dict[str, str]) -> str | None:
    """The string that an expression is, written there or as a constant of a module."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    return names.get(ast.unparse(node)) if isinstance(node, ast.Name | ast.Attribute) else None


def raised() -> tuple[set[str], set[str]]:
    """The codes of errors and those of findings in stored bytes, where they are made."""
    modules, errors, findings = written(), set(), set()
    shared = {f"{module}.{name}": text for module, tree in modules for name, text in strings(tree).items()}
    for _, tree in modules:
        names = {**shared, **strings(tree)}
        names |= {
            alias.asname or alias.name: shared[f"{node.module.rpartition('.')[2]}.{alias.name}"]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            if f"{node.module.rpartition('.')[2]}.{alias.name}" in shared
        }
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            words = [word.value for word in call.keywords if word.arg == "code"]
            if ast.unparse(call.func) not in _OF_OPENAI:
                errors |= {constant(node, names) for word in words for node in ast.walk(word)}
            if ast.unparse(call.func) == "Finding":
                findings.add(constant(call.args[0], names))
        errors |= set(defaults(tree).values())
    return {code for code in errors if code and "_" not in code and code != "nf4"}, {code for code in findings if code}


def defaults(tree: ast.Module) -> dict[str, str]:
    """The classes of errors in a module, and the code of an error that is raised without one of its own."""
    class_nodes = [
        (class_node.name, node)
        for class_node in ast.walk(tree)
        if isinstance(class_node, ast.ClassDef)
        for node in class_node.body
    ]
    sets = [
        (name, node, node.value) for name, node in class_nodes if isinstance(node, ast.Assign | ast.AnnAssign) and node.value
    ]
    return {name: ast.literal_eval(value) for name, node, value in sets if ast.unparse(node).startswith("default_code")}


def strings(tree: ast.Module) -> dict[str, str]:
    """The constants of a module that are strings."""
    sets = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    constants = [(target, value.value) for target, value in sets if isinstance(value, ast.Constant)]
    return {ast.unparse(target): text for target, text in constants if isinstance(text, str)}


def test_every_code_that_is_raised_is_explained_and_no_other() -> None:
    errors, findings = raised()
    findings |= {
        log_chain.CHANGED,
        log_chain.REMOVED,
        log_chain.REORDERED,
        log_chain.TRUNCATED,
        log_chain.UNREADABLE,
    }  # of `audit verify`
    assert set(FINDINGS) == set(CODES)
    assert sorted((errors | findings) - set(codes())) == []
    assert sorted(set(HINTS) - set(codes())) == []
    assert sorted(set(ERRORS) - errors - findings - set(HINTS)) == []
    assert sorted(set(STORED) - findings) == []
    assert len(codes()) == len(set(codes()))


@pytest.mark.parametrize("code", codes())
def test_an_explanation_is_sentences(code: str) -> None:
    entry = explanation(code)
    assert entry is not None
    assert entry.text.endswith((".", "?"))
    assert "{" not in entry.fix


def test_the_command_explains_one_lists_all_and_knows_what_was_meant(run: Run) -> None:
    stdout = run("explain", "rank-config").stdout
    assert stdout.startswith("rank-config: an error reported by `adapterhub validate`\n")
    assert "`adapterhub fix` writes the ranks" in stdout
    assert "Run `adapterhub list REPOSITORY`" in run("explain", "no-such-tag").stdout
    assert [row["code"] for row in json.loads(run("explain", "--json").stdout)["codes"]] == list(codes())
    assert "Did you mean rank-config?" in run("explain", "rank-confg", code=3).stderr


def test_a_report_with_problems_leads_to_it_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2), r=3)
    screen = terminal("validate", "sql")
    assert "`adapterhub explain CODE`" in screen


def test_an_error_ends_with_the_code_that_explain_knows(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    stderr = run("push", "sql", "team/sql", code=None).stderr
    run("init", code=None)
    for words in (["show", "team/none"], ["pull", "team/none", "-o", "x"], ["merge", "sql", "-o", "x", "--method", "nosuch"]):
        stderr = run(*words, code=None).stderr
        line, code = stderr.rstrip("\n").removesuffix("]").rsplit("  [", 1)
        assert line.startswith("error: ")
        assert explanation(code) is not None
        assert json.loads(run(*words, "--json", code=None).stdout)["error"]["code"] == code


def test_a_hint_that_a_command_words_itself_keeps_the_code(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    (tmp_path / "sql/adapter_config.json").unlink()
    assert run("show", "sql", code=6).stderr.endswith("`adapterhub fix sql --alpha N`  [alpha-or-rslora-required]\n")


def test_a_name_that_was_meant_is_the_hint_under_the_same_code(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    run("push", "sql", "team/sql")
    line = "error: team/sq1: no such adapter, and no such file or folder. Did you mean team/sql?  [no-such-adapter]\n"
    assert run("show", "team/sq1", code=3).stderr == line


def test_a_code_of_another_server_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    say(RefusedError("chat", "is refused", code="engine_failed"))
    assert capsys.readouterr().err == "error: chat: is refused  [refused]\n"


def test_of_several_problems_the_first_has_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    error = RefusedError("a", "is wrong", code="base-required")
    error.problems = ("a: is wrong", "b: is wrong")
    say(error)
    assert capsys.readouterr().err == "error: a: is wrong  [base-required]\nerror: b: is wrong\n"


def test_the_code_is_dim_on_a_terminal_and_not_in_a_pipe(terminal: Terminal) -> None:
    screen = terminal("--registry", "none", "list", "team")
    assert "  \x1b[2m[no-registry]\x1b[0m" in screen


@pytest.mark.parametrize("code", STORED)
def test_a_finding_of_fsck_is_explained(run: Run, code: str) -> None:
    assert run("explain", code).stdout.startswith(f"{code}: ")
