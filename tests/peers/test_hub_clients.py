"""Every client of the Hugging Face Hub gets what adapterhub pushed, and adapterhub what every client pushed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.hub_clients import JAVASCRIPT, HubClient, JavaScriptClient
from tests.support.hub_server import TOKEN, Hub

pytestmark = pytest.mark.peer


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".")}


def same_adapter(theirs: Path, ours: Path) -> None:
    """Assert that a client has what we pulled, its card with the front matter that a push adds and a pull removes."""
    down, pulled = contents(theirs), contents(ours)
    assert down.pop("README.md").endswith(pulled.pop("README.md"))
    assert down == pulled


def test_a_client_is_of_the_versions_that_its_name_says(hf_client: HubClient) -> None:
    assert hf_client.version in hf_client.hf("http://127.0.0.1:9", "version").stdout
    script = "import importlib.metadata as m; print(*(d.version for d in m.distributions(name='hf-xet')))"
    assert hf_client.script("http://127.0.0.1:9", script).stdout.strip() == (hf_client.xet or "")


def test_every_huggingface_hub_downloads_what_we_pushed(hf_client: HubClient, make: Make, run: Run, tmp_path: Path) -> None:
    # 1.33 compares hosts without their ports: it takes a storage at another port for the hub, and asks it who it is.
    with Hub(storage=hf_client.version != "1.33.0") as hub:
        run("push", make(), "hf://org/sql", env={"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN})
        hf_client.hf(hub.url, "download", "org/sql", "--local-dir", tmp_path / "down")
        run("pull", "hf://org/sql", "-o", "ours", env={"HF_ENDPOINT": hub.url})
    same_adapter(tmp_path / "down", tmp_path / "ours")


def test_we_pull_what_every_huggingface_hub_uploaded(
    hf_client: HubClient, make: Make, run: Run, hub: Hub, tmp_path: Path
) -> None:
    # The hub of the tests takes no Xet, so a client that would send it is told not to.
    source, env = make(), {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    hf_client.hf(hub.url, "upload", "org/theirs", source, ".", env=env)
    run("pull", "hf://org/theirs", "-o", "out", env={"HF_ENDPOINT": hub.url})
    assert contents(source).items() <= contents(tmp_path / "out").items()
    copied = run("copy", "hf://org/theirs", "team/theirs", "--json", env={"HF_ENDPOINT": hub.url})
    assert json.loads(copied.stdout)["digest"] == oci_manifest.build(source).digest


DOWNLOAD = """
import { downloadFile, listFiles } from "@huggingface/hub";
import { mkdir, writeFile } from "node:fs/promises";
const [hubUrl, repo, folder] = process.argv.slice(1);
await mkdir(folder);
for await (const { path } of listFiles({ hubUrl, repo })) {
    if (path.startsWith(".")) continue;
    const file = await downloadFile({ hubUrl, repo, path });
    await writeFile(`${folder}/${path}`, Buffer.from(await file.arrayBuffer()));
}
"""
UPLOAD = """
import { createRepo, uploadFiles } from "@huggingface/hub";
import { readdir, readFile } from "node:fs/promises";
const [hubUrl, accessToken, repo, folder] = process.argv.slice(1);
const names = await readdir(folder);
const read = async (path) => ({ path, content: new Blob([await readFile(`${folder}/${path}`)]) });
const files = await Promise.all(names.map(read));
await createRepo({ hubUrl, accessToken, repo });
await uploadFiles({ hubUrl, accessToken, repo, files });
"""


def test_javascript_downloads_what_we_pushed(
    js_client: JavaScriptClient, make: Make, run: Run, hub: Hub, tmp_path: Path
) -> None:
    run("push", make(), "hf://org/sql", env={"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN})
    js_client.script(DOWNLOAD, hub.url, "org/sql", tmp_path / "down")
    run("pull", "hf://org/sql", "-o", "ours", env={"HF_ENDPOINT": hub.url})
    same_adapter(tmp_path / "down", tmp_path / "ours")


def test_we_pull_what_javascript_uploaded(js_client: JavaScriptClient, make: Make, run: Run, hub: Hub, tmp_path: Path) -> None:
    source = make()
    js_client.script(UPLOAD, hub.url, TOKEN, "org/theirs", source)
    run("pull", "hf://org/theirs", "-o", "out", env={"HF_ENDPOINT": hub.url})
    assert contents(source).items() <= contents(tmp_path / "out").items()


def test_the_javascript_client_is_of_the_version_that_is_asked_for(js_client: JavaScriptClient) -> None:
    package = json.loads((js_client.folder / "node_modules/@huggingface/hub/package.json").read_text())
    assert package["version"] == JAVASCRIPT
