"""Requests that can be traced: from the client through the log to the engine, and as spans of OpenTelemetry."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cli import environment as cli_environment
from tests.conftest import ROOT
from tests.support import llama_server, serving
from tests.support.environments import environment
from tests.support.proxy import Proxy
from tests.support.serving import Gateway, Models

pytestmark = pytest.mark.peer
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = {"x-request-id": "req-of-ada", "traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
_DECODE = """
import sys
from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
print(MessageToJson(ExportTraceServiceRequest.FromString(sys.stdin.buffer.read()), indent=None))
"""


def line_of(gateway: Gateway, request: str) -> dict[str, Any]:
    """Return the fields of a request's line in the log, which is written after the answer has been sent."""
    while True:
        for line in gateway.log.read_text().splitlines():
            if f'"id": "{request}"' in line and line.endswith("}"):
                return dict(json.loads(line))
        time.sleep(0.02)


@contextmanager
def running(
    models: Models, registry: Path, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[tuple[Gateway, Proxy]]:
    """A gateway in front of a llama-server that is asked through a proxy, which sees the headers."""
    with llama_server.alone(models.gguf) as url, Proxy(url.removeprefix("http://")) as proxy:
        options = ("--engine", "llama.cpp", "--engine-url", f"http://{proxy.address}")
        with serving.gateway(models.gguf, registry, folder, *options, env=env) as gateway:
            yield gateway, proxy


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_and_the_log_know_a_request_as_its_client_does(
    models: Models, registry: Path, tmp_path: Path, stream: bool
) -> None:
    with running(models, registry, tmp_path) as (gateway, proxy):
        proxy.exchanges.clear()
        reply = gateway.complete("base", "the", headers=TRACED, stream=stream)
        assert (reply.status, reply.headers["x-request-id"]) == (200, "req-of-ada")
        [exchange] = [exchange for exchange in proxy.exchanges if exchange.method == "POST"]
        fields = line_of(gateway, "req-of-ada")
        assert fields["trace_id"] == TRACE
        assert fields["span_id"] not in (SPAN, "")
        assert f"(req-of-ada, trace {TRACE})" in fields["message"]
        assert exchange.headers["x-request-id"] == "req-of-ada"
        assert exchange.headers["traceparent"] == f"00-{TRACE}-{fields['span_id']}-01"
        assert exchange.headers["tracestate"] == "vendor=1"
        proxy.exchanges.clear()
        plain = gateway.complete("base", "the", headers={"x-request-id": "not sane", "traceparent": "00-1-2-3"})
        [exchange] = [exchange for exchange in proxy.exchanges if exchange.method == "POST"]
        assert plain.headers["x-request-id"] == exchange.headers["x-request-id"] != "not sane"
        assert not {"traceparent", "tracestate"} & set(exchange.headers)
        assert "trace_id" not in line_of(gateway, plain.headers["x-request-id"])


@contextmanager
def receiver(bodies: list[bytes]) -> Iterator[str]:
    """The address of a server that takes spans by OTLP, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()


def spans(python: Path, bodies: list[bytes]) -> list[dict[str, Any]]:
    """Return the spans that were received, as OpenTelemetry's own reader has them."""
    decoded = [subprocess.run([python, "-c", _DECODE], input=body, capture_output=True, check=True).stdout for body in bodies]
    scopes = [scope for text in decoded for resource in json.loads(text)["resourceSpans"] for scope in resource["scopeSpans"]]
    return [span for scope in scopes for span in scope["spans"]]


def test_the_parts_of_a_request_are_spans(models: Models, registry: Path, tmp_path: Path) -> None:
    python = environment("opentelemetry-exporter-otlp-proto-http==1.45.2")
    [packages] = python.parent.parent.glob("lib/python*/site-packages")
    bodies: list[bytes] = []
    with receiver(bodies) as url:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas", packages)))
        env = {"PYTHONPATH": path, "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_SERVICE_NAME": "here"}
        with running(models, registry, tmp_path, env) as (gateway, proxy):
            proxy.exchanges.clear()
            reply = gateway.complete("base", "the", headers=TRACED, stream=True)
            [exchange] = [exchange for exchange in proxy.exchanges if exchange.method == "POST"]
            assert reply.status == 200
            assert gateway.complete("team/none", "the", headers={"x-request-id": "refused"}).status == 404
            fields = line_of(gateway, "req-of-ada")
            line_of(gateway, "refused")
    assert b"here" in bodies[0]
    by_trace: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for span in spans(python, bodies):
        by_trace[span["traceId"]][span["name"]] = span
    assert len(by_trace) == 2
    traced = by_trace.pop(_base64(TRACE))
    request, engine = traced["POST /v1/completions"], traced["engine"]
    assert set(traced) == {"POST /v1/completions", "resolve", "queue", "load", "engine", "first token"}
    parents = {name: span["parentSpanId"] for name, span in traced.items() if name != "POST /v1/completions"}
    assert {name for name, parent in parents.items() if parent == request["spanId"]} == {"resolve", "queue", "load", "engine"}
    assert parents["first token"] == engine["spanId"]
    assert int(traced["first token"]["endTimeUnixNano"]) <= int(engine["endTimeUnixNano"])
    attributes = {attribute["key"]: next(iter(attribute["value"].values())) for attribute in request["attributes"]}
    assert attributes["adapterhub.version"] == reply.version
    assert attributes["adapterhub.id"] == "req-of-ada"
    assert attributes["adapterhub.prompt_tokens"] == str(fields["prompt_tokens"])
    assert (fields["trace_id"], _base64(fields["span_id"])) == (TRACE, request["spanId"])
    assert request["parentSpanId"] == _base64(SPAN)
    _, trace_id, span_id, _ = exchange.headers["traceparent"].split("-")
    assert (trace_id, _base64(span_id), exchange.headers["tracestate"]) == (TRACE, engine["spanId"], "vendor=1")
    [refused] = by_trace.values()
    assert set(refused) == {"POST /v1/completions", "resolve"}


def test_without_its_variables_nothing_of_opentelemetry_is_imported() -> None:
    python = environment("opentelemetry-exporter-otlp-proto-http==1.45.2")
    [packages] = python.parent.parent.glob("lib/python*/site-packages")
    code = (
        "import sys; from adapterhub.cli import environment; from adapterhub.serve.gateway import app, spans, server\n"
        "assert not environment.is_traced()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    path = os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(packages)))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environ, "PYTHONPATH": path}, cwd=ROOT)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "OpenTelemetry is not installed"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "not by otlp as grpc"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "not by zipkin as http/protobuf"),
    ],
)
def test_spans_that_cannot_be_sent_are_not_asked_for_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], line: str
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # as where it is not installed
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert not cli_environment.is_traced()
    assert line in capsys.readouterr().err
