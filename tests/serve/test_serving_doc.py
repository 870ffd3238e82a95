"""docs/serving.md and docs/gateway.md: the manifests are what Kubernetes takes, and the tables are what is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adapterhub.cli import engines, environment, vllm_settings
from adapterhub.ref import Ref
from adapterhub.remotes.named_remotes import check_url
from adapterhub.serve import model_names
from adapterhub.serve.engines import EMBEDDINGS
from adapterhub.serve.engines.api_paths import ALL_PATHS, ENGINE_PATHS, RERANKS
from adapterhub.serve.engines.engine_for_base import ENGINES
from adapterhub.serve.gateway import route_file
from adapterhub.serve.model_names import AllowedNames
from adapterhub_converters.runtime_rules import RUNTIMES
from tests.conftest import ROOT, need_module

PAGE = (ROOT / "docs/serving.md").read_text()
GATEWAY_PAGE = (ROOT / "docs/gateway.md").read_text()
OURS = {
    vllm_settings.ALLOW, vllm_settings.TAGS, vllm_settings.BASE, vllm_settings.CHATS,
    environment.REGISTRY, environment.REMOTE,
}  # fmt: skip


def documents() -> dict[str, Any]:
    """The manifests that the page leads to, by their kinds."""
    need_module("yaml")
    import yaml

    assert "](../deploy/inference-extension.yaml)" in PAGE
    manifests = yaml.safe_load_all((ROOT / "deploy/inference-extension.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in manifests}


def test_every_variable_of_the_plugin_is_in_the_table_and_no_other() -> None:
    assert set(re.findall(r"^\| `(ADAPTERHUB_\w+)` \|", PAGE, re.MULTILINE)) == OURS


def test_every_runtime_is_in_the_table() -> None:
    table = PAGE.partition("| `--for` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row)} == set(RUNTIMES)


def test_the_table_of_paths_is_what_the_gateway_answers() -> None:
    columns = ("in process", "llama.cpp", "llama.cpp, one process", "vllm", "sglang")
    table = GATEWAY_PAGE.partition("| path |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    answered = {engine: set(ENGINE_PATHS[engine]) for engine in columns}
    answered["llama.cpp"] |= {EMBEDDINGS, *RERANKS}  # by an option
    paths = [(path, row) for first, *row in cells for path in re.findall(r"`(/[^`]*)`", first)]
    assert {path for path, _ in paths} == ALL_PATHS
    for path, row in paths:
        assert [cell != "no" for cell in row] == [path in answered[engine] for engine in columns], path
    assert ENGINE_PATHS["mlx"] == ENGINE_PATHS["in process"]


def test_the_manifests_belong_together() -> None:
    by_kind = documents()
    assert set(by_kind) == {"ConfigMap", "Deployment", "InferencePool", "InferenceModelRewrite"}
    template, pool = by_kind["Deployment"]["spec"]["template"], by_kind["InferencePool"]["spec"]
    assert by_kind["Deployment"]["spec"]["selector"] == pool["selector"]
    assert template["metadata"]["labels"] == pool["selector"]["matchLabels"]
    assert by_kind["InferenceModelRewrite"]["spec"]["poolRef"]["name"] == by_kind["InferencePool"]["metadata"]["name"]
    (container,) = template["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": by_kind["ConfigMap"]["metadata"]["name"]}}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in template["spec"]["volumes"]}
    assert pool["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]
    assert all(isinstance(word, str) for word in container["args"])


def test_the_server_in_the_manifests_serves_what_its_routes_name() -> None:
    by_kind = documents()
    variables = by_kind["ConfigMap"]["data"]
    assert all(isinstance(value, str) for value in variables.values())
    assert {name for name in variables if name.startswith("ADAPTERHUB_")} <= OURS
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    check_url(variables[environment.REMOTE])
    allowed = AllowedNames.from_patterns([variables[vllm_settings.ALLOW]])
    for rule in by_kind["InferenceModelRewrite"]["spec"]["rules"]:
        for target in rule["targets"]:
            ((ref, weight),) = ((part.ref, part.weight) for part in model_names.parse(target["modelRewrite"]))
            assert (ref.name in allowed, model_names.is_moving(ref), weight) == (True, False, 1.0)
        assert model_names.is_moving(Ref.parse(rule["matches"][0]["model"]["value"]))  # what vLLM itself is never asked for
        assert sum(target["weight"] for target in rule["targets"]) == 100


def test_the_entry_point_is_the_one_that_vllm_loads() -> None:
    import tomllib

    points = tomllib.loads(Path(ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"adapterhub": f"{vllm_settings.__name__}:{vllm_settings.register.__name__}"}


def test_the_route_file_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```$", GATEWAY_PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "routes.toml").write_text("\n".join(blocks))
    routes = route_file.read(tmp_path / "routes.toml")
    assert set(routes.routes) == {"legal"}
    assert [key.name for key in routes.keys.values()] == ["research"]
    assert [engine.name for engine in routes.engines] == ["left"]


def test_every_engine_is_in_the_table() -> None:
    table = PAGE.partition("| `--engine` |")[2].partition("\n\n")[0]
    named = {name.split()[0] for name in re.findall(r"^\| `([^`]*)` \|", table, re.MULTILINE)}
    assert named == {*ENGINES} - {"auto"}
    assert engines.ENGINES == ENGINES
