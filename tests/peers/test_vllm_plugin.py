"""vLLM with our resolver: a name is one version forever, or an error in words; what vLLM alone answers is beside it."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import vllm_build
from adapterhub.serve.engines.engine_client import Client
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.conftest import Run, need_module
from tests.support import environments, tiny, vllm

pytestmark = pytest.mark.peer
LONG = 100  # tokens
WIDE = "rank-above-max: team/wide:v1: has rank 12, and vLLM was started for 8. Start vLLM with --max-lora-rank 16"
PROMPT, COUNT = [*range(1, 9)], 8


def by_peft(adapted: Any) -> list[int]:
    import torch

    tokens = adapted.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
    generated: list[int] = tokens[0, len(PROMPT) :].tolist()
    return generated


def renamed(source: Path, out: Path, old: str, new: str) -> None:
    """An adapter with other paths, as those that some trainers save: vLLM finds no module there (vLLM #34186)."""
    from safetensors.numpy import load_file

    shutil.copytree(source, out)
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(source / peft.WEIGHTS).items()}
    safetensors_file.write(out / peft.WEIGHTS, tensors, {"format": "pt"})
    config = json.loads((source / peft.CONFIG).read_text())
    config["target_modules"] = sorted({name.replace(old, new).rpartition(".")[2] for name in config["target_modules"]})
    (out / peft.CONFIG).write_text(json.dumps(config))


@pytest.fixture
def answers(tmp_path: Path) -> dict[str, list[int]]:
    """What peft answers with a base and with three adapters; beside these are two that have modules which the base has not."""
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}  # the smallest head of vLLM's attention on a CPU
    tiny.model(**sizes).save_pretrained(tmp_path / "base")
    generated = {"base": by_peft(tiny.model(**sizes))}
    for name, strength in (("one", 0.1), ("two", 0.2), ("three", 0.3)):
        generated[name] = by_peft(tiny.adapter(tiny.model(**sizes), tmp_path / name, strength=strength))
    tiny.adapter(tiny.model(**sizes), tmp_path / "wide", r=12)
    renamed(tmp_path / "one", tmp_path / "misfit", ".model.model.", ".model.backbone.")
    renamed(tmp_path / "one", tmp_path / "odd", ".q_proj", ".odd_proj")
    assert len({tuple(answer) for answer in generated.values()}) == 4
    return generated


@pytest.fixture
def models(run: Run, answers: dict[str, list[int]]) -> dict[str, str]:
    """The names, with digests, of what was pushed, by the folders that it is from."""
    del answers  # made before
    run("init")
    refs = {"one": "team/sql", "two": "team/sql", "misfit": "team/misfit", "odd": "team/odd", "wide": "team/wide"}
    pushed = {name: f"{ref}@{json.loads(run('push', name, ref, '--json').stdout)['digest']}" for name, ref in refs.items()}
    run("push", "one", "other/sql")
    return pushed


def aged(served: Path) -> None:
    """Have all served folders be as if they were last resolved long ago."""
    for folder in served.glob("sha256-*/*"):
        os.utime(folder, (1, 1))


