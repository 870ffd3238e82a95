"""What a client sends to a hub as a measurement is its account's claim, however it arrives and whatever tool it names."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.manifest import derive
from adapterhub.operations.workspace import Workspace
from adapterhub.project import settings_file
from adapterhub.ref import Ref
from adapterhub.registry import version_facts
from tests.conftest import Run
from tests.hub.conftest import Running, serving
from tests.hub.sending import Sending
from tests.support.adapters import Make

ROOT = Path(ah.__file__).parent
EVALUATIONS = "/api/adapterhub/v1/names/team/sql/versions/v1/evaluations"


def writers_of_evaluations() -> set[str]:
    """The modules that write evaluations into a log, found in the source."""
    modules = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and (
                ast.unparse(node.func) == "measurement_log.record"
                or (ast.unparse(node.func) == "Entry" and "'evaluate'" in map(ast.unparse, node.args))
            ):
                modules.add(path.relative_to(ROOT).as_posix())
    return modules


def send(hub: Running, *, base: dict[str, Any]) -> None:
    """Post an evaluation, as any writer can."""
    document = {"name": "golden", "metrics": {"pass": 1.0}, "data": [], "base": base}
    answer = Sending(hub.url, hub.token).ask("POST", EVALUATIONS, document)
    assert answer.status == 200, answer.data


def by_request(hub: Running, _run: Run, _folder: Path) -> tuple[str, str]:
    send(hub, base={})
    return "team/sql", "golden_pass"


def by_request_as_a_tool(hub: Running, _run: Run, _folder: Path) -> tuple[str, str]:
    send(hub, base={"tool": "adapterhub"})
    return "team/sql", "golden_pass"


def by_push(hub: Running, run: Run, folder: Path) -> tuple[str, str]:
    address = hub.url.replace("http://", "hub+http://")
    run("push", str(folder), f"{address}/team/sql", "--metric", "pass=1")
    return "team/sql", "reported_pass"


def by_rename(hub: Running, _run: Run, _folder: Path) -> tuple[str, str]:
    send(hub, base={})
    answer = Sending(hub.url, hub.token).ask("POST", "/api/repos/move", {"fromRepo": "team/sql", "toRepo": "team/text"})
    assert answer.status == 200, answer.data
    return "team/text", "golden_pass"


WAYS: dict[str, list[Callable[[Running, Run, Path], tuple[str, str]]]] = {
    "hub/api/release_changes.py": [by_request, by_request_as_a_tool],
    "hub/api/changing.py": [by_push],
    "maintenance/name_moves.py": [by_rename],
}
LOCAL_WAYS = {"registry/measurement_log.py", "operations/evaluation_log.py", "operations/push.py"}
"""These write to a registry in a folder, and anyone who may write there is believed."""


def test_every_module_that_writes_an_evaluation_is_tried() -> None:
    assert writers_of_evaluations() <= WAYS.keys() | LOCAL_WAYS
    assert WAYS.keys() <= writers_of_evaluations()
    assert not any(module.startswith("hub/") for module in LOCAL_WAYS)


@pytest.mark.parametrize("way", [way for ways in WAYS.values() for way in ways])
def test_what_a_client_sends_to_a_hub_is_recorded_by_its_account(
    tmp_path: Path, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch, way: Callable[[Running, Run, Path], tuple[str, str]]
) -> None:
    with serving(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = make("a", 1)
        with hub.registry() as registry:
            registry.push(folder, Ref.parse("team/sql"))
        name, metric = way(hub, run, folder)
        with hub.registry() as registry:
            row = registry.row(Ref(name))
            facts = version_facts.measurements(registry.index, row.digest)
            assert (facts.values[metric], facts.recorder_of(metric)) == (1.0, "account:alice")
            for recorder, is_met in (("adapterhub", False), ("owner", False), ("account:alice", True)):
                rules = f'[policy.metrics]\n{metric} = {{ min = 0.5, recorders = ["{recorder}"] }}\n'
                policy = settings_file.parse(rules, tmp_path / "adapterhub.toml").policy
                workspace = Workspace(registry=registry.root, policy=policy)
                if is_met:
                    ah.pull(name, tmp_path / "out", workspace=workspace)
                else:
                    with pytest.raises(ah.RefusedError, match=f"was recorded by account:alice, not {recorder}"):
                        ah.pull(name, tmp_path / "out", workspace=workspace)


def test_a_result_in_adapter_json_is_its_owners_and_one_of_the_log_is_its_accounts(
    tmp_path: Path, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = '[policy.evaluations.pass]\nmin = 0.5\nrecorders = ["account:ci"]\n'
    policy = settings_file.parse(rules, tmp_path / "adapterhub.toml").policy
    with serving(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = make("a", 1)
        derive.describe(folder).write(folder)
        document = json.loads((folder / "adapter.json").read_text())
        document["evaluations"] = [{"metric": "pass", "value": 1.0, "recorder": "account:ci"}]
        (folder / "adapter.json").write_text(json.dumps(document))
        run("push", folder, f"{hub.url.replace('http://', 'hub+http://')}/team/sql")
        with hub.registry() as registry:
            workspace = Workspace(registry=registry.root, policy=policy)
            for rate, problem in (("", "was recorded by owner"), (0.4, "0.4 is below 0.5"), (0.9, "")):
                if rate:
                    body = {"name": "golden", "metrics": {"pass": rate}, "data": [], "base": {}}
                    answer = Sending(hub.url, hub.make_token("ci", "write")).ask("POST", EVALUATIONS, body)
                    assert answer.status == 200
                if problem:
                    with pytest.raises(ah.RefusedError, match=problem):
                        ah.pull("team/sql", tmp_path / "out", workspace=workspace)
            ah.pull("team/sql", tmp_path / "out", workspace=workspace)


def test_a_metric_is_recorded_by_the_account_whose_value_it_is(tmp_path: Path, make: Make) -> None:
    """Two evaluations of other names may have a metric of one name, as a search calls it."""
    with serving(tmp_path / "hub") as hub:
        with hub.registry() as registry:
            registry.push(make("a", 1), Ref.parse("team/sql"))
        for account, name, metric, rate in (("ci", "sql", "x_pass", 0.2), ("mallory", "sql_x", "pass", 1.0)):
            body = {"name": name, "metrics": {metric: rate}, "data": [], "base": {}}
            assert Sending(hub.url, hub.make_token(account, "write")).ask("POST", EVALUATIONS, body).status == 200
        with hub.registry() as registry:
            facts = version_facts.measurements(registry.index, registry.row(Ref.parse("team/sql")).digest)
            assert (facts.values["sql_x_pass"], facts.recorder_of("sql_x_pass")) == (1.0, "account:mallory")
