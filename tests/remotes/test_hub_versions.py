"""Versions of a hub are those that were asked for, with a manifest that is valid."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.remotes.adapter_folders import download
from adapterhub_converters.errors import (
    FormatError,
    IntegrityError,
    RefusedError,
)
from tests.remotes.test_hub_repository import BIG, pushed, remote
from tests.support.adapters import write_adapter
from tests.support.hub_server import File, Hub
from tests.support.proxy import Proxy


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that keeps large files itself, so that all goes through the proxy."""
    with Hub(storage=False) as server:
        yield server


@pytest.fixture
def proxy(hub: Hub) -> Iterator[Proxy]:
    with Proxy(hub.host) as server:
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "sql")
    (folder / "notes.txt").write_text(random.Random(0).randbytes(2 * BIG).hex())
    return folder


def test_a_hub_that_answers_of_another_commit_than_was_asked_for_is_refused(proxy: Proxy, hub: Hub, adapter: Path) -> None:
    pushed(hub, adapter)
    first, second = list(hub.repos["org/sql"].commits)
    proxy.after = lambda exchange: setattr(exchange, "data", exchange.data.replace(second.encode(), first.encode()))
    with remote(proxy.address) as source, pytest.raises(IntegrityError, match="another commit"):
        source.manifest(second)


HOSTILE = {
    "../evil.json": FormatError,
    "/etc/evil.json": FormatError,
    "a/../../evil.json": FormatError,
    "con.json": FormatError,
    "a\\b.json": FormatError,
    "Adapter_Config.json": FormatError,
    "nul\x00.json": FormatError,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("facts", [True, False])
def test_a_hostile_name_is_refused_where_it_would_be_written(hub: Hub, tmp_path: Path, name: str, facts: bool) -> None:
    pushed(hub, write_adapter(tmp_path / "sql"))
    commit = hub.repos["org/sql"].branches["main"]
    if facts:
        document = json.loads(commit.files["adapter.json"].data)
        document["files"].append({"path": name, "digest": "sha256:" + "0" * 64, "size": 1})
        commit.files["adapter.json"] = File(json.dumps(document).encode())
    else:
        del commit.files["adapter.json"]
    commit.files[name] = File(b"x")
    before = sorted(tmp_path.iterdir())
    with remote(hub.host) as source, pytest.raises(HOSTILE[name]):
        download(source, "main", tmp_path / "out", pauses=())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": None}, "adapter.json: lists no files, or more than"),
        ({"files": []}, "adapter.json: lists no files, or more than"),
        ({"files": [1]}, "adapter.json: its list of files has an invalid entry, or two of one path"),
        ({"files": [{"path": "x"}]}, "adapter.json: its list of files has an invalid entry, or two of one path"),
        (
            {"files": [{"path": "adapter.json", "digest": "sha256:" + "0" * 64, "size": 1}]},
            "adapter.json: its list of files has an invalid entry, or two of one path",
        ),
        ({"base": 3}, "adapter.json: base: 3 is not of type 'object'"),
        ({"training": 7}, "adapter.json: training: 7 is not of type 'object', 'null'"),
        ({"format": None}, "adapter.json: format: None is not one of ['peft', "),
        ({"dtype": []}, "adapter.json: dtype: [] is not of type 'string'"),
        ({"parents": {"a": 1}}, "adapter.json: parents: {'a': 1} is not of type 'array'"),
    ],
)
def test_an_invalid_manifest_is_one_line(hub: Hub, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    pushed(hub, write_adapter(tmp_path / "sql"))
    files = hub.repos["org/sql"].branches["main"].files
    files["adapter.json"] = File(json.dumps({**json.loads(files["adapter.json"].data), **change}).encode())
    with remote(hub.host) as source, pytest.raises((IntegrityError, RefusedError)) as error:
        source.manifest("main")
    assert words in str(error.value)
    assert words.endswith("'") or "[" in words or error.value.hint == "Ask its owner to push it again"


def test_names_that_no_adapter_has_are_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    pushed(hub, write_adapter(tmp_path / "sql"))
    files = hub.repos["org/sql"].branches["main"].files
    document = json.loads(files["adapter.json"].data)
    files["run.sh"] = File(b"x")
    document["files"].append({"path": "run.sh", "digest": f"sha256:{files['run.sh'].sha256}", "size": 1})
    files["adapter.json"] = File(json.dumps(document).encode())
    with remote(hub.host) as source, pytest.raises(RefusedError, match=r"run\.sh"):
        download(source, "main", tmp_path / "out", pauses=())
