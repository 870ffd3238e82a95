"""A client for an endpoint of OpenAI's chat completions that answers tests.

The answer itself names the version that answered: a gateway of ours writes its digest into a header and into `model`. An answer
of another version, or of an unnamed one, says nothing about the one that is tested.
"""

from __future__ import annotations

import json
from typing import Any

from adapterhub.digest import Digest
from adapterhub.http.client import Client
from adapterhub.http.urls import ProxyOf, origin
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError

from .golden_tests import Answer
from .test_cases import Case
from .version_names import OTHER_VERSION, UNNAMED_VERSION, VERSION_HEADER

_MAX_ANSWER = 4 << 20  # bytes
_TIMEOUT = 600.0  # seconds: an answer comes whole, once the model has written all of it


class Endpoint:
    """A client of an endpoint.

    Args:
        url: Its URL, up to and with `/v1`.
        key: The key in `Authorization`; empty for none.
        model: The name of the model in requests.
        digest: The version that must answer; empty to take the endpoint's word for its names.
        temperature: The temperature of the answers.
        proxy: The proxy for a scheme and a host.

    Raises:
        UsageError: The URL is not one of http or https, or has credentials.
    """

    def __init__(self, url: str, key: str, model: str, *, digest: Digest, temperature: float, proxy: ProxyOf) -> None:
        origin(url, url, is_user_input=True)
        self._url, self._model, self._digest, self._temperature = url.rstrip("/"), model, digest, temperature
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._client = Client(self._url, secrets=lambda: [key] if key else [], timeout=_TIMEOUT, proxy=proxy)

    def answer(self, case: Case, limit: int, seed: int) -> Answer:
        """Return the answer to a test.

        Raises:
            RefusedError: Another version answered, or an unnamed one.
            RemoteError: The endpoint failed, or refused.
            FormatError: It did not answer as OpenAI's does.
        """
        request = {
            "model": self._model,
            "messages": list(case.messages),
            "max_tokens": limit,
            "temperature": self._temperature,
            "seed": seed,
        }
        url, body = f"{self._url}/chat/completions", json.dumps(request).encode()
        # The client retries after a lost connection: asking twice for an answer does no harm.
        reply = self._client.request(
            "POST", url, self._url, good=(200,), headers=self._headers, body=body, limit=_MAX_ANSWER, redirects=False
        )
        document = json_file.parse_object(reply.body, self._url)
        self._check_version(reply.headers.get(VERSION_HEADER) or document.get("model"))
        choices = document.get("choices")
        choice: Any = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str | None) or not isinstance(message, dict):
            raise FormatError(self._url, "does not answer as OpenAI's chat completions do: no choices[0].message.content")
        return Answer(text or "", choice.get("finish_reason") != "length")

    def _check_version(self, named: object) -> None:
        digest = named.partition("@")[2] if isinstance(named, str) else ""
        if not self._digest or digest == self._digest:
            return
        subject = f"{named[:100]!r}" if isinstance(named, str) else "no version"
        problem = f"names {subject} as what answered, and not {self._digest[:19]}…"
        raise RefusedError(self._url, problem, code=OTHER_VERSION if digest else UNNAMED_VERSION)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
