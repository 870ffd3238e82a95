"""A worker that cannot ask the host any more ends, so that another one takes over its share of the clients."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from adapterhub.operations.workspace import Workspace
from adapterhub.serve.engines.llama_one_process import OneProcess
from adapterhub.serve.engines.llama_server import LlamaServerOptions
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.workers import channel
from adapterhub.serve.gateway.workers.channel import Conversation, Message
from adapterhub.serve.gateway.workers.worker_gateway import WorkerGateway


def test_a_worker_that_loses_the_host_tells_it(tmp_path: Path) -> None:
    async def run() -> None:
        lost = asyncio.Event()

        async def attend(talk: Conversation, _first: Message) -> None:
            talk.send(context=4, precision="F32")
            await talk.receive()
            cast(Any, talk)._channel._writer.close()

        settings = GatewaySettings(cast(Any, None), "base", Workspace(registry=tmp_path))
        async with channel.listening(tmp_path / "host", attend):
            engine = OneProcess(LlamaServerOptions(tmp_path / "llama-server", tmp_path / "base.gguf", tmp_path, {}))
            gateway = WorkerGateway(settings, engine, tmp_path / "host", lost.set)
            await gateway.start()
            await lost.wait()
            await gateway.close()

    asyncio.run(run())
