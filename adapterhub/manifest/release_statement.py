"""Statements about the release of a version, as a log has them: an approval, or the reason of a withdrawal.

A statement is by the author of its entry, or by the signer of its bundle (`trust.bundle`): then what it is about is in the
signed payload, and the rest of the entry proves nothing.
"""

from __future__ import annotations

import json

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from . import measurement, rollout_state

MAX_BUNDLE = 64 << 10
"""Characters of a bundle; one with a certificate and an entry of a public log has about 10 kB."""
_MAX_STATEMENT = 100_000  # characters


@dataclass(frozen=True)
class ReleaseStatement:
    """A statement.

    Attributes:
        text: What it says, for people.
        bundle: The signed statement as JSON; empty for one by the author of the entry.
        account: The account of a hub by which its author was logged in; empty for a name that a program wrote.
    """

    text: str
    bundle: str = ""
    account: str = ""

    def dump(self) -> str:
        """Return the text for a log."""
        document = {"text": self.text, "bundle": self.bundle, "account": self.account}
        return json.dumps({key: value for key, value in document.items() if value or key == "text"}, sort_keys=True)


def parse(message: str) -> ReleaseStatement:
    """Parse the message of a log entry; one that is no statement is taken as its text, as logs from elsewhere may have any."""
    try:
        document = json_file.parse(message, "") if len(message) <= _MAX_STATEMENT else None
    except FormatError:
        document = None
    if not isinstance(document, dict):
        return ReleaseStatement(message)
    text, bundle, account = (document.get(key, "") for key in ("text", "bundle", "account"))
    if not (isinstance(text, str) and isinstance(bundle, str) and isinstance(account, str)):
        return ReleaseStatement(message)
    return ReleaseStatement(text, bundle, account)


def log_summary(op: str, message: str) -> str:
    """Return the message of a log entry for people."""
    if op in ("approve", "withdraw"):
        return parse(message).text
    if op == "rollout":
        return state.summary if (state := rollout_state.parse(message)) else ""
    return measurement.summary_line(message) if op == "evaluate" else message
