"""Priorities of keys: set by the operator in the route file, never by a request, and given to engines that have priorities."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from adapterhub.serve.engines import Engine

from .openai_errors import ProblemError
from .route_file import Key, Routes

log = logging.getLogger("adapterhub.serve")
_FIELD = "priority"


def with_priority(body: Mapping[str, Any], key: Key | None, engine: Engine) -> Mapping[str, Any]:
    """Return a body with the priority of its key; without keys, it is the body's own.

    Raises:
        ProblemError: A client with a key sets a priority.
    """
    if key is None:
        return body
    if _FIELD in body:
        message = f"`{_FIELD}` belongs to the key, not to a request; leave it out"
        raise ProblemError(400, message, code="unsupported", param=_FIELD)
    return {**body, _FIELD: key.priority} if key.priority and engine.has_priorities else body


def warn_if_unused(routes: Routes, engine: Engine) -> None:
    """Log that keys have priorities which the engine does not know."""
    names = sorted(key.name for key in routes.keys.values() if key.priority)
    if names and not engine.has_priorities:
        log.warning("%s has no priorities, so that those of %s have no effect", engine.name, ", ".join(names)[:200])
