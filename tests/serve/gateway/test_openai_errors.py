"""Errors for clients: a status that their libraries understand, and nothing about the disk of the gateway."""

from __future__ import annotations

import pytest

from adapterhub.serve.engines import EngineDownError, EngineTimeoutError
from adapterhub.serve.gateway.openai_errors import ProblemError, problem_of, without_paths
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, NotFoundError, RefusedError, RemoteError

FOLDER = "/srv/cache/adapterhub/served/sha256-12/peft-34"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RefusedError(FOLDER, "has magnitudes (DoRA), which cannot share a base"), 400),
        (RefusedError("team/sql@sha256:12", f"vLLM cannot load it (No adapter found for {FOLDER})"), 400),
        (RefusedError("team/sql", "the server was started without it", f"Start it with {FOLDER}/adapter.gguf"), 400),
        (LocalIOError(FOLDER, "No space left on device"), 503),
        (NotFoundError(FOLDER, "no registry here", code="no-registry"), 503),
        (NotFoundError(FOLDER, "no such adapter"), 404),
        (IntegrityError(FOLDER, "does not match its digest"), 502),
        (RemoteError("https://hub", "HTTP 500"), 503),
        (EngineDownError(f"cannot read {FOLDER}"), 503),
        (EngineTimeoutError("no answer"), 504),
        (ProblemError(400, f"(see '{FOLDER}/x')"), 400),
    ],
)
def test_no_error_names_a_folder_of_the_gateway(error: Exception, status: int) -> None:
    problem = problem_of(error, "team/sql:prod")
    assert problem.status == status
    body = problem.body().decode()
    assert "/srv" not in body
    assert "sha256-12/" not in body
    if isinstance(error, AdapterhubError) and status == 400:
        assert '"message": "team/sql:prod: ' in body


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/a/b: gone",
        "team/sql@sha256:12 or a/b",
        "1/2 of 3/4",
        "answers /v1/completions, not /v1/chat/completions",
        "and/or",
        "/",
        "//",
    ],
)
def test_what_is_no_path_of_a_disk_stays(text: str) -> None:
    assert without_paths(text) == text
