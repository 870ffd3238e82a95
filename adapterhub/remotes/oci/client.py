"""The HTTP client with the errors of an OCI registry (distribution-spec v1.1, "Error codes")."""

from __future__ import annotations

import json

from adapterhub.http.client import Answer, Client
from adapterhub.http.errors import AgainError, DeniedError
from adapterhub_converters.errors import IntegrityError


class RegistryClient(Client):
    """HTTP to one registry, or to its token service."""

    plain_hint = "Use oci+http:// for plain HTTP"

    def _refusal(self, answer: Answer, where: str) -> Exception:
        found = super()._refusal(answer, where)
        if self._said(answer).startswith(": DIGEST_INVALID") and not isinstance(found, AgainError | DeniedError):
            what = f"the registry received other bytes (HTTP {answer.status})"
            return IntegrityError(where, what, "Nothing was stored; try again")
        return found

    def _said(self, answer: Answer) -> str:
        try:
            error = json.loads(answer.body)["errors"][0]
            code, message = str(error["code"])[:40], str(error.get("message") or "")[:200]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
            return ""
        return self.unless_secret(f": {code}" + (f", {message}" if message else ""))
