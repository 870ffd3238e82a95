"""Which request this is, in the headers of clients and engines: `x-request-id`, and the trace context of the W3C.

https://www.w3.org/TR/trace-context: a malformed `traceparent` begins no trace here, and takes its `tracestate` with it; a
malformed `tracestate` is dropped alone. Versions above 00 are read as far as 00 goes, and passed on as 00.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from starlette.datastructures import Headers

from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

REQUEST_ID = "x-request-id"
_SANE_ID = safe_regex.Pattern(r"[!-~]{1,128}")
_TRACEPARENT = safe_regex.Pattern(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER = safe_regex.Pattern(
    r"((?:[a-z][a-z0-9_*/-]{0,255})|(?:[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}))=([ -+\--<>-~]{0,255}[!-+\--<>-~])"
)
_MAX_MEMBERS, _MAX_STATE = 32, 4096
_FLAGS = 0b11  # sampled, and random


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span of a trace.

    Attributes:
        trace_id: The trace, in 32 hexadecimal digits.
        span_id: The span, in 16 hexadecimal digits.
        flags: 1 if the trace is recorded, 2 if its id is random.
        state: The `tracestate`; empty for none.
    """

    trace_id: str
    span_id: str
    flags: int = 0
    state: str = ""

    def child(self) -> TraceContext:
        """Return a new span below this one."""
        return replace(self, span_id=secrets.token_hex(8))

    def headers(self) -> dict[str, str]:
        """Return the headers that pass the span on."""
        state = {"tracestate": self.state} if self.state else {}
        return {"traceparent": f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}", **state}


def request_id(headers: Headers) -> str:
    """Return the id that a client has given its request, or a new one if that is too long or has other than printable ASCII."""
    name = headers.get(REQUEST_ID, "")
    return name if name and _SANE_ID.fullmatch(name) else secrets.token_hex(8)


def read(headers: Headers) -> TraceContext | None:
    """Return the span of the client; None if it sent none, or a malformed one."""
    parents = headers.getlist("traceparent")
    match = _TRACEPARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if not match:
        return None
    version, trace_id, span_id, flags, more = (match[number] for number in range(1, 6))
    if version == "ff" or (version == "00" and more) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & _FLAGS, _state(headers.getlist("tracestate")))


def _state(texts: list[str]) -> str:
    """Return the members of `tracestate`, in one text; an empty one if any is malformed."""
    members = [member.strip(" \t") for text in texts for member in text.split(",")]
    members = [member for member in members if member]
    names = {match[1] for member in members if (match := _MEMBER.fullmatch(member))}
    # Each well-formed, and none twice.
    state = ",".join(members)
    return state if len(names) == len(members) <= _MAX_MEMBERS and len(state) <= _MAX_STATE else ""
