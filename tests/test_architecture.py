"""The contributor guide names paths that exist, and every package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/architecture.md").read_text()


def test_every_path_in_the_guide_exists() -> None:
    rows = re.findall(r"^\| .*? \| (.*) \|$", GUIDE.partition("## Where is")[2], re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([\w/.]+\.\w+)`", row)]
    assert len(paths) > 9
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_package_and_module_at_the_top_is_in_the_tree() -> None:
    tree = GUIDE.partition("## The tree")[2].partition("```text")[2].partition("```")[0]
    named = set(re.findall(r"\b(\w+)(?:\.py|/)", tree))  # not a mere word of a description
    children = [*(ROOT / "adapterhub").iterdir(), *(ROOT / "converters/adapterhub_converters").iterdir()]
    present = {path.stem for path in children if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(present - named - {"__init__", "__main__"}) == []
