"""The page of promises names tests that exist, one for each promise, and every file of attacks holds one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/security.md").read_text()
PROMISES = [
    line.split(" | ") for line in PAGE.partition("## What they cannot do")[2].partition("\n## ")[0].splitlines() if "| " in line
][2:]


def test_every_promise_has_a_test_that_exists() -> None:
    assert len(PROMISES) > 30
    for row in PROMISES:
        tests = re.findall(r"`(tests/[\w/]+\.py)`", row[-1])
        assert tests, row
        assert [path for path in tests if not (ROOT / path).is_file()] == []


def test_every_file_of_attacks_is_the_test_of_a_promise() -> None:
    named = set(re.findall(r"`(tests/attacks/\w+\.py)`", PAGE))
    attack_files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/attacks").glob("test_*.py")}
    assert attack_files - named - UNNAMED == set()


# Attacks on what is told elsewhere.
UNNAMED = {
    "tests/attacks/test_compressed_images.py",  # a layer that somebody compressed: docs/remotes.md
    "tests/attacks/test_hub_beside.py",  # commands next to a hub: docs/hub.md
}


def test_the_policy_leads_to_the_promises() -> None:
    assert "docs/security.md" in (ROOT / "SECURITY.md").read_text()
    assert "SECURITY.md" in PAGE
