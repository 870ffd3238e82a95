"""An engine that costs nothing and a proxy that does nothing else, for what the gateway's own work costs.

python benchmarks/_made_up_engine.py engine PORT BASE    vLLM's paths, with answers that are written beforehand
python benchmarks/_made_up_engine.py proxy PORT ENGINE   Starlette, uvicorn and httpx2, which pass everything on as it is
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

PACE = 0.002  # seconds between two tokens of a stream, so that each arrives alone
HEAD = "HTTP/1.1 200 OK\r\ncontent-type: {}\r\n{}\r\n\r\n"
DELTA = {"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}


async def engine(port: int, base: str) -> None:
    """Serve a base by the name `base`, and any adapter that is asked for."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = json.loads(await reader.readexactly(int(fields.get("content-length", 0))) or "{}")
                if body.get("stream"):
                    await stream(writer, body)
                else:
                    raw = json.dumps(document(head.split(" ", 2)[1], body, base)).encode()
                    writer.write(HEAD.format("application/json", f"content-length: {len(raw)}").encode() + raw)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", port)
    await server.serve_forever()


def document(path: str, body: dict[str, Any], base: str) -> object:
    """Return what is answered at once."""
    if path == "/v1/models":
        return {"object": "list", "data": [{"id": "base", "object": "model", "root": base, "max_model_len": 2048}]}
    choice = {"index": 0, "text": " token" * 32, "message": {"role": "assistant", "content": " token" * 32}, "logprobs": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 32, "total_tokens": 41}
    return {"id": "cmpl-0123456789abcdef", "model": body.get("model"), "choices": [choice], "usage": usage, "version": "0.33.0"}


async def stream(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Send a stream of `max_tokens` events."""
    writer.write(HEAD.format("text/event-stream", "transfer-encoding: chunked").encode())
    chunk = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": body["model"],
    }
    event = f"data: {json.dumps({**chunk, 'choices': [DELTA]}, separators=(',', ':'))}\n\n".encode()
    for piece in (*[event] * body["max_tokens"], b"data: [DONE]\n\n"):
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
        await asyncio.sleep(PACE)
    writer.write(b"0\r\n\r\n")


def proxy(port: int, url: str) -> None:
    """Pass every request on to another server."""
    import httpx2
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    client = httpx2.AsyncClient(base_url=url, timeout=None)

    async def pass_on(request: Request) -> Response:
        raw = await request.body()
        passed = client.build_request("POST", request.url.path, content=raw, headers={"content-type": "application/json"})
        answer = await client.send(passed, stream=True)
        if "text/event-stream" not in answer.headers["content-type"]:
            return Response(await answer.aread(), answer.status_code, media_type="application/json")

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in answer.aiter_raw():
                yield piece
            await answer.aclose()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{path:path}", pass_on, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", ws="none")


if __name__ == "__main__":
    role, number, argument = sys.argv[1:]
    asyncio.run(engine(int(number), argument)) if role == "engine" else proxy(int(number), argument)
