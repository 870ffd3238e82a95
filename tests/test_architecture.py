"""The newcomer's tour names every room that there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_module_and_package_is_in_the_tour() -> None:
    tour = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"[\w]+", " ".join(re.findall(r"`([^`\n]+)`", tour))))
    roots = (ROOT / "adapterhub", ROOT / "converters/adapterhub_converters")
    there = {path.stem for root in roots for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(there - named - {"__init__", "__main__"}) == []
