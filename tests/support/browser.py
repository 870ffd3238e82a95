"""Debian's Chromium, driven by playwright in an environment of its own, and what axe says about a page."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import need_program
from tests.support.environments import environment

# Opens the URL of argv[1], executes the body of its standard input, and prints what that leaves in `result`.
_CHILD = """
import json, os, sys
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    # Chromium refuses its sandbox to root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = playwright.chromium.launch(executable_path=sys.argv[2], args=options)
    page = browser.new_page()
    page.set_default_timeout(30_000)
    names = {"page": page, "axe": Axe(), "result": None}
    page.goto(sys.argv[1])
    exec(sys.stdin.read(), names)
    browser.close()
print(json.dumps(names["result"]))
"""
_VIOLATIONS = """
found = axe.run(page).response["violations"]
result = [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]
"""


@dataclass(frozen=True)
class Browser:
    """Chromium without a window; every call is a browser of its own."""

    python: Path
    program: str

    @classmethod
    def installed(cls) -> Browser:
        """The browser, with playwright installed if need be."""
        program = need_program("chromium")
        return cls(environment("playwright==1.65.0", "axe-playwright-python==0.1.8"), program)

    def visit(self, url: str, body: str) -> Any:
        """Open `url` and execute `body`, Python with playwright's `page` in it; what it assigns to `result`, by way of JSON."""
        result = subprocess.run(
            [self.python, "-c", _CHILD, url, self.program],
            check=False,
            input=body,
            capture_output=True,
            text=True,
            timeout=240,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def violations(self, url: str) -> list[str]:
        """What axe holds against a page: the rule and the element, one for each element."""
        visit: list[str] = self.visit(url, _VIOLATIONS)
        return visit
