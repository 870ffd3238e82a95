"""The fixtures of the pages."""

from tests.hub.web.conftest import push, visitor

__all__ = ["push", "visitor"]
