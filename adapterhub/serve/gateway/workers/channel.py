"""Messages between a worker and the host: lines of JSON on a socket, each of one of many conversations.

The socket is in a folder of this user's own, and both ends are processes of one gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub.serve.engines import EngineDownError
from adapterhub_converters.errors import LocalIOError

log = logging.getLogger("adapterhub.serve.workers")
Message = dict[str, Any]
_MAX_MESSAGE = 256 << 20  # bytes of a message, which may have the body of a request
_CONNECT_SECONDS = 30.0


class ChannelLostError(EngineDownError):
    """The process at the other end has ended."""


class Conversation:
    """The messages about one thing: a request of a client, or the life of a worker."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel, self.number = channel, number
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()

    def send(self, **fields: Any) -> None:
        """Send a message, unless the other end is gone."""
        self._channel.write({"to": self.number, **fields})

    async def receive(self) -> Message:
        """Return the next message; ChannelLostError once the other process has ended."""
        message = await self._inbox.get()
        if message is None:
            raise ChannelLostError("another process of the gateway has ended")
        return message

    def put(self, message: Message | None) -> None:
        """Hand over a message that has arrived; None for the end of the channel."""
        self._inbox.put_nowait(message)

    def close(self) -> None:
        """Ignore what still arrives."""
        self._channel.drop(self)


class Channel:
    """One end of the socket.

    Args:
        attend: Called with each conversation that the other end begins, and its first message.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        attend: Callable[[Conversation, Message], Awaitable[None]] | None = None,
    ) -> None:
        self._reader, self._writer, self._attend = reader, writer, attend
        self._conversations: dict[int, Conversation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._has_ended = False

    def begin(self) -> Conversation:
        """Begin a conversation; ChannelLostError if the other process has ended."""
        if self._has_ended:
            raise ChannelLostError("another process of the gateway has ended")
        return self._add(next(self._numbers))

    def _add(self, number: int) -> Conversation:
        conversation = self._conversations[number] = Conversation(self, number)
        return conversation

    def drop(self, conversation: Conversation) -> None:
        """Forget a conversation."""
        self._conversations.pop(conversation.number, None)

    def write(self, message: Message) -> None:
        """Write a message; the one who reads is a process of this machine, and always reads."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def run(self) -> None:
        """Hand over what arrives until the other end is closed, and end what was attended."""
        try:
            with suppress(OSError):
                # A process that is killed may cut its last message off.
                while (line := await self._reader.readline()).endswith(b"\n"):
                    self._hand_over(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            log.error("a message of another process of the gateway is malformed, or too long: %s", error)
        finally:
            self._has_ended = True
            for conversation in self._conversations.values():
                conversation.put(None)
            if self._tasks:
                await asyncio.wait(self._tasks)
            self._writer.close()

    def _hand_over(self, message: Message) -> None:
        number = int(message["to"])
        conversation = self._conversations.get(number)
        if conversation is not None:
            conversation.put(message)
        elif self._attend is not None and "kind" in message:
            task = asyncio.create_task(self._attend_to_end(self._add(number), message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _attend_to_end(self, conversation: Conversation, first: Message) -> None:
        try:
            if self._attend is not None:
                await self._attend(conversation, first)
        except ChannelLostError:
            pass
        except Exception:
            log.exception("a message of a worker failed")
        finally:
            conversation.close()


async def connect(path: Path) -> Channel:
    """Connect to the host, which may still be starting; LocalIOError if it does not answer."""
    deadline = asyncio.get_running_loop().time() + _CONNECT_SECONDS
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_MESSAGE)
        except OSError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise LocalIOError(str(path), error.strerror or str(error)) from error
            await asyncio.sleep(0.02)
        else:
            return Channel(reader, writer)


@asynccontextmanager
async def listening(path: Path, attend: Callable[[Conversation, Message], Awaitable[None]]) -> AsyncIterator[None]:
    """Serve workers until the block has ended, and all of them; LocalIOError if the socket cannot be bound.

    Args:
        attend: Called with each conversation that a worker begins, and its first message.
    """
    channels: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(Channel(reader, writer, attend).run())
        channels.add(task)
        task.add_done_callback(channels.discard)

    try:
        server = await asyncio.start_unix_server(serve, path, limit=_MAX_MESSAGE)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error), "Set TMPDIR to a shorter path") from error
    try:
        yield
    finally:
        server.close()
        if channels:
            await asyncio.wait(channels)
