"""What tests of the Hugging Face Hub's endpoints share: raw requests to a hub, and an adapter that says much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from tests.hub.conftest import Running, serving
from tests.hub.sending import Answer, Sending
from tests.support.adapters import write_adapter

Ask = Callable[..., Answer]


@pytest.fixture
def ask(hub: Running) -> Ask:
    """Raw requests with the hub's token, unless another one, or none, is given."""
    return Sending(hub.url, hub.token).ask


def write_sql(folder: Path) -> Path:
    """An adapter with a card that says much."""
    write_adapter(folder, 1)
    card = "---\nlicense: mit\nlanguage: en\ntags: [sql]\npipeline_tag: text-generation\n---\n# SQL\n"
    (folder / "README.md").write_text(card)
    return folder


@pytest.fixture
def sql(hub: Running, tmp_path: Path) -> str:
    """The adapter team/sql of one version; the id of its commit."""
    with hub.registry() as registry:
        return commit_id(registry.push(write_sql(tmp_path / "sql"), Ref("team/sql")).digest)


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A hub with team/sql that all tests read, and the id of its commit."""
    folder = tmp_path_factory.mktemp("reading")
    with serving(folder / "hub") as running:
        with running.registry() as registry:
            version = registry.push(write_sql(folder / "sql"), Ref("team/sql"))
        yield running, commit_id(version.digest)


@pytest.fixture
def read(reading: tuple[Running, str]) -> Ask:
    """Raw requests that change nothing."""
    return Sending(reading[0].url, reading[0].token).ask
