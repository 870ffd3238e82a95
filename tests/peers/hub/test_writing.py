"""Writing to a hub over PostgreSQL and a bucket: the tests of `tests/hub/hf`."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import Running
from tests.hub.hf.test_writing import *  # noqa: F403
from tests.hub.sending import Sending

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("named", [False, True])
def test_writers_of_all_processes_queue_unless_they_name_a_parent(
    hub: Running, hf: Any, adapter: Callable[..., Path], named: bool
) -> None:
    """Eight writers with ten commits each, of files of their own; behind one address, two processes take turns."""
    hf.create_repo("team/sql")
    parent = hf.upload_folder(folder_path=adapter(1), repo_id="team/sql").oid

    def write(writer: int) -> list[int]:
        statuses = []
        for number in range(10):
            content = base64.b64encode(f"[{writer}, {number}]".encode()).decode()
            header = {"summary": f"{writer} {number}", **({"parentCommit": parent} if named else {})}
            file = {"path": f"n{writer}.json", "content": content, "encoding": "base64"}
            body = "\n".join(json.dumps({"key": key, "value": value}) for key, value in (("header", header), ("file", file)))
            answer = Sending(hub.url, hub.token).ask("POST", "/api/models/team/sql/commit/main", body)
            statuses.append(answer.status)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(status for written in pool.map(write, range(8)) for status in written)
    listed = [commit.title for commit in hf.list_repo_commits("team/sql")]
    if named:
        assert (statuses[200], {*statuses} <= {200, 409, 412}, len(listed)) == (1, True, 2)
    else:
        assert statuses == {200: 80}
        assert {*listed[:-1]} == {f"{writer} {number}" for writer in range(8) for number in range(10)}
