"""The templates use only what the objects that they are given have: Jinja finds a wrong name no earlier than on a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import nodes

from adapterhub.hub.web import site

PACKAGE = Path(site.__file__).parents[2]
TEMPLATES = sorted(path.name for path in (Path(site.__file__).parent / "templates").iterdir())
BUILTIN = {name for kind in (str, list, dict, tuple) for name in dir(kind)}


@pytest.fixture(scope="module")
def defined_names() -> set[str]:
    """The names of all methods, properties and fields of the package."""
    pattern = re.compile(r"^[ ]+(?:def (\w+)\(|(\w+): )", re.MULTILINE)
    return {name for path in PACKAGE.rglob("*.py") for pair in pattern.findall(path.read_text()) for name in pair}


def attributes(template: str) -> set[str]:
    environment = site.templates()
    assert environment.loader is not None
    tree = environment.parse(environment.loader.get_source(environment, template)[0])
    return {node.attr for node in tree.find_all(nodes.Getattr) if not _is_loop_or_macro(node.node)}


def _is_loop_or_macro(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name in ("loop", "macros", "self")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_reads_only_attributes_that_exist(template: str, defined_names: set[str]) -> None:
    assert attributes(template) - BUILTIN - defined_names == set()
