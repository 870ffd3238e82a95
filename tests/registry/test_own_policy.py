"""The policy of a registry, an adapterhub.toml in its folder, is asked on every way in and out, and so is that of a project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.manifest.measurement import Evaluation
from adapterhub.project import PROJECT
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log
from adapterhub.registry.registry import Registry
from adapterhub.serve.resolving import resolve
from adapterhub_converters.errors import RefusedError
from tests.conftest import Run
from tests.registry.test_packaging import put_elsewhere
from tests.support.adapters import write_adapter

IN = {
    "push": ["push", "./bad", "team/in"],
    "push, converted": ["push", "./bad", "team/in", "--to", "mlx"],
    "copy a folder": ["copy", "./bad", "team/in"],
    "copy a version": ["copy", "team/forced", "team/in"],
    "copy from an address": ["copy", "oci:elsewhere:v1", "team/in"],
    "merge": ["merge", "./bad", "./bad", "-o", "team/in:merged"],
}
OUT = {
    "pull": ["pull", "team/forced", "-o", "out"],
    "pull, converted": ["pull", "team/forced", "--to", "mlx", "-o", "out"],
    "copy": ["copy", "team/forced", "./out"],
    "copy to an address": ["copy", "team/forced", "layout://out:v1"],
    "push to an address": ["push", "team/forced", "layout://out:v1"],
    "bundle": ["bundle", "team/forced", "-o", "out"],
    "resolve": ["resolve", "team/forced", "--for", "peft"],
}
FUNCTIONS: dict[str, Callable[[ah.Workspace], object]] = {
    "push": lambda workspace: ah.push("./bad", "team/in", workspace=workspace),
    "pull": lambda workspace: ah.pull("team/forced", "out", workspace=workspace),
    "resolve": lambda workspace: resolve("team/forced", runtime="peft", workspace=workspace),
    "a registry's push": lambda _: ah.Registry("store").push("./bad", "team/in"),
    "the inner registry's push": lambda _: Registry.open(Path("store")).push(Path("bad"), Ref("team/in")),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder without a project, next to a registry with a version that its policy forbids by now."""
    folder = write_adapter(tmp_path / "bad")
    put_elsewhere(folder, tmp_path / "elsewhere")
    with Registry.init(tmp_path / "store") as registry:
        registry.push(folder, Ref("team/forced"))
    (tmp_path / "store" / PROJECT).write_text("[policy]\nmax_rank = 1\n")
    return tmp_path


def versions(place: Path) -> list[str]:
    with Registry.open(place / "store") as registry:
        return [str(row.ref) for row in registry.list()]


@pytest.mark.parametrize("policy_owner", ["registry", "project"])
@pytest.mark.parametrize("way", [*IN, *OUT])
def test_every_way_in_and_out_is_refused_by_rule_and_file(way: str, policy_owner: str, place: Path, run: Run) -> None:
    file = place / "store" / PROJECT
    if policy_owner == "project":
        file = file.rename(place / PROJECT)
    result = run(*{**IN, **OUT}[way], "--registry", "store", "--json", code=6)
    error, rank = json.loads(result.stdout)["error"]["what"], 4 if way == "merge" else 2
    assert error == f"against the policy of {file}: max_rank: rank {rank} is over 1"
    assert versions(place) == ["team/forced:v1"]
    assert not (place / "out").exists()


@pytest.mark.parametrize("way", FUNCTIONS)
def test_every_function_is_refused_alike(way: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(RefusedError, match="max_rank: rank 2 is over 1"):
        FUNCTIONS[way](ah.Workspace(registry="store", policy=None, cache="cache"))
    assert versions(place) == ["team/forced:v1"]
    assert not (place / "out").exists()


def test_names_are_those_that_the_registry_allows(place: Path, run: Run) -> None:
    (place / "store" / PROJECT).write_text('[policy]\nallow = ["free/*"]\n')
    for words in (IN["push"], IN["copy a folder"], IN["copy from an address"], OUT["pull"], OUT["bundle"]):
        assert "not a name that" in run(*words, "--registry", "store", code=6).stderr, words
    run("push", "./bad", "free/in", "--registry", "store")


def test_both_policies_must_be_met(place: Path, run: Run) -> None:
    (place / "store" / PROJECT).write_text("[policy]\nmax_rank = 8\n")
    (place / PROJECT).write_text("[policy]\nrequire_base = true\n")
    assert f"{place / PROJECT}: require_base" in run(*OUT["pull"], "--registry", "store", code=6).stderr
    (place / PROJECT).write_text('[policy]\nlicenses = ["MIT"]\nmax_rank = 2\n')
    assert "licenses: its license is not declared, not MIT" in run(*OUT["pull"], "--registry", "store", code=6).stderr


def test_a_mistake_in_the_file_is_named_and_lets_nothing_through(place: Path, run: Run) -> None:
    (place / "store" / PROJECT).write_text("[policy]\nmax_rnak = 1\n")
    for words in (IN["push"], OUT["pull"]):
        assert "adapterhub.toml:2: 'policy.max_rnak' is unknown" in run(*words, "--registry", "store", code=2).stderr


def test_a_metric_is_recorded_by_who_measured_it(place: Path, run: Run) -> None:
    at, words = ("--registry", "store"), ("push", "./bad", "team/in", "--metric", "bleu=31")
    (place / "store" / PROJECT).write_text('[policy.metrics]\nreported_bleu = { min = 31, recorders = ["lm-eval 0.4"] }\n')
    assert "metrics.reported_bleu: was recorded by owner, not lm-eval 0.4" in run(*words, *at, code=6).stderr
    (place / "store" / PROJECT).unlink()
    run(*words, *at)
    with Registry.open(place / "store") as registry:
        measured = Evaluation("sql", {"loss": 0.5}, base={"tool": "lm-eval", "version": "0.4"})
        measurement_log.record(registry, Ref("team/in", number=1), measured)
    for metric, recorder in (("reported_bleu", "owner"), ("sql_loss", "lm-eval 0.4")):
        for allowed, code in ((recorder, 0), ("trainer", 6)):
            rule = f'{metric} = {{ min = 0, recorders = ["{allowed}"] }}'
            (place / "store" / PROJECT).write_text(f"[policy.metrics]\n{rule}\n")
            refused = run("pull", "team/in", "-o", f"{metric}-{code}", *at, code=code).stderr
            assert code == 0 or f"metrics.{metric}: was recorded by {recorder}, not trainer" in refused


def test_metrics_are_those_of_the_push_and_of_the_registry_under_any_name(place: Path, run: Run) -> None:
    (place / "store" / PROJECT).write_text("[policy.metrics]\nreported_bleu = { min = 31 }\n")
    at = ("--registry", "store")
    assert "metrics.reported_bleu: was not measured" in run("push", "./bad", "team/in", *at, code=6).stderr
    assert "30 is below 31" in run("push", "./bad", "team/in", "--metric", "bleu=30", *at, code=6).stderr
    run("push", "./bad", "team/in", "--metric", "bleu=31", *at)
    run("copy", "team/in", "prod/in", *at)
    run("pull", "prod/in", "-o", "out", *at)
    run("pull", "team/in", "-o", "mlx", "--to", "mlx", *at)
    run("push", "team/in", "layout://there:v1", *at)
    assert "was not measured" in run("copy", "layout://there:v1", "free/in", *at, code=6).stderr
