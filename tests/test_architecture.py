"""The contributor guide names paths that exist, and every package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/architecture.md").read_text()


def _rows() -> list[tuple[list[str], list[str]]]:
    """The files of each row of the table of places, and the names to look for in them."""
    rows = re.findall(r"^\| .*? \| (.*) \|(.*)\|$", GUIDE.partition("## Where is")[2], re.MULTILINE)
    return [(re.findall(r"`([\w/.]+\.\w+)`", places), re.findall(r"`(\w+)`", names)) for places, names in rows]


def test_every_row_of_the_table_of_places_names_a_file_that_defines_what_it_says() -> None:
    rows = [(paths, names) for paths, names in _rows() if paths]
    assert len(rows) > 25
    for paths, names in rows:
        assert [path for path in paths if not (ROOT / path).is_file()] == []
        sources = [(ROOT / path).read_text() for path in paths]
        for name in names:
            definition = rf"^ *(?:(?:async )?def|class) {name}\b|^ *{name}\b(?::[^=\n]+)? ="
            assert any(re.search(definition, source, re.MULTILINE) for source in sources), f"{paths} do not define {name}"


def test_every_other_path_in_the_guide_exists() -> None:
    """A path is below the root, below a package, or the name of a module."""
    folders = [ROOT, ROOT / "adapterhub", ROOT / "converters/adapterhub_converters"]
    folders.append(folders[-1] / "containers")
    paths = set(re.findall(r"`([\w/.]+\.(?:py|sql|toml|yml|schema\.json))`", GUIDE)) - {"adapter.toml", "adapterhub.toml"}
    assert (
        sorted(path for path in paths if "NAME" not in path and not any((folder / path).is_file() for folder in folders)) == []
    )


def test_every_package_and_module_at_the_top_is_in_the_tree() -> None:
    tree = GUIDE.partition("## The tree")[2].partition("```text")[2].partition("```")[0]
    named = set(re.findall(r"\b(\w+)(?:\.py|/)", tree))  # not a mere word of a description
    children = [*(ROOT / "adapterhub").iterdir(), *(ROOT / "converters/adapterhub_converters").iterdir()]
    present = {path.stem for path in children if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(present - named - {"__init__", "__main__"}) == []
