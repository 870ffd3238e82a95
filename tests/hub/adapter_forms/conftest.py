"""The fixtures of the pages."""

from tests.hub.web.conftest import database, push, visitor

__all__ = ["database", "push", "visitor"]
