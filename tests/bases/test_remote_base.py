"""Bases behind HTTP: what the folder on the disk is, from the headers alone; and servers that err or lie."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adapterhub.bases.hub_address import Hub
from adapterhub.bases.remote_base import read_url
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RemoteError
from tests.conftest import Run, need_module
from tests.support.folders import adapter, pairs
from tests.support.web_server import COMMIT, FakeHub, Web

TOKEN = "hf_" + "x" * 40
BIG = 3 << 20  # bytes of each large file's weights: far more than a header
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 2, "rope_theta": 1e4}


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def storage() -> Iterator[Web]:
    with Web() as server:
        yield server


def model(folder: Path, *, shards: int = 1) -> Path:
    """A llama with large weights in so many shards, with tokenizer and template."""
    folder.mkdir()
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (8, 8) for n in range(2)}
    shapes |= {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,)}
    shapes |= {f"model.layers.{n}.mlp.up_proj.weight": (BIG // 8, 2) for n in range(shards)}
    names = ["model.safetensors"] if shards == 1 else [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(sorted(shapes))}
    for file in names:
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if weight_map[name] == file}
        safetensors_file.write(folder / file, arrays)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def gguf(folder: Path, count: int = 1) -> Path:
    """A llama with a large vocabulary and large weights, in so many parts; the last."""
    folder.mkdir(exist_ok=True)
    words = gguf_types.strings_value([f"word number {n}" for n in range(100_000)])
    metadata = {"general.architecture": gguf_types.string_value("llama"), "tokenizer.ggml.tokens": words}
    for n in range(count):
        split = {"split.no": gguf_types.MetadataValue("UINT16", n), "split.count": gguf_types.MetadataValue("UINT16", count)}
        name = "m.gguf" if count == 1 else f"m-{n + 1:05}-of-{count:05}.gguf"
        arrays = {f"blk.{n}.attn_q.weight": np.zeros((BIG // 32, 8), np.float32)}
        gguf_output.write(folder / name, {**(metadata if n == 0 else {}), **(split if count > 1 else {})}, arrays)
    return folder / name


def same(first: BaseSpec, second: BaseSpec, *but: str) -> None:
    """Whether they say the same of the model, wherever it lies."""
    apart = {"source", "fetched", "folder", *but}
    for field in dataclasses.fields(BaseSpec):
        if field.name not in apart:
            assert getattr(first, field.name) == getattr(second, field.name), field.name


def read(url: str, hub: Hub | None = None) -> BaseSpec:
    hub = hub or Hub()
    return read_url(url, hub, pauses=(0, 0))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("slash", ["", "/", "/config.json"])
def test_a_folder_behind_http_is_the_folder_on_the_disk(web: Web, tmp_path: Path, shards: int, slash: str) -> None:
    web.add(model(tmp_path / "m", shards=shards), "/some/m")
    spec = read(f"{web.url}/some/m{slash}")
    same(spec, read_base(tmp_path / "m"))
    assert spec.source == f"{web.url}/some/m"
    assert spec.fetched == web.sent < shards * (1 << 16) + 5000 < spec.size


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"])
def test_a_file_behind_http_is_the_file_on_the_disk(web: Web, tmp_path: Path, name: str) -> None:
    web.add(model(tmp_path / "m", shards=3))
    same(read(f"{web.url}/{name}?signature=a%2Fb"), read_base(tmp_path / "m" / name))
    assert all(path.endswith("?signature=a%2Fb") for path in web.paths())


@pytest.mark.parametrize("count", [1, 3])
def test_a_gguf_behind_http_is_read_by_its_header(web: Web, tmp_path: Path, count: int) -> None:
    last = gguf(tmp_path / "g", count)
    web.add(tmp_path / "g")
    spec = read(f"{web.url}/{last.name}")
    same(spec, read_base(last))
    assert spec.fetched == web.sent < spec.size
    assert len(web.requests) <= count + 2  # the vocabulary is more than a first request brings


@pytest.mark.peer
def test_a_base_in_nf4_behind_http_is_the_same_base(web: Web, tmp_path: Path) -> None:
    state = np.frombuffer(json.dumps({"shape": [8, 8]}).encode(), np.uint8)
    arrays: dict[str, np.ndarray] = {"z.weight": np.zeros((BIG // 2, 1), np.float32)}
    for n in range(20):
        arrays |= {f"{n}.weight": np.zeros((32, 1), np.uint8), f"{n}.weight.quant_state.bitsandbytes__nf4": state}
    safetensors_file.write(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {"load_in_4bit": True}}))
    web.add(tmp_path)
    spec = read(web.url)
    same(spec, read_base(tmp_path))
    assert spec.tensors["3.weight"].shape == (8, 8)
    assert web.sent < BIG


def test_an_index_whose_files_are_elsewhere_gives_names(web: Web, tmp_path: Path) -> None:
    index = model(tmp_path / "m", shards=3) / "model.safetensors.index.json"
    web.files["/index.json"] = index.read_bytes()
    spec = read(f"{web.url}/index.json")
    assert spec.names
    assert spec.tensors == {}
    assert len(spec.notes) == 2


# ---- a hub


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_on_a_hub_is_the_folder_with_its_name_and_commit(
    web: Web, storage: Web, tmp_path: Path, token: str | None, shards: int
) -> None:
    FakeHub(web, storage, token).publish("org/model", model(tmp_path / "m", shards=shards))
    hub = Hub(web.url, token)
    for text in ("hf://org/model", "hf://org/model@main", f"{web.url}/org/model", f"{web.url}/org/model/tree/main"):
        spec = read(text, hub)
        same(spec, read_base(tmp_path / "m"), "repo", "revision")
        assert (spec.repo, spec.revision, spec.source) == ("org/model", COMMIT, "hf://org/model")
        assert spec.fetched < spec.size
    assert not any("tokenizer.json" in path for path in web.paths())  # the listing says its digest
    assert storage.requests
    assert all("authorization" not in headers for _, headers in storage.requests)
    assert all(headers.get("authorization") == (f"Bearer {token}" if token else None) for _, headers in web.requests)


def test_a_file_a_folder_and_a_revision_on_a_hub(web: Web, storage: Web, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    model(folder / "hf")
    gguf(folder / "q", 2)
    fake = FakeHub(web, storage)
    fake.publish("org/model", folder, revision="refs%2Fpr%2F1", commit="b" * 40)
    hub = Hub(web.url)
    spec = read("hf://org/model@refs/pr/1/q/m-00002-of-00002.gguf", hub)
    same(spec, read_base(folder / "q/m-00001-of-00002.gguf"), "repo", "revision")
    assert (spec.repo, spec.revision) == ("org/model", "b" * 40)
    same(read(f"{web.url}/org/model/blob/refs%2Fpr%2F1/hf", hub), read_base(folder / "hf"), "repo", "revision")
    with pytest.raises(NotFoundError, match=r"no such file in this model. Name one of its 3 weight files, such as hf://org/mo"):
        read("hf://org/model@refs%2Fpr%2F1/x.gguf", hub)
    with pytest.raises(NotFoundError, match="there is no config.json. Name one of its"):
        read("hf://org/model@refs/pr/1", hub)


def test_a_gguf_keeps_the_name_of_the_model_it_was_made_of(web: Web, storage: Web, tmp_path: Path) -> None:
    source_url = {"general.source.repo_url": gguf_types.string_value("https://huggingface.co/org/model")}
    gguf_output.write(tmp_path / "m.gguf", {"general.architecture": gguf_types.string_value("llama"), **source_url}, {})
    FakeHub(web, storage).publish("others/model-GGUF", tmp_path)
    spec = read("hf://others/model-GGUF/m.gguf", Hub(web.url))
    assert (spec.repo, spec.revision) == ("org/model", None)


@pytest.mark.peer
def test_the_hub_of_these_tests_is_one_for_huggingface_hub(
    web: Web, storage: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_module("huggingface_hub")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import HfApi

    folder = model(tmp_path / "m")
    FakeHub(web, storage, TOKEN).publish("org/model", folder)
    api = HfApi(endpoint=web.url, token=TOKEN)
    info = api.model_info("org/model", revision="main", files_metadata=True)
    spec = read("hf://org/model", Hub(web.url, TOKEN))
    assert (info.sha, info.id) == (spec.revision, spec.repo)
    assert {file.rfilename: file.size for file in info.siblings} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    path = api.hf_hub_download("org/model", "model.safetensors", revision=info.sha, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()


# ---- servers that err


@pytest.mark.parametrize(
    ("status", "headers", "error", "says"),
    [
        (404, {}, NotFoundError, r"no such file \(HTTP 404\)"),
        (404, {"X-Error-Code": "RevisionNotFound"}, NotFoundError, r"no such revision \(HTTP 404\)"),
        (401, {}, RemoteError, "login required, or there is no such model. Set HF_TOKEN"),
        (403, {}, RemoteError, "HTTP 403: forbidden. Set HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, RemoteError, "a gated model. Ask for access on its page and set HF_TOKEN"),
        (418, {}, RemoteError, "HTTP 418"),
        (500, {}, RemoteError, r"HTTP 500 \(3 tries\). Try again later"),
        (200, {}, RemoteError, "is not a Hugging Face Hub. Is HF_ENDPOINT right"),
    ],
)
def test_refusals_of_a_hub_map_to_errors(
    web: Web, status: int, headers: dict[str, str], error: type[AdapterhubError], says: str
) -> None:
    web.rules["/api/models/org/model/revision/main"] = lambda to: to.send(status, b"<html>", **headers)
    with pytest.raises(error, match=says):
        read("hf://org/model", Hub(web.url))


@pytest.mark.parametrize("listing", [{}, {"sha": COMMIT}, {"sha": "main", "siblings": []}])
def test_a_listing_without_a_commit_and_its_files_is_refused(web: Web, listing: dict[str, object]) -> None:
    web.files["/api/models/org/model/revision/main"] = json.dumps(listing).encode()
    with pytest.raises(RemoteError) as error:
        read("hf://org/model/m.gguf", Hub(web.url))
    assert str(error.value) == f"hf://org/model: {web.url} does not list the files of a commit. Is HF_ENDPOINT right?"


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_is_no_hub_is_not_reported_to_require_the_hubs_token(web: Web, status: int) -> None:
    web.rules["/m.gguf"] = lambda to: to.send(status)
    with pytest.raises(AdapterhubError) as caught:
        read(f"{web.url}/m.gguf", Hub("https://hub.example", TOKEN))
    assert "HF_TOKEN" not in str(caught.value)
    assert "token was refused" not in str(caught.value)


def test_a_refusal_of_what_need_not_be_there_is_noted(web: Web, tmp_path: Path) -> None:
    web.add(model(tmp_path / "m"))
    (tmp_path / "m/tokenizer.json").unlink()
    web.rules["/tokenizer.json"] = lambda to: to.send(403)
    spec = read(web.url)
    assert spec.tokenizer_digest is None
    assert spec.notes == (f"{web.url}/tokenizer.json: HTTP 403, treated as missing",)
    web.rules["/model.safetensors"] = web.rules["/tokenizer.json"]
    with pytest.raises(RemoteError, match="HTTP 403"):
        read(f"{web.url}/model.safetensors")


def test_a_large_tokenizer_is_not_fetched_for_its_digest(web: Web, tmp_path: Path) -> None:
    web.add(model(tmp_path / "m"))
    web.files["/tokenizer.json"] = bytes(20_000_001)
    spec = read(web.url)
    assert spec.fetched is not None
    assert spec.fetched < BIG
    assert spec.notes == ("tokenizer.json has more than 20000000 bytes and was not fetched for its digest",)


def test_a_server_that_is_not_there(web: Web) -> None:
    url = web.url
    web.server_close()
    web.shutdown()
    with pytest.raises(RemoteError, match=r"m.gguf: connection refused \(3 tries\)"):
        read(f"{url}/m.gguf")


# ---- from the command line


def validate(run: Run, web: Web, *args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": web.url, "HF_TOKEN": "", "HF_TOKEN_PATH": "/none", "HF_HUB_OFFLINE": "0", **env}
    return run("validate", "sql", "--base", *args, env=environment, code=code)


def test_validate_reports_what_it_read(run: Run, web: Web, storage: Web, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    FakeHub(web, storage, TOKEN).publish("org/model", model(tmp_path / "m", shards=3))
    report = validate(run, web, "hf://org/model", "--json", HF_TOKEN=TOKEN)
    [document] = json.loads(report.stdout)["reports"]
    assert (document["base"], document["base_facts"]["revision"], document["ok"]) == ("hf://org/model", COMMIT, True)
    assert document["base_facts"]["fetched"] == web.sent + storage.sent
    assert report.stderr.startswith("read ")
    assert report.stderr.endswith(" of 9.4 MB by range\n")
    (tmp_path / "token").write_text(TOKEN + "\n")
    validate(run, web, "hf://org/model", HF_TOKEN_PATH=str(tmp_path / "token"))


@pytest.mark.parametrize(
    ("base", "code", "says"),
    [
        ("hf://org/private", 5, "error: hf://org/private: HTTP 401: login required, or there is no such model. Set HF_TOKEN"),
        ("hf://org/none", 3, "error: hf://org/none: no such file (HTTP 404)"),
        ("hf://a--b", 2, "is not a valid model name"),
        ("URL/none/x.gguf", 3, "none/x.gguf: no such file"),
        ("URL/none/", 3, "not a base model: there is no config.json. Name a .gguf, a .safetensors or an index.json"),
    ],
)
def test_the_exit_codes_of_a_base_that_cannot_be_read(
    run: Run, web: Web, storage: Web, tmp_path: Path, base: str, code: int, says: str
) -> None:
    adapter(tmp_path / "sql", pairs(2))
    FakeHub(web, storage, TOKEN).publish("org/private", model(tmp_path / "m"))
    report = validate(run, web, base.replace("URL", web.url), code=code)
    assert says in report.stderr
    assert report.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args", [("merge", "sql", "--into", "https://x.invalid/m", "-o", "o"), ("convert", "hf://m", "o", "--to", "hf")]
)
def test_what_needs_the_weights_refuses_an_address(run: Run, tmp_path: Path, args: tuple[str, ...]) -> None:
    adapter(tmp_path / "sql", pairs(2))
    assert "the weights are needed, not only headers. Download it, and name the folder or file" in run(*args, code=2).stderr


def test_offline_means_offline(run: Run, web: Web, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    report = validate(run, web, "hf://org/model", code=5, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE: is set, so nothing is fetched" in report.stderr
    assert web.requests == []


def test_a_token_that_cannot_be_one_is_not_sent_and_not_shown(run: Run, web: Web, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    report = validate(run, web, "hf://org/model", code=2, HF_TOKEN="hf_größe")
    reason = "the token has characters that no token has. Copy it again, or log in with `hf auth login`"
    assert report.stderr == f"error: HF_TOKEN: {reason}  [invalid-usage]\n"
    assert web.requests == []


def test_a_job_that_is_given_no_token_to_exchange_is_told_so(run: Run, web: Web, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    no_job = {"HF_OIDC_ID_TOKEN": "", "GITHUB_ACTIONS": ""}
    report = validate(run, web, "hf://org/model", code=5, HF_OIDC_RESOURCE="team/sql", **no_job)
    assert report.stderr.startswith(
        "error: HF_OIDC_RESOURCE: no token could be obtained: HF_OIDC_RESOURCE is set but no OIDC id"
    )
    assert report.stderr.endswith("HF_OIDC_ID_TOKEN is not set. Unset it, and set HF_TOKEN instead  [remote-error]\n")
    assert web.requests == []


def test_a_push_pins_the_commit(run: Run, web: Web, storage: Web, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2), base_model_name_or_path="org/model")
    FakeHub(web, storage).publish("org/model", model(tmp_path / "m"))
    run("push", "sql", "team/sql", "--base", "hf://org/model", env={"HF_ENDPOINT": web.url})
    pinned = json.loads(run("show", "team/sql", "--json").stdout)["manifest"]["base"]
    assert (pinned["repo"], pinned["revision"]) == ("org/model", COMMIT)
    assert pinned["fingerprint"] == read_base(tmp_path / "m").fingerprint
