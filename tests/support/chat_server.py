"""An endpoint of OpenAI's chat completions on 127.0.0.1, which answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[int, Mapping[str, str], Any]]
"""Returns the status, the headers and the document for a request."""


@contextmanager
def chat_server(reply: Reply) -> Iterator[tuple[str, list[tuple[dict[str, str], dict[str, Any]]]]]:
    """Yield the URL of the endpoint, and the headers and documents of the requests so far."""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(({key.lower(): value for key, value in self.headers.items()}, document))
            status, headers, answer = reply(document)
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


def completion(text: str, *, model: str = "m", finish: str = "stop") -> dict[str, Any]:
    """A document with one answer."""
    return {"model": model, "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
