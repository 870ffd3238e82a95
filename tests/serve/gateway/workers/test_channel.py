"""A process at the other end of a channel may be killed at any byte of a message."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.gateway.workers import channel
from adapterhub.serve.gateway.workers.channel import ChannelLostError, Conversation, Message

FIRST = json.dumps({"to": 1, "kind": "request"}).encode() + b"\n"


@pytest.mark.parametrize(
    "message_rest", [b'{"to":1,"st', b'{"to":1}', b"", b"{\n", b"[]\n", b'{"kind":1}\n', b'"' + b"x" * 99 + b"\n"]
)
def test_a_cut_or_malformed_message_ends_the_conversations_of_its_channel_only(
    message_rest: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_MAX_MESSAGE", 64)
    ends, failures = list[str](), list[dict[str, Any]]()

    async def attend(talk: Conversation, _first: Message) -> None:
        talk.send(welcome=True)
        try:
            while True:
                await talk.receive()
        except ChannelLostError:
            ends.append("lost")

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with channel.listening(tmp_path / "host", attend):
            bystander = await channel.connect(tmp_path / "host")
            reading = asyncio.create_task(bystander.run())
            talk = bystander.begin()
            talk.send(kind="request")
            await talk.receive()
            reader, writer = await asyncio.open_unix_connection(tmp_path / "host")
            writer.write(FIRST)
            await reader.readline()
            writer.write(message_rest)
            writer.write_eof()
            assert await reader.read() == b""
            assert ends == ["lost"]
            talk.send(step="more")
            later = bystander.begin()
            later.send(kind="request")
            assert (await later.receive())["welcome"]
            writer.close()
            reading.cancel()
            await asyncio.wait([reading])

    asyncio.run(run())
    assert failures == []
