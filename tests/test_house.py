"""The rules of the house that linters do not hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms whose errors still speak of options of the command line. To be emptied.
_SPEAK_OF_OPTIONS = (
    "adapterhub/analysis", "adapterhub/bases", "adapterhub/check", "adapterhub/index", "adapterhub/maintenance",
    "adapterhub/manifest", "adapterhub/merge", "adapterhub/project", "adapterhub/registry", "adapterhub/remotes",
    "adapterhub/store", "adapterhub/train", "adapterhub/ref.py", "adapterhub/semver.py", "adapterhub/user_files.py",
    "converters/adapterhub_converters",
)  # fmt: skip
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+|`adapterhub [a-z]")


def sources() -> list[Path]:
    """Every module of ours outside the command line and its door, `python -m adapterhub`."""
    found = [*(ROOT / "adapterhub").rglob("*.py"), *(ROOT / "converters").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found if not {"cli", "__main__.py"} & {*path.relative_to(ROOT).parts})


def _docstrings(tree: ast.Module) -> set[ast.expr]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, holders)]
    firsts = [body[0] for body in bodies if body and isinstance(body[0], ast.Expr)]
    return {first.value for first in firsts}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_only_the_command_line_speaks_of_options_and_commands(path: Path) -> None:
    if str(path).startswith(_SPEAK_OF_OPTIONS):
        pytest.skip("not reworded yet")
    tree = ast.parse((ROOT / path).read_text())
    documented = _docstrings(tree)
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [f"{path}:{node.lineno}: {node.value}" for node in strings if node not in documented and _OPTION.search(node.value)]
    assert found == []
