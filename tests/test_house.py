"""The rules of the house that linters do not hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    tree = ast.parse((ROOT / path).read_text())
    documented = _docstrings(tree)
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [f"{path}:{node.lineno}: {node.value}" for node in strings if node not in documented and _OPTION.search(node.value)]
    assert found == []


# What of transformers can load a base, and the one module that may ask for it.
_LOADERS = {"from_pretrained", "from_config", "for_model", "load_dataset", "pipeline"}
_LOADING = Path("adapterhub/training/model/library.py")


def test_transformers_is_asked_in_one_place_and_never_with_the_code_of_a_base() -> None:
    calls: list[tuple[Path, ast.Call]] = []
    for path in [path.relative_to(ROOT) for path in (ROOT / "adapterhub").rglob("*.py")]:
        nodes = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
        names = [node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "") for node in nodes]
        calls += [(path, node) for node, name in zip(nodes, names, strict=True) if name in _LOADERS]
    assert {path for path, _ in calls} == {_LOADING}
    trusting = [f"{path}:{node.lineno}" for path, node in calls if not _distrusts(node)]
    assert trusting == []


def _distrusts(call: ast.Call) -> bool:
    """Whether a call has `trust_remote_code=False`, or the options of the module that have it."""
    return any(ast.unparse(word) in ("trust_remote_code=False", "**_LOCAL") for word in call.keywords)


def _module(path: Path) -> str:
    root = "converters/" if path.parts[0] == "converters" else "schemas/" if path.parts[0] == "schemas" else ""
    return ".".join(path.with_suffix("").parts[bool(root) :]).removesuffix(".__init__")


def _imported(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a module imports anywhere, in its functions too, but not for type checking alone."""
    me, tree = _module(path), ast.parse((ROOT / path).read_text())
    package = me if path.name == "__init__.py" else me.rpartition(".")[0]
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {inner for node in typing for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in known else base for alias in node.names}
        elif isinstance(node, ast.Import) and node not in skipped:
            found |= {alias.name for alias in node.names}
    return (found & known) - {me}


def test_no_imports_go_in_a_circle_not_in_functions_either() -> None:
    paths = [path for root in ("adapterhub", "converters", "schemas") for path in (ROOT / root).rglob("*.py")]
    modules = {_module(path.relative_to(ROOT)): path.relative_to(ROOT) for path in paths}
    graph = {module: _imported(path, set(modules)) for module, path in modules.items()}
    circles = [" -> ".join(circle) for circle in _circles(graph)]
    assert circles == []


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other (Tarjan, 1972), of more than one module."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found
