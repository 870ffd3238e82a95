"""Programs with one HF_ENDPOINT get an adapter from this hub and its base from the upstream, whatever their age."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from tests.conftest import need_module
from tests.hub.conftest import Running, client, serving
from tests.hub.upstream.conftest import FILES, NAME, anonymous, hub_of, upload
from tests.support import llama_server, vllm
from tests.support.environments import unpacked_wheel
from tests.support.hub_clients import HubClient, JavaScriptClient
from tests.support.hub_models import publish
from tests.support.hub_server import Hub

pytestmark = pytest.mark.peer
MODES = ("redirect", "cache")
LOADED = """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(8)[None]
expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")(ids).logits
assert torch.equal(AutoPeftModelForCausalLM.from_pretrained("team/x")(ids).logits, expected)
print("same")
"""


@pytest.mark.parametrize("mode", MODES)
def test_autopeft_loads_an_adapter_whose_base_is_only_at_the_upstream(tmp_path: Path, mode: str) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    from tests.support import tiny

    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    tiny.adapter(base, tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/base"}))
    with serving(tmp_path / "upstream") as upstream, hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        api = client(upstream, tmp_path)
        api.create_repo("org/base")
        api.upload_folder(repo_id="org/base", folder_path=tmp_path / "base")
        with hub.registry() as registry:
            registry.push(tmp_path / "adapter", Ref("team/x"))
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.token}
        command = [sys.executable, "-c", LOADED]
        environment = {**os.environ, **settings}
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )
        assert result.stdout == "same\n", result.stderr
        assert anonymous(hub).ask("GET", "/api/models/org/base").status == (200 if mode == "cache" else 307)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Running]:
    """A hub of ours that has a model, and takes note of no token."""
    with serving(tmp_path / "upstream") as running:
        upload(running, tmp_path)
        yield running


SNAPSHOT = """
import sys
from huggingface_hub import HfApi, file_exists, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
name, folder = sys.argv[1:]
snapshot_download(name, local_dir=folder)
api = HfApi()
info = api.model_info(name, files_metadata=True)
head = get_hf_file_metadata(hf_hub_url(name, "model.safetensors"))
assert head.commit_hash == info.sha and getattr(head, "xet_file_data", None) is None, head
paths = {file.path for file in api.list_repo_tree(name, recursive=True)} - {".gitattributes"}
assert paths == {"config.json", "model.safetensors", "sub", "sub/notes.txt"}
assert [path.path for path in api.get_paths_info(name, ["config.json"])] == ["config.json"]
assert api.list_repo_refs(name).branches[0].name == "main"
assert not file_exists(name, "none.json")
print(info.sha)
"""


@pytest.mark.parametrize("mode", MODES)
def test_every_huggingface_hub_gets_a_model_of_the_upstream(
    hf_client: HubClient, tmp_path: Path, upstream: Running, mode: str
) -> None:
    with hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        env = {"HF_TOKEN": hub.token}
        commit = hf_client.script(hub.url, SNAPSHOT, NAME, tmp_path / "down", env=env).stdout.strip()
        assert commit == client(upstream, tmp_path).model_info(NAME).sha
        assert {path: (tmp_path / "down" / path).read_bytes() for path in FILES} == FILES


JAVASCRIPT = """
import { downloadFile, listFiles, modelInfo } from "@huggingface/hub";
const [hubUrl, accessToken, name] = process.argv.slice(1);
const sizes = {};
for await (const { path, type } of listFiles({ hubUrl, accessToken, repo: name, recursive: true })) {
    if (type !== "file") continue;
    const file = await downloadFile({ hubUrl, accessToken, repo: name, path });
    sizes[path] = (await file.arrayBuffer()).byteLength;
}
await modelInfo({ hubUrl, accessToken, name });
console.log(JSON.stringify(sizes));
"""


@pytest.mark.parametrize("mode", MODES)
def test_javascript_gets_a_model_of_the_upstream(
    js_client: JavaScriptClient, tmp_path: Path, upstream: Running, mode: str
) -> None:
    with hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        sizes = json.loads(js_client.script(JAVASCRIPT, hub.url, hub.token, NAME).stdout)
        assert {path: sizes[path] for path in FILES} == {path: len(data) for path, data in FILES.items()}


@pytest.mark.parametrize("mode", MODES)
def test_llama_cpp_downloads_a_model_of_the_upstream(tmp_path: Path, mode: str) -> None:
    """Its own downloader, which reads refs and a tree, and asks for the file in ranges; the server ends once it has it."""
    data = random.Random(0).randbytes(3_000_000)
    files = {"tiny-Q8_0.gguf": b"GGUF" + data}
    with Hub() as other_hub, hub_of(tmp_path / "hub", other_hub.url, mode) as hub:
        publish(other_hub, "org/tiny", files)
        cache = dict.fromkeys(("LLAMA_CACHE", "HF_HUB_CACHE"), str(tmp_path))
        environment = {**os.environ, **cache, "HF_ENDPOINT": f"{hub.url}/", "HF_TOKEN": hub.token}
        command = [str(llama_server.program()), "-hf", "org/tiny:Q8_0", "--port", "0"]
        result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
        downloaded = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "hub" not in path.parts]
        assert files["tiny-Q8_0.gguf"] in downloaded, result.stderr
        sent_tokens = [headers for _, _, headers in other_hub.requests if "authorization" in headers]
        assert sent_tokens == []


DIFFUSERS = """
import sys
from diffusers import DDPMPipeline
print(DDPMPipeline.download(sys.argv[1], token=True))
"""
PIPELINE = {
    "model_index.json": json.dumps(
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": "0.42.1",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        }
    ).encode(),
    "scheduler/scheduler_config.json": b'{"_class_name": "DDPMScheduler"}',
    "unet/config.json": b'{"_class_name": "UNet2DModel"}',
    "unet/diffusion_pytorch_model.safetensors": FILES["model.safetensors"],
}


@pytest.mark.parametrize("mode", MODES)
def test_diffusers_downloads_a_pipeline_of_the_upstream(tmp_path: Path, mode: str) -> None:
    for module in ("torch", "transformers"):
        need_module(module)
    with serving(tmp_path / "upstream") as upstream, hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        upload(upstream, tmp_path, "org/pipeline", PIPELINE)
        folders = [str(unpacked_wheel("diffusers==0.42.1", "diffusers/")), os.environ.get("PYTHONPATH", "")]
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.token}
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(folders)}
        command = [sys.executable, "-c", DIFFUSERS, "org/pipeline"]
        result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr
        folder = Path(result.stdout.splitlines()[-1])
        assert {path: (folder / path).read_bytes() for path in PIPELINE} == PIPELINE


VLLM = """
import sys
from pathlib import Path
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.transformers_utils.config import get_config
name, cache = sys.argv[1:]
assert get_config(name, trust_remote_code=False).model_type == "llama"
print(download_weights_from_hf(name, cache, ["*.safetensors"]))
"""


@pytest.mark.parametrize("mode", MODES)
def test_vllm_downloads_the_config_and_the_weights_of_a_model_of_the_upstream(tmp_path: Path, mode: str) -> None:
    files = {**FILES, "config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'}
    with serving(tmp_path / "upstream") as upstream, hub_of(tmp_path / "hub", upstream.url, mode) as hub:
        upload(upstream, tmp_path, NAME, files)
        settings = {**vllm.environ(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
        command = [str(vllm.python()), "-c", VLLM, NAME, str(tmp_path / "weights")]
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, env={**os.environ, **settings}, timeout=300
        )
        assert result.returncode == 0, result.stderr
        folder = Path(result.stdout.splitlines()[-1])
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
