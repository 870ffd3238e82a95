"""Whole models that somebody uploaded, or that the upstream has, are the bases of adapters, without an operator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import model_bases, timed_value
from adapterhub.ref import Ref
from adapterhub_converters.formats import convert
from tests.hub.conftest import Running, client, serving
from tests.hub.sending import Sending
from tests.hub.upstream.conftest import hub_of
from tests.support import folders

BASE = "org/base"


def make_base(folder: Path) -> dict[str, bytes]:
    """The files of a tiny Llama."""
    folders.base(folder, size=8)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push_adapter(hub: Running, folder: Path, name: str, base: str = BASE) -> None:
    """Push an adapter that names a base."""
    folders.adapter(folder, folders.pairs(2), lora_alpha=len(name))  # so that no two are the same version
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    with hub.registry() as registry:
        registry.push(folder, Ref(name))


def upload_base(hub: Running, tmp_path: Path, name: str = BASE, **options: Any) -> None:
    from huggingface_hub import CommitOperationAdd

    api = client(hub, tmp_path)
    api.create_repo(name, **options)
    files = make_base(tmp_path / name.replace("/", "-"))
    api.create_commit(name, [CommitOperationAdd(path, data) for path, data in files.items()], commit_message="a base")


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Running]:
    """Another hub, which has a base."""
    with serving(tmp_path / "away") as hub:
        upload_base(hub, tmp_path)
        yield hub


def gguf_status(hub: Running, name: str) -> int:
    return Sending(hub.url, hub.token).ask("GET", f"/api/models/{name}.gguf").status


def test_an_uploaded_model_is_the_base_of_forms_and_on_the_page_of_bases(hub: Running, tmp_path: Path) -> None:
    upload_base(hub, tmp_path)
    push_adapter(hub, tmp_path / "sql", "team/sql")
    path = client(hub, tmp_path).hf_hub_download("team/sql.gguf", "sql.gguf", cache_dir=tmp_path / "cache")
    assert convert.sniff(Path(path)) == "gguf"
    page = Sending(hub.url).ask("GET", "/-/bases").data.decode()
    assert all(text in page for text in ("Whole models here", 'href="/org/base"', "LlamaForCausalLM", ">1</a>"))


def test_a_private_base_is_used_in_its_own_namespace_and_shown_to_nobody_else(hub: Running, tmp_path: Path) -> None:
    upload_base(hub, tmp_path, "team/base", private=True)
    push_adapter(hub, tmp_path / "ours", "team/sql", "team/base")
    push_adapter(hub, tmp_path / "theirs", "other/sql", "team/base")
    assert [gguf_status(hub, name) for name in ("team/sql", "other/sql")] == [200, 400]
    assert "Whole models here" not in Sending(hub.url).ask("GET", "/-/bases").data.decode()


def test_the_page_of_an_adapter_says_whether_it_fits_a_base_that_was_uploaded(hub: Running, tmp_path: Path) -> None:
    push_adapter(hub, tmp_path / "sql", "team/sql")
    wide = folders.adapter(tmp_path / "wide", folders.pairs(2, size=(16, 8)), base_model_name_or_path=BASE)
    with hub.registry() as registry:
        registry.push(wide, Ref("team/wide"))

    def verdicts_of_peft(name: str) -> str:
        page = Sending(hub.url).ask("GET", f"/team/{name}").data.decode()
        return page.partition('<th scope="row">peft')[2].partition("</tr>")[0]

    assert [">applied<" in verdicts_of_peft(name) for name in ("sql", "wide")] == [True, True]
    upload_base(hub, tmp_path)
    assert [">applied<" in verdicts_of_peft(name) for name in ("sql", "wide")] == [True, False]


@pytest.mark.parametrize("mode", ["redirect", "cache"])
def test_a_model_of_the_upstream_is_the_base_of_forms(tmp_path: Path, away: Running, mode: str) -> None:
    with hub_of(tmp_path / "hub", away.url, mode) as hub:
        push_adapter(hub, tmp_path / "sql", "team/sql")
        assert gguf_status(hub, "team/sql") == 200
        assert list((hub.folder / "upstream/files").iterdir()) == []  # its headers are enough


def test_a_base_that_is_kept_of_the_upstream_needs_no_upstream(tmp_path: Path, away: Running) -> None:
    with hub_of(tmp_path / "hub", away.url) as hub:
        client(hub, tmp_path).snapshot_download(BASE, cache_dir=tmp_path / "cache")
    with hub_of(tmp_path / "hub", "http://127.0.0.1:9") as hub:
        push_adapter(hub, tmp_path / "sql", "team/sql")
        assert gguf_status(hub, "team/sql") == 200


def verdict_of_peft(hub: Running, name: str) -> str:
    """What the page of an adapter says about peft."""
    page = Sending(hub.url).ask("GET", f"/{name}").data.decode()
    return page.partition('<th scope="row">peft')[2].partition("</tr>")[0]


def test_a_model_that_is_kept_of_the_upstream_is_on_the_page_of_bases_and_compared_with_adapters(
    tmp_path: Path, away: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_bases, "_LIST_TTL", 0.0)
    monkeypatch.setattr(timed_value, "_PAUSE", 0)
    with hub_of(tmp_path / "hub", away.url) as hub:
        wide = folders.adapter(tmp_path / "wide", folders.pairs(2, size=(16, 8)), base_model_name_or_path=BASE)
        with hub.registry() as registry:
            registry.push(wide, Ref("team/wide"))
        assert ">applied<" in verdict_of_peft(hub, "team/wide")  # of a base that nobody has asked for, nothing is known
        client(hub, tmp_path).hf_hub_download(BASE, "config.json", cache_dir=tmp_path / "config")
        assert "kept of the upstream" not in Sending(hub.url).ask("GET", "/-/bases").data.decode()  # not as a whole
        client(hub, tmp_path).snapshot_download(BASE, cache_dir=tmp_path / "cache")
        page = Sending(hub.url).ask("GET", "/-/bases").data.decode()
        assert all(text in page for text in ("kept of the upstream", BASE, "LlamaForCausalLM", ">1</a>"))
        assert ">applied<" not in verdict_of_peft(hub, "team/wide")
    # Without the upstream, and for nobody whom a namespace of this hub hides it from.
    with hub_of(tmp_path / "hub", "http://127.0.0.1:9") as hub:
        assert ">applied<" not in verdict_of_peft(hub, "team/wide")
        assert "kept of the upstream" in Sending(hub.url).ask("GET", "/-/bases").data.decode()
        client(hub, tmp_path).create_repo("org/other")
        assert "kept of the upstream" not in Sending(hub.url).ask("GET", "/-/bases").data.decode()


def test_no_base_of_a_namespace_of_this_hub_comes_from_the_upstream(tmp_path: Path, away: Running) -> None:
    with hub_of(tmp_path / "hub", away.url) as hub:
        client(hub, tmp_path).create_repo("org/other")
        push_adapter(hub, tmp_path / "sql", "team/sql")
        assert gguf_status(hub, "team/sql") == 400