def test_what_it_serves_is_the_version_that_was_named_and_nothing_else(
    run: Run, answers: dict[str, list[int]], models: dict[str, str], tmp_path: Path
) -> None:
    first_model, second_model = models["one"], models["two"]
    env = {**vllm.with_plugin(tmp_path / "ours"), "ADAPTERHUB_VLLM_ALLOW": "team/*", "ADAPTERHUB_REGISTRY": str(tmp_path)}
    cache = tmp_path / "xdg-cache"
    with vllm.serving(tmp_path / "base", tmp_path, env={**env, "XDG_CACHE_HOME": str(cache)}) as server:

        def answer(model: str) -> list[int]:
            return server.generated(model, PROMPT, COUNT)

        assert asyncio.run(vllm_build.mixes_base(Client(server.url), read_base(tmp_path / "base")))  # as it is for CPUs

        # Each version by its digest, its number and without its namespace, in turn and at once.
        expected = {first_model: "one", second_model: "two", "team/sql:v1": "one", "sql:v2": "two"}
        with ThreadPoolExecutor(4) as pool:
            answers_by_model = dict(zip([*expected] * 4, pool.map(answer, [*expected] * 4), strict=True))
        assert answers_by_model == {model: answers[name] for model, name in expected.items()}
        assert answer("base") == answers["base"]

        # What was pushed since the start is there; what may move, fits nothing, is forbidden or unknown is refused in words.
        run("push", "three", "team/sql", "--tag", "prod")
        assert answer("team/sql:v3") == answers["three"]
        for model in ("team/sql", "team/sql:prod", "team/sql:latest", first_model[:-8]):
            status, message = server.refused(model)
            assert (status, message.partition(":")[0]) == (400, "moving-tag")
        status, message = server.refused("team/misfit:v1")
        assert status == 400
        assert message.startswith("other-prefix: team/misfit:v1: vllm: ignored: ")
        assert message.endswith('14 modules begin with "backbone.", the base\'s with "model."')
        status, message = server.refused("team/odd:v1")
        assert (status, message.partition(":")[0]) == (400, "runtime")
        assert "vllm: refused: expected target modules" in message, message
        status, message = server.refused("team/wide:v1")
        assert (status, message) == (400, WIDE)
        assert server.refused("other/sql:v1") == (404, "not-served: other/sql: is not served here")
        assert server.refused("team/none:v1") == (404, "team/none:v1: no such adapter")
        assert server.refused("team/sql:v9")[0] == 404
        assert server.refused("GPT-4") == (404, "The model `GPT-4` does not exist. Valid aliases: base.")
        assert server.refused("team/sql:v1*0.5+team/sql:v2*0.5") == (
            400,
            "blend: team/sql:v1*0.5+team/sql:v2*0.5: a blend, and vLLM applies one adapter to a request",
        )

        # A long answer of one version, while others take its place in memory again and again.
        long = server.generated(first_model, PROMPT, LONG)
        assert long[:COUNT] == answers["one"]
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(server.generated, first_model, PROMPT, LONG) for _ in range(2)]
            for _ in range(4):
                assert [answer(model) for model in (second_model, "team/sql:v3")] == [answers["two"], answers["three"]]
            assert [generation.result() for generation in running] == [long, long]
        assert server.is_healthy()

        # Folders that the server reads again after an eviction stay, though they are old and it is told to forget them.
        served = cache / "adapterhub/served"
        aged(served)
        server.post("/v1/unload_lora_adapter", {"lora_name": first_model})
        swept = json.loads(run("gc", "--json", env={"XDG_CACHE_HOME": str(cache)}).stdout)
        assert (swept["served"], swept["served_held"]) == (1, 3)  # the one that was refused is not held
        assert [answer(model) for model in (first_model, second_model, "team/sql:v3")] == [
            answers[n] for n in ("one", "two", "three")
        ]

        # vLLM alone, of the same adapter that fits no module: the base's tokens, 200, under the adapter's name.
        run("pull", "team/misfit", "-o", "pulled")
        server.post("/v1/load_lora_adapter", {"lora_name": "alone", "lora_path": str(tmp_path / "pulled")})
        assert answer("alone") == answers["base"]
    assert evicted_count(run, cache) == 3


def evicted_count(run: Run, cache: Path) -> int:
    """How many folders a gc removes once the killed server's processes have ended."""
    for _ in range(100):
        aged(cache / "adapterhub/served")
        swept = json.loads(run("gc", "--json", env={"XDG_CACHE_HOME": str(cache)}).stdout)
        if not swept["served_held"]:
            break
        time.sleep(0.1)
    return int(swept["served"])


LOAD = "from vllm.plugins import load_general_plugins; load_general_plugins(); "
NAMES = "from vllm.lora.resolver import LoRAResolverRegistry as all; print(*all.get_supported_resolvers())"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return vllm.with_plugin(tmp_path_factory.mktemp("plugin") / "ours")


