"""The files of `deploy/` are what their programs read, and what they start is a command of this adapterhub that may bind."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from adapterhub.cli import environment, vllm_settings
from adapterhub.cli.commands.hub import hub
from adapterhub.cli.commands.serve import serve
from adapterhub.cli.main import COMMANDS
from adapterhub.http_server import binding
from adapterhub.hub.server import check_binding
from adapterhub.hub.settings import HubSettings
from adapterhub.remotes.named_remotes import check_url
from adapterhub.serve.gateway import route_file
from adapterhub.serve.gateway.server import _DRAIN
from adapterhub_converters import runtime_commands
from tests.conftest import need_module, need_program

DEPLOY = Path(__file__).parent.parent / "deploy"
CHART, SERVE_CHART = (DEPLOY / "helm" / name for name in ("adapterhub", "adapterhub-serve"))


def parsed(text: str) -> Any:
    need_module("yaml")
    import yaml

    return yaml.safe_load(text)


def rendered(template: Path, **changed_values: Any) -> Any:
    """A template of the chart with its values, as far as these templates go: values, conditions, the name of the release."""
    values = parsed((template.parent.parent / "values.yaml").read_text()) | changed_values

    def value(match: re.Match[str]) -> str:
        path, _, form = match[1].partition(" | ")
        kind, _, key = path.removeprefix(".").partition(".")
        setting = {"Values": values, "Release": {"Name": "team"}}[kind][key]
        forms: dict[str, Callable[[Any], str]] = {"": str, "quote": lambda text: json.dumps(str(text)), "toJson": json.dumps}
        return forms[form](setting)

    def block(match: re.Match[str]) -> str:
        return match[3] if bool(values[match[2]]) != bool(match[1]) else ""

    text = re.sub(r" *\{\{- range .+? \}\}\n.+?\{\{- end \}\}\n", "", template.read_text(), flags=re.DOTALL)  # of no option
    text = re.sub(r" *\{\{- if (not )?\.Values\.(\w+) \}\}\n(.+?) *\{\{- end \}\}\n", block, text, flags=re.DOTALL)
    return parsed(re.sub(r"\{\{ (.+?) \}\}", value, text))


SWITCHES: dict[str, Any] = {"maxReplicas": 9, "serviceMonitor": True}
"""Values with which the charts have every document."""


def pods(document: Any) -> Iterator[dict[str, Any]]:
    """The pods that a document of Kubernetes describes, wherever they are in it."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for member in document.values():
            yield from pods(member)


