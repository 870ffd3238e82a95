"""The source of our modules as syntax trees, and which module imports which."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("adapterhub", "converters", "schemas")
_ROOTS_OF_IMPORTS = ("converters", "schemas")  # besides the root itself


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a module, shared by all tests."""
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of the syntax tree of a module."""
    return [*ast.walk(parsed(ROOT / path))]


def dotted(node: ast.AST) -> str:
    """A name with dots as it is written, which ends in that of an attribute; `…` stands for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "…"


def module_name(path: Path) -> str:
    """The name by which a file, relative to the root, is imported."""
    parts = path.with_suffix("").parts
    return ".".join(parts[parts[0] in _ROOTS_OF_IMPORTS :]).removesuffix(".__init__")


def module_paths(*folders: str, root: Path = ROOT) -> dict[str, Path]:
    """The files below some folders of the root, relative to it, by the names of their modules."""
    paths = [path.relative_to(root) for folder in folders for path in (root / folder).rglob("*.py")]
    return {module_name(path): path for path in sorted(paths)}


def imported_modules(path: Path, known_modules: Collection[str], *, root: Path = ROOT) -> set[str]:
    """The known modules that a module imports anywhere, in its functions too, but not for type checking alone."""
    module = module_name(path)
    parents = (module if path.name == "__init__.py" else module.rpartition(".")[0]).split(".")
    imported = set()
    for node in _statements(ast.parse((root / path).read_text()).body):
        if isinstance(node, ast.ImportFrom):
            parts = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            imported |= {name if (name := f"{base}.{alias.name}") in known_modules else base for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return {name for name in imported if name in known_modules} - {module}


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All statements, those inside others too, but not those for type checking alone."""
    for node in body:
        yield node
        typing = isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"
        for field in ("orelse",) if typing else ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, field, ()))