def loaded(script: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What one of vLLM's processes says, after it has loaded its plugins; nobody's home has a registry."""
    return subprocess.run([vllm.python(), "-c", script], check=False, capture_output=True, text=True, env=env)


def test_it_is_registered_once_where_names_are_allowed(ours: dict[str, str], tmp_path: Path) -> None:
    env = {**ours, "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    assert loaded(LOAD + NAMES, env).stdout.splitlines()[-1] == ""
    twice = loaded(f"{LOAD}from adapterhub.cli.vllm_settings import register; register(); {NAMES}", env | ALLOWED)
    assert twice.stdout.splitlines()[-1] == "adapterhub"
    assert "will be overwritten" not in twice.stdout + twice.stderr
    paths = [path for path in tmp_path.rglob("*") if "adapterhub" in path.name]
    assert paths == []


ALLOWED = {"ADAPTERHUB_VLLM_ALLOW": "team/*"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"}, "answer for every adapter with the base"),
        ({"ADAPTERHUB_VLLM_TAGS": "latest"}, "is not one of refuse, pin"),
    ],
)
def test_vllm_does_not_start_with_variables_that_would_serve_something_else(
    ours: dict[str, str], tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    loaded_model = loaded(LOAD, {**ours, **ALLOWED, "HOME": str(tmp_path), "PATH": os.environ["PATH"], **variables})
    assert loaded_model.returncode == 1
    assert says in loaded_model.stderr.splitlines()[-1]


# ---- the interface, in the release that runs here and in the newest


@pytest.fixture(params=["0.32.0", "0.33.0"], scope="module")
def release(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The modules of a release of vLLM, which are only read: the newest has no build for CPUs."""
    if request.param == "0.32.0":
        yield next(vllm.python().parents[1].glob("lib/python*/site-packages"))
    else:
        folders = ("vllm/lora", "vllm/plugins", "vllm/entrypoints/serve")
        yield environments.unpacked_wheel(f"vllm=={request.param}", *folders, "vllm/envs.py", "vllm/exceptions.py")


def defined(path: Path) -> dict[str, ast.stmt]:
    """What a module and its classes define, by dotted names."""
    nodes: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            nodes |= {f"{node.name}.{getattr(inner, 'name', '')}": inner for inner in node.body}
        nodes[getattr(node, "name", "")] = node
    return nodes


def parameters(node: ast.stmt) -> list[str]:
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return [argument.arg for argument in node.args.args]


def test_its_interface_is_the_one_that_the_plugin_uses(release: Path) -> None:
    resolver = defined(release / "vllm/lora/resolver.py")
    assert isinstance(resolver["LoRAResolver.resolve_lora"], ast.AsyncFunctionDef)
    assert parameters(resolver["LoRAResolver.resolve_lora"]) == ["self", "base_model_name", "lora_name"]
    assert parameters(resolver["_LoRAResolverRegistry.register_resolver"]) == ["self", "resolver_name", "resolver"]
    assert parameters(resolver["_LoRAResolverRegistry.get_supported_resolvers"]) == ["self"]
    request = defined(release / "vllm/lora/request.py")["LoRARequest"]
    assert isinstance(request, ast.ClassDef)
    fields = [ast.unparse(statement) for statement in request.body if isinstance(statement, ast.AnnAssign)]
    assert fields[:3] == ["lora_name: str", "lora_int_id: int", "lora_path: str = ''"]
    errors = defined(release / "vllm/exceptions.py")
    assert parameters(errors["GracefulHTTPError.__init__"]) == ["self", "message", "http_status"]
    assert "VLLMNotFoundError" in errors
    text = (release / "vllm/envs.py").read_text()
    assert {"VLLM_ALLOW_RUNTIME_LORA_UPDATING:", "VLLM_SKIP_MODEL_NAME_VALIDATION:"} <= set(text.split())
    assert "'vllm.general_plugins'" in ast.unparse(ast.parse((release / "vllm/plugins/__init__.py").read_text()))
    answers = (release / "vllm/entrypoints/serve/exception_handling/error_response.py").read_text()
    assert {"GracefulHTTPError", "VLLMNotFoundError", "ValueError"} <= set(answers.replace(",", " ").replace("(", " ").split())
