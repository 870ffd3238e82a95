"""A tree that is no adapter yet brings no pickles and archives either, and what is shown of it runs nothing."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest
import requests

from tests.hub.conftest import Running, hub
from tests.support.hub_tenants import Tenant

__all__ = ["hub"]


def archive() -> bytes:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "adapter_model.safetensors", "README.md", "x.png"])
@pytest.mark.parametrize("data", [pickle.dumps({"a": 1}), archive()], ids=["pickle", "zip"])
def test_a_tree_that_is_not_whole_has_no_code_under_another_name(hub: Running, name: str, data: bytes) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    answer = red.commit("open", {name: data})
    assert (answer.status_code, name in answer.json()["error"]) == (400, True)
    assert requests.get(f"{hub.url}/red/open/resolve/main/{name}", timeout=10).status_code == 404
    assert red.commit("open", {"README.md": b"# Soon"}).status_code == 200


def test_a_picture_or_a_page_of_a_tenant_is_downloaded_and_not_shown(hub: Running) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    assert red.commit("open", {"x.svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"}).status_code == 200
    headers = requests.get(f"{hub.url}/red/open/resolve/main/x.svg", timeout=10).headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment")
    assert headers["x-content-type-options"] == "nosniff"
