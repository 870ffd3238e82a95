"""Servers that the HTTP client asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.web_server import Web


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def other_web() -> Iterator[Web]:
    with Web() as server:
        yield server
