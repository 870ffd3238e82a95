"""What goes from process to process, as JSON: prepared versions, errors, tokens, and the addresses of engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapterhub.serve.engines import Blend, EngineDownError
from adapterhub.serve.engines.pooled_engine import EngineAddress
from adapterhub.serve.gateway.front import GatewayRequest
from adapterhub.serve.gateway.openai_errors import ProblemError, problem_of
from adapterhub.serve.gateway.rollout_evidence import AnswerOutcome
from adapterhub.serve.gateway.route_file import Key
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.trained_prompt import TrainedPrompt

_PROBLEM_OPTIONS = ("code", "param", "seconds")
# What the host finds out about a request, in `GatewayRequest`.
_FACTS = ("version", "label", "route", "arm", "deprecated")
CAUGHT = (ProblemError, EngineDownError, AdapterhubError)
"""The errors that an answer to a client can state."""


def problem_document(error: Exception, model: str) -> dict[str, Any]:
    """Return an error as the one that a client gets."""
    problem = problem_of(error, model)
    return {name: getattr(problem, name) for name in ("status", "message", *_PROBLEM_OPTIONS)}


def problem_from(document: Mapping[str, Any]) -> ProblemError:
    """Return the error of a document."""
    options = {name: document[name] for name in _PROBLEM_OPTIONS}
    return ProblemError(document["status"], document["message"], **options)


def key_document(key: Key | None) -> dict[str, Any] | None:
    """Return what a worker needs to know about a key; `counts` tells whether the host compares its tokens with a limit."""
    if key is None:
        return None
    return {"name": key.name, "priority": key.priority, "counts": key.has_token_limits}


def request_facts(request: GatewayRequest) -> dict[str, str]:
    """Return what the host has found out about a request."""
    return {name: getattr(request, name) for name in _FACTS}


def set_facts(request: GatewayRequest, facts: Mapping[str, str]) -> None:
    """Record in a request what the host has found out about it."""
    for name in _FACTS:
        setattr(request, name, facts[name])


def blend_document(blend: Blend) -> list[Any]:
    """Return the versions of a blend with their weights."""
    return [[{**asdict(served), "path": str(served.path)}, weight] for served, weight in blend]


def blend_from(document: Iterable[Any]) -> Blend:
    """Return the versions of a document, with their weights."""
    return tuple((PreparedVersion(**_values(members)), float(weight)) for members, weight in document)


def _values(members: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: tuple(value) for name, value in members.items() if isinstance(value, list)}
    return {**members, **lists, "path": Path(members["path"]), "prompt": TrainedPrompt.from_document(members["prompt"])}


def tokens_document(tokens: TokenCounts) -> dict[str, Any]:
    """Return the tokens of a request."""
    return asdict(tokens)


def tokens_from(document: Mapping[str, Any]) -> TokenCounts:
    """Return the tokens of a document."""
    return TokenCounts(**document)


def outcome_document(outcome: AnswerOutcome | None) -> dict[str, Any] | None:
    """Return how a request was answered."""
    return asdict(outcome) if outcome else None


def outcome_from(document: Mapping[str, Any] | None) -> AnswerOutcome | None:
    """Return how a request was answered, from a document."""
    return AnswerOutcome(**document) if document else None


def engines_document(addresses: Sequence[EngineAddress]) -> list[dict[str, Any]]:
    """Return the engines of a route file, without their keys, which are in the environment of each process."""
    return [asdict(address) for address in addresses]


def engines_from(document: Iterable[Mapping[str, Any]]) -> tuple[EngineAddress, ...]:
    """Return the engines of a document."""
    return tuple(EngineAddress(**members) for members in document)
