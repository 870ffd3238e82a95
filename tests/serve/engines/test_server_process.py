"""The process of a server engine: it is started again whenever it ends or hangs."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from adapterhub.serve.engines import EngineDownError
from adapterhub.serve.engines.server_process import Process
from adapterhub_converters.errors import LocalIOError, RefusedError


async def never() -> bool:
    return False


def python(text: str, patience: float = 30.0) -> Process:
    return Process([sys.executable, "-c", text], {}, never, patience=patience)


def test_why_a_process_cannot_be_started_is_told() -> None:
    with pytest.raises(RefusedError, match="ended with 3 before it was ready: error: no such model"):
        asyncio.run(python("print('hello\\nerror: no such model\\nbye'); raise SystemExit(3)").start())
    with pytest.raises(RefusedError, match="is not ready after 0 seconds"):
        asyncio.run(python("import time; time.sleep(60)", patience=0.2).start())
    with pytest.raises(RefusedError, match="ended with 1 before it was ready: it said nothing"):
        asyncio.run(python("raise SystemExit(1)").start())
    with pytest.raises(RefusedError, match="was ended by SIGILL before it was ready: bye. It was built for another processor"):
        asyncio.run(python("import os; print('bye', flush=True); os.kill(os.getpid(), 4)").start())
    with pytest.raises(LocalIOError, match="No such file"):
        asyncio.run(Process(["/no/such/program"], {}, never).start())


def test_a_process_that_hangs_is_ended_and_started_again() -> None:
    async def main() -> None:
        answers = True

        async def ready() -> bool:
            return answers

        process = Process([sys.executable, "-c", "import time; time.sleep(60)"], {}, ready, silence=0.2)
        await process.start()
        first = process._process
        assert first is not None
        answers = False
        await asyncio.wait_for(first.wait(), 60)
        answers = True
        while process._process is first or not process.up:
            await asyncio.sleep(0.01)
        assert first.returncode == -signal.SIGTERM
        await process.close()

    asyncio.run(main())


FAILS_BELOW = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "raise ValueError('1 error in it\\\\n  the KV cache is too small')"])
for line in range(60):
    print("  frame", line, flush=True)
raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
"""


def test_the_reason_is_the_exception_of_the_process_that_failed_not_that_of_its_parent() -> None:
    with pytest.raises(RefusedError, match="before it was ready: ValueError: 1 error in it the KV cache is too small"):
        asyncio.run(python(FAILS_BELOW).start())


def test_a_process_that_ends_is_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        count = tmp_path / "count"
        text = f"open({str(count)!r}, 'a').write('x')\nimport time; time.sleep(60)"

        async def ready() -> bool:
            return count.exists()

        process = Process([sys.executable, "-c", text], {}, ready)
        await process.start()
        process.check()
        assert process._process is not None
        process._process.kill()
        while process.up:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDownError, match="the engine has ended, and is being started again"):
            process.check()
        while not process.up:
            await asyncio.sleep(0.01)
        await process.close()
        assert not process.up

    asyncio.run(main())
