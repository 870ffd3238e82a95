"""An endpoint answers a test, and the answer counts only if it says that the tested version gave it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from adapterhub.evidence.endpoint import Endpoint
from adapterhub.evidence.golden_tests import Answer
from adapterhub.evidence.test_cases import Case
from adapterhub.http.urls import no_proxy
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError, UsageError
from tests.support.chat_server import chat_server, completion

DIGEST, OTHER = ("sha256:" + digit * 64 for digit in "12")
CASE = Case("one", ({"role": "user", "content": "hi"},), equals="x")


def ask(url: str, digest: str = DIGEST, key: str = "") -> Answer:
    with closing(Endpoint(url, key, "t/a", digest=digest, temperature=0.5, proxy=no_proxy)) as endpoint:
        return endpoint.answer(CASE, 7, 3)


def test_a_request_has_the_test_and_the_key_and_the_answer_its_end() -> None:
    with chat_server(lambda _: (200, {}, completion("y", model=f"t/a@{DIGEST}", finish="length"))) as (url, requests):
        assert ask(f"{url}/", key="secret") == Answer("y", is_complete=False)
    [(headers, document)] = requests
    assert headers["authorization"] == "Bearer secret"
    assert document == {"model": "t/a", "messages": [*CASE.messages], "max_tokens": 7, "temperature": 0.5, "seed": 3}


@pytest.mark.parametrize(
    ("model", "headers", "digest", "accepted"),
    [
        (f"t/a@{DIGEST}", {}, DIGEST, True),
        ("t/a", {"x-adapterhub-version": f"t/b@{DIGEST}"}, DIGEST, True),
        (f"t/a@{OTHER}", {}, DIGEST, False),
        ("t/a", {}, DIGEST, False),
        (f"t/a@{DIGEST}*0.5+t/b@{DIGEST}", {}, DIGEST, False),
        (f"t/a@{DIGEST}", {"x-adapterhub-version": f"t/a@{OTHER}"}, DIGEST, False),
        ("whatever", {}, "", True),
    ],
)
def test_only_the_version_that_is_tested_counts(model: str, headers: dict[str, str], digest: str, accepted: bool) -> None:
    with chat_server(lambda _: (200, headers, completion("y", model=model))) as (url, _):
        if accepted:
            assert ask(url, digest).text == "y"
        else:
            with pytest.raises(RefusedError, match="as what answered, and not sha256:1") as error:
                ask(url, digest)
            assert error.value.code == ("unnamed-version" if (model, headers) == ("t/a", {}) else "other-version")


@pytest.mark.parametrize("answer", [b"no", {}, {"choices": []}, {"choices": [{"message": "x"}]}, {"choices": [[]]}, [1]])
def test_what_is_no_chat_completion_is_an_error_in_a_line(answer: Any) -> None:
    with chat_server(lambda _: (200, {}, answer)) as (url, _), pytest.raises(FormatError):
        ask(url, "")


def test_an_invalid_address_and_a_refusal_are_errors_in_a_line() -> None:
    with pytest.raises(UsageError, match="not http or https"):
        ask("file:///etc/passwd")
    with chat_server(lambda _: (400, {}, {"error": {"message": "no"}})) as (url, _), pytest.raises(AdapterhubError):
        ask(url)
