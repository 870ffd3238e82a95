"""The ids of requests and traces, in headers of clients that may send anything."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from adapterhub.serve.gateway import trace_context
from adapterhub.serve.gateway.trace_context import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def headers(*pairs: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in pairs])


def read(*pairs: tuple[str, str]) -> TraceContext | None:
    return trace_context.read(headers(*pairs))


@pytest.mark.parametrize("name", ["x", "req_0123-4567", "a/b:c", "~" * 128])
def test_a_sane_id_is_taken(name: str) -> None:
    assert trace_context.request_id(headers(("x-request-id", name))) == name


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 129, "é", "a\x7f", "a\x00b", "a\tb"])
def test_another_id_is_replaced(name: str) -> None:
    ids = {trace_context.request_id(headers(("x-request-id", name))) for _ in range(2)}
    assert len(ids) == 2
    assert name not in ids


@pytest.mark.parametrize(
    ("parent", "flags"),
    [(PARENT, 1), (f"00-{TRACE}-{SPAN}-00", 0), (f"00-{TRACE}-{SPAN}-ff", 3), (f"cc-{TRACE}-{SPAN}-01", 1),
     (f"cc-{TRACE}-{SPAN}-01-what.comes.later", 1)],
)  # fmt: skip
def test_a_span_is_read(parent: str, flags: int) -> None:
    assert read(("traceparent", parent)) == TraceContext(TRACE, SPAN, flags)


@pytest.mark.parametrize(
    "parent",
    [
        "", "00", PARENT.upper(), f"{PARENT}-more", f"{PARENT}-", f"ff-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01x",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{SPAN}-01", f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0x", f" 00-{TRACE}-{SPAN}-01 x", f"00_{TRACE}_{SPAN}_01", f"0-{TRACE}-{SPAN}-01",
    ],
)  # fmt: skip
def test_a_malformed_span_begins_no_trace(parent: str) -> None:
    assert read(("traceparent", parent), ("tracestate", "a=1")) is None


def test_two_spans_are_none() -> None:
    assert read(("traceparent", PARENT), ("traceparent", PARENT)) is None
    assert read() is None


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["a=1"], "a=1"),
        (["a=1,b=2", "c=3"], "a=1,b=2,c=3"),
        ([" a=1 ,\tb=2 ", "", ","], "a=1,b=2"),
        (["0tenant@vendor=x y!"], "0tenant@vendor=x y!"),
        (["a=1,a=2"], ""),
        (["a=1,B=2"], ""),
        (["a"], ""),
        (["a="], ""),
        (["a=b=c"], ""),
        (["=1"], ""),
        (["0a=1"], ""),
        (["a=é"], ""),
        ([f"a={'x' * 256}"], f"a={'x' * 256}"),
        ([f"a={'x' * 257}"], ""),
        ([",".join(f"a{number}=1" for number in range(32))], ",".join(f"a{number}=1" for number in range(32))),
        ([",".join(f"a{number}=1" for number in range(33))], ""),
    ],
)
def test_the_state_of_a_trace_is_passed_on_if_it_is_well_formed(states: list[str], expected: str) -> None:
    context = read(("traceparent", PARENT), *(("tracestate", state) for state in states))
    assert context == TraceContext(TRACE, SPAN, 1, expected)


def test_a_child_has_a_span_of_its_own_in_the_same_trace() -> None:
    context = TraceContext(TRACE, SPAN, 1, "a=1").child()
    assert context.headers() == {"traceparent": f"00-{TRACE}-{context.span_id}-01", "tracestate": "a=1"}
    assert context.span_id != SPAN
    assert len(context.span_id) == 16
