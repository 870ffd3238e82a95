"""What a notebook shows of ours is a page in which axe, in a real browser, finds nothing wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import adapterhub as ah
from tests.support.adapters import Make
from tests.support.browser import Browser

pytestmark = pytest.mark.peer
PAGE = '<!doctype html><html lang="en"><title>Notebook</title><main><h1>Notebook</h1>{}</main></html>'


@pytest.fixture
def page(tmp_path: Path) -> Callable[[str], str]:
    """The URL of a page with a piece of HTML in it."""

    def call(body: str) -> str:
        (tmp_path / "page.html").write_text(PAGE.format(body))
        return (tmp_path / "page.html").as_uri()

    return call


def test_the_tables_of_a_notebook_are_accessible(chromium: Browser, page: Callable[[str], str], make: Make) -> None:
    adapter = make()
    html = ah.check(adapter)._repr_html_() + ah.load(adapter).manifest._repr_html_()
    assert chromium.violations(page(html)) == []
    assert chromium.visit(page(html), "result = page.locator('th').count()") > 0


def test_axe_sees_what_is_wrong(chromium: Browser, page: Callable[[str], str]) -> None:
    assert chromium.violations(page('<img src="x.png">')) == ['image-alt: <img src="x.png">']