def restricted_violations(pod: dict[str, Any]) -> list[str]:
    """What the level "restricted" of the Pod Security Standards of Kubernetes finds in a pod.

    The rules are those of https://kubernetes.io/docs/concepts/security/pod-security-standards, with those of "baseline".
    """
    security, violations = pod.get("securityContext", {}), []
    allowed_volumes = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    violations += [
        f"volume {volume['name']}" for volume in pod.get("volumes", ()) if not volume.keys() - {"name"} <= allowed_volumes
    ]
    violations += [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        effective = {**security, **container.get("securityContext", {})}
        capabilities = effective.get("capabilities", {})
        rules = {
            "privileged": not effective.get("privileged"),
            "allowPrivilegeEscalation": effective.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser") != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities": "ALL" in capabilities.get("drop", ()) and {*capabilities.get("add", ())} <= {"NET_BIND_SERVICE"},
            "hostPort": not any("hostPort" in port for port in container.get("ports", ())),
        }
        violations += [f"{container['name']}: {name}" for name, is_kept in rules.items() if not is_kept]
    return violations


TEMPLATES = sorted(path for chart in (CHART, SERVE_CHART) for path in (chart / "templates").glob("*.yaml"))


def test_the_restricted_level_admits_every_pod_of_the_charts() -> None:
    pods_by_template = {path.name: list(pods(rendered(path))) for path in TEMPLATES}
    assert {name for name, its_pods in pods_by_template.items() if its_pods} == {
        "deployment.yaml",
        "gc.yaml",
        "gateway.yaml",
        "vllm.yaml",
    }
    for name, its_pods in pods_by_template.items():
        for pod in its_pods:
            assert restricted_violations(pod) == [], name
            assert restricted_violations({**pod, "securityContext": {}}) != []


def test_every_container_of_the_charts_says_what_it_needs_and_where_it_runs() -> None:
    for path in TEMPLATES:
        for pod in pods(rendered(path)):
            for container in (*pod["containers"], *pod.get("initContainers", ())):
                resources = container["resources"]
                assert {"cpu", "memory"} <= resources["requests"].keys(), container["name"]
                assert "memory" in resources["limits"], container["name"]
            # Else Kubernetes sets ADAPTERHUB_PORT for a service called adapterhub, which is a variable of `hub start`.
            assert pod["enableServiceLinks"] is False
            assert {"imagePullSecrets", "nodeSelector", "tolerations", "affinity"} <= pod.keys()


def test_disruptions_load_and_metrics_are_about_the_pods_of_the_hub() -> None:
    names = ("deployment", "disruption-budget", "autoscaler", "service-monitor", "service")
    deployment, budget, autoscaler, monitor, service = (
        rendered(CHART / "templates" / f"{name}.yaml", **SWITCHES) for name in names
    )
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]
    target = autoscaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]  # which the autoscaler decides
    for name in ("autoscaler", "service-monitor"):
        assert rendered(CHART / "templates" / f"{name}.yaml") is None
    for name in ("gateway", "vllm"):
        pod = rendered(SERVE_CHART / "templates" / f"{name}.yaml")["spec"]["template"]
        budget = rendered(SERVE_CHART / "templates" / f"{name}-disruption-budget.yaml")
        assert budget["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]


def test_the_variables_of_the_chart_are_those_of_options() -> None:
    start = hub.get_command(click.Context(hub), "start")
    assert start
    (container,) = rendered(CHART / "templates" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    names = {variable["name"] for variable in container["env"]}
    assert names <= {option.envvar for option in start.params if isinstance(option, click.Option)}
    assert environment.UPSTREAM_TOKEN in (CHART / "values.yaml").read_text()


def check_start(words: list[str]) -> dict[str, Any]:
    """The options of `hub start` with these words, with which it may bind its address."""
    start = hub.get_command(click.Context(hub), "start")
    assert start
    parameters = start.make_context("start", words).params
    bind_options = {key: value for key, value in parameters.items() if key in ("host", "require_login", "behind_proxy", "url")}
    check_binding(HubSettings(registry=Path("x"), **bind_options))
    return parameters


def check_serve(words: list[str]) -> dict[str, Any]:
    """The options of `serve` with these words, with which it may bind its address once the route file has keys."""
    parameters = serve.make_context("serve", [*words]).params
    binding.check_exposure(
        parameters["host"],
        encrypted=parameters["behind_proxy"],
        requires_login=parameters["routes"] is not None,
        code="gateway-needs-keys",
    )
    return parameters


def check_vllm(words: list[str], variables: Iterable[str]) -> None:
    """Assert that these words and variables let vLLM load what its plugin finds, with ranks that it takes."""
    assert not words[0].startswith("-")
    split = [part for word in words for part in word.split("=")]
    assert "--enable-lora" in split
    assert int(split[split.index("--max-lora-rank") + 1]) in runtime_commands.VLLM_RANKS
    assert {vllm_settings.ALLOW, environment.REMOTE, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"} <= {*variables}


def check_gc(words: list[str]) -> None:
    """Assert that these words end in a `hub gc` with options that it has."""
    at = words.index("hub")
    assert words[at + 1] == "gc"
    gc = hub.get_command(click.Context(hub), "gc")
    assert gc
    gc.make_context("gc", words[at + 2 :])


def test_compose_starts_two_hubs_that_share_what_they_have() -> None:
    services = parsed((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("hub-1", "hub-2"):
        assert services[name]["command"][:2] == ["hub", "start"]
        assert check_start(services[name]["command"][2:])["host"] == "0.0.0.0"
        assert services[name]["environment"]["ADAPTERHUB_DATABASE"].startswith("postgresql://")
        assert f"{name}:8090" in (DEPLOY / "Caddyfile").read_text()
        assert services[name]["command"][-2:] == ["--url", "https://${HUB_HOST:?}"]
        assert "/ready" in services[name]["healthcheck"]["test"][-1]
    assert services["proxy"]["depends_on"] == {key: {"condition": "service_healthy"} for key in ("hub-1", "hub-2")}
    assert [name for name in services if name != "gc" and "healthcheck" not in services[name]] == []
    assert services["hub-1"]["volumes"] != services["hub-2"]["volumes"]
    check_gc(services["gc"]["entrypoint"][2].partition(" do ")[2].partition(";")[0].split())
    assert services["gc"]["volumes"] not in (services["hub-1"]["volumes"], services["hub-2"]["volumes"])
    example = (DEPLOY / "hub.env.example").read_text()
    assert "ADAPTERHUB_BLOBS=s3://" in example
    assert environment.OIDC_SECRET in example


def test_the_images_have_the_extras_that_they_need_and_start_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = {stage.split("\n")[0].split()[-1]: stage for stage in text.split("\nFROM ")[1:]}
    extras = {
        name: set(match[1].split(",")) for name, stage in stages.items() if (match := re.search(r"whl\)\[(.+?)\]", stage))
    }
    assert extras == {"serve": {"serve", "objectstore", "postgres"}, "hub": {"hub", "objectstore", "oidc", "postgres"}}
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert set().union(*extras.values()) <= set(project["optional-dependencies"])
    assert text.index(" AS hub") == text.rindex(" AS ")  # the default
    for name in extras:
        assert re.search(r"^USER \d+$", stages[name], re.MULTILINE)
        words = json.loads(re.findall(r"^ENTRYPOINT (.+)$", stages[name], re.MULTILINE)[0])
        words += json.loads(re.findall(r"^CMD (.+)$", stages[name], re.MULTILINE)[0])
        assert words[:2] == ["adapterhub", "--registry"]
        assert words[3] in COMMANDS
        if name == "hub":
            check_start(words[5:])
        (port,) = re.findall(r"^EXPOSE (\d+)$", stages[name], re.MULTILINE)
        assert f"http://localhost:{port}/ready" in stages[name].partition("\nHEALTHCHECK ")[2]
        for volume in re.findall(r"^VOLUME (.+)$", stages[name], re.MULTILINE)[0].split():
            assert volume in re.findall(r"install -d -o \w+ (.+)", stages[name])[0].split()


def test_compose_starts_a_gateway_before_a_vllm_with_the_plugin() -> None:
    services = parsed((DEPLOY / "compose.serve.yaml").read_text())["services"]
    gateway_options, engine = check_serve(services["gateway"]["command"][1:]), services["vllm"]
    assert (gateway_options["host"], gateway_options["plugin"], gateway_options["urls"]) == (
        "0.0.0.0",
        True,
        ("http://vllm:8000",),
    )
    assert gateway_options["base"] == engine["command"][0] == "/base"
    example = (DEPLOY / "serve.env.example").read_text()
    example_variables = {line.partition("=")[0] for line in example.splitlines() if line and line[0] != "#"}
    check_vllm(engine["command"], {*engine["environment"], *example_variables})
    assert {environment.ENGINE_KEY, "VLLM_API_KEY"} <= example_variables
    routes = route_file.read(DEPLOY / "routes.toml.example")
    assert routes.keys
    assert routes.routes


def test_the_unit_serves_by_keys_behind_a_proxy() -> None:
    service = unit("adapterhub-serve.service")["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[words.index("serve") + 1 :][:2] == ["--base", "${BASE}"]
    check_serve([word for word in words[words.index("serve") + 1 :] if word != "$OPTIONS"])
    assert words[2] == f"/var/lib/{service['StateDirectory']}"
    assert service["Environment"] == f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}"
    assert int(service["TimeoutStopSec"]) > _DRAIN
    assert (service["UMask"], service["DynamicUser"]) == ("0077", "yes")


def test_the_chart_of_a_gateway_leads_to_its_vllm() -> None:
    names = ("gateway", "gateway-service", "vllm", "vllm-service", "ingress")
    gateway, service, vllm, vllm_service, ingress = (rendered(SERVE_CHART / "templates" / f"{n}.yaml") for n in names)
    (serves,), (engine,) = (deployment["spec"]["template"]["spec"]["containers"] for deployment in (gateway, vllm))
    gateway_options = check_serve(serves["args"][1:])
    assert gateway_options["urls"] == (f"http://{vllm_service['metadata']['name']}:{vllm_service['spec']['ports'][0]['port']}",)
    assert gateway_options["base"] == f"hf://{engine['args'][0]}"
    variables = {variable["name"]: variable["value"] for variable in engine["env"]}
    check_vllm(engine["args"], variables)
    assert (variables[environment.REMOTE], variables[vllm_settings.ALLOW]) == (
        gateway_options["remote"],
        *gateway_options["sources"],
    )
    for deployment, its_service in ((gateway, service), (vllm, vllm_service)):
        pod = deployment["spec"]["template"]
        selector = its_service["spec"]["selector"]
        assert selector == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    probes = {name: serves[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
    assert gateway["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > _DRAIN
    (rule,) = ingress["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == service["metadata"]["name"]
    for name in (environment.ENGINE_KEY, "VLLM_API_KEY"):
        assert name in (SERVE_CHART / "values.yaml").read_text()


def test_kserve_starts_a_vllm_with_the_plugin_that_the_gateway_can_ask() -> None:
    service = parsed((DEPLOY / "kserve.yaml").read_text())
    pod = service["spec"]["template"]
    (container,) = pod["containers"]
    assert (service["kind"], container["name"]) == ("LLMInferenceService", "main")
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    check_vllm([service["spec"]["model"]["name"], *container["args"]], variables)
    check_url(variables[environment.REMOTE])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_ray_loads_ranks_that_vllm_takes_from_a_bucket() -> None:
    (application,) = parsed((DEPLOY / "ray-serve.yaml").read_text())["applications"]
    (model,) = application["args"]["llm_configs"]
    engine = model["engine_kwargs"]
    assert (engine["enable_lora"], engine["max_lora_rank"] in runtime_commands.VLLM_RANKS) == (True, True)
    assert model["lora_config"]["dynamic_lora_loading_path"].startswith("s3://")
    assert ":" not in model["model_loading_config"]["model_id"]


def unit(name: str) -> configparser.ConfigParser:
    """A unit of systemd."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / name)
    return parser


def test_the_unit_starts_a_hub_that_only_it_can_read() -> None:
    service = unit("adapterhub-hub.service")["Service"]
    assert environment.OIDC_SECRET in (DEPLOY / "adapterhub-hub.service").read_text()
    words = shlex.split(service["ExecStart"])
    check_start(words[words.index("start") + 1 :])
    assert words[2] == f"/var/lib/{service['StateDirectory']}"
    assert (service["UMask"], service["DynamicUser"]) == ("0077", "yes")


def test_the_timer_collects_what_the_unit_serves_as_the_same_user() -> None:
    served, collects = (unit(name)["Service"] for name in ("adapterhub-hub.service", "adapterhub-hub-gc.service"))
    check_gc(shlex.split(collects["ExecStart"]))
    for key in ("User", "DynamicUser", "StateDirectory", "EnvironmentFile", "UMask"):
        assert collects[key] == served[key]
    assert unit("adapterhub-hub-gc.timer")["Timer"]["OnCalendar"] == "daily"


def test_the_chart_collects_from_what_its_hubs_share() -> None:
    job, deployment, copies = (rendered(CHART / "templates" / f"{n}.yaml") for n in ("gc", "deployment", "gc-copies"))
    pod = job["spec"]["jobTemplate"]["spec"]["template"]
    (collects,), (serves,) = pod["spec"]["containers"], deployment["spec"]["template"]["spec"]["containers"]
    check_gc(collects["args"])
    assert (collects["image"], collects["envFrom"]) == (serves["image"], serves["envFrom"])
    assert not deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == copies["metadata"]["name"]
    assert environment.OIDC_SECRET in (CHART / "values.yaml").read_text()


def test_the_templates_of_the_chart_are_of_one_hub() -> None:
    deployment, service, ingress = (rendered(CHART / "templates" / f"{n}.yaml") for n in ("deployment", "service", "ingress"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert check_start(container["args"][2:])["url"] == "https://hub.example"
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (rule,) = ingress["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == service["metadata"]["name"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert parsed((CHART / "Chart.yaml").read_text())["name"] == "adapterhub"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("helm", ["template", "team", str(CHART)]),
        ("helm", ["template", "team", str(SERVE_CHART)]),
        ("hadolint", [str(DEPLOY / "Dockerfile")]),
        (
            "systemd-analyze",
            ["verify", "--recursive-errors=no", *(str(path) for path in sorted(DEPLOY.glob("adapterhub-*")))],
        ),
    ],
)
def test_the_programs_themselves_read_them(program: str, words: list[str]) -> None:
    result = subprocess.run([need_program(program), *words], check=False, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if "is not executable" not in line]  # adapterhub is not in /usr/local
    lines += result.stdout.splitlines() if program == "hadolint" else []
    assert lines == []


def test_docker_compose_reads_its_file_once_it_has_what_the_file_asks_for(tmp_path: Path) -> None:
    program = need_program("docker-compose")
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copy(DEPLOY / "hub.env.example", tmp_path / "deploy" / "hub.env")

    def config(**variables: str) -> subprocess.CompletedProcess[str]:
        words = [program, "-f", str(tmp_path / "deploy" / "compose.yaml"), "config", "--format", "json"]
        return subprocess.run(words, check=False, capture_output=True, text=True, env={**os.environ, **variables})

    assert "POSTGRES_PASSWORD is missing" in config(HUB_HOST="hub.example").stderr
    assert "HUB_HOST is missing" in config(POSTGRES_PASSWORD="secret").stderr
    result = config(POSTGRES_PASSWORD="secret", HUB_HOST="hub.example")
    assert result.stderr == ""
    services = json.loads(result.stdout)["services"]
    assert {"hub-1", "hub-2", "gc", "proxy", "database"} <= services.keys()
    for name in ("hub-1", "hub-2", "gc"):
        assert services[name]["environment"]["ADAPTERHUB_DATABASE"] == "postgresql://hub:secret@database/hub"
        assert services[name]["environment"]["ADAPTERHUB_BLOBS"].startswith("s3://")


def test_docker_compose_reads_that_of_the_gateway_too(tmp_path: Path) -> None:
    program = need_program("docker-compose")
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copy(DEPLOY / "serve.env.example", tmp_path / "deploy" / "serve.env")
    words = [program, "-f", str(tmp_path / "deploy" / "compose.serve.yaml"), "config", "--format", "json"]
    gateway_env = {**os.environ, "BASE": "/models/base", "GATEWAY_HOST": "llm.example"}
    missing = subprocess.run(words, check=False, capture_output=True, text=True, env={**gateway_env, "BASE": ""})
    assert "BASE is missing" in missing.stderr
    result = subprocess.run(words, check=False, capture_output=True, text=True, env=gateway_env)
    assert result.stderr == ""
    services = json.loads(result.stdout)["services"]
    assert check_serve(services["gateway"]["command"][1:])["remote"] == "hf://"
    assert services["vllm"]["environment"][environment.REMOTE] == "hf://"
