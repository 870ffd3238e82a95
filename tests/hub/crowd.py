"""Clients that push to and pull from one hub at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterhub.registry.repository_documents import commit_id
from tests.hub.conftest import Running
from tests.hub.sending import WEIGHTS, Sending

_CLIENTS, _NAMES = 8, 3
_MIN_TURNS, _MAX_TURNS = 4, 250  # at most, so that an account makes no more changes in a minute than it may


def push_and_pull(hub: Running, make: Callable[[Path, int], Path], folder: Path, seconds: float = 0) -> int:
    """Have eight clients push to three names and pull what they pushed; return the number of versions made.

    Each has an account of its own and asks at least four times. Asserts that every version which a client was told of is there
    and has its bytes, that no other is, and that nobody was answered anything but a success, or a conflict with another push.

    Args:
        hub: Where to.
        make: Makes an adapter in a folder, by a number.
        folder: For the adapters.
        seconds: How long they go on.
    """
    end = time.monotonic() + seconds
    clients = [Sending(hub.url, hub.make_token(f"pusher{number}", "write")) for number in range(_CLIENTS)]

    def work(number: int) -> list[tuple[str, str]]:
        client, rng, name, commits, turn = clients[number], random.Random(number), f"team/sql{number % _NAMES}", [], 0
        while turn < _MIN_TURNS or (turn < _MAX_TURNS and time.monotonic() < end):
            adapter = make(folder / f"{number}-{turn}", rng.randrange(1 << 30))
            turn += 1
            answer = client.push(name, adapter)
            if answer.status == 200:
                commits.append((name, answer.json()["commitOid"]))
                download = client.ask("GET", f"/{name}/resolve/{commits[-1][1]}/{WEIGHTS}")
                assert download.data == (adapter / WEIGHTS).read_bytes(), (download.status, download.data[:300])
                assert client.ask("GET", f"/{name}/resolve/{rng.choice(commits)[1]}/{WEIGHTS}").status == 200
            client.ask("GET", "/api/models?search=sql")
            for path in adapter.iterdir():
                path.unlink()
        return commits

    with ThreadPoolExecutor(_CLIENTS) as pool:
        commits = [commit for of_client in pool.map(work, range(_CLIENTS)) for commit in of_client]
    statuses = {status for client in clients for status in client.statuses}
    assert statuses <= {200, 409}, statuses
    with hub.registry() as registry:
        names = {name for name, _ in commits}
        recorded = {(name, commit_id(row.digest)) for name in names for row in registry.list(name)}
        assert recorded == set(commits), recorded ^ set(commits)
    return len(commits)
