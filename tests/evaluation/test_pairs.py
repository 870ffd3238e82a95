"""Of preference pairs an evaluation tells what the training told: how many are preferred, and by how much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import evaluation, training  # noqa: E402
from adapterhub.evaluation import pairs  # noqa: E402
from adapterhub.manifest import oci_manifest  # noqa: E402
from adapterhub.manifest.document import AdapterManifest  # noqa: E402
from adapterhub.registry.releases.metric_gates import parse_gate  # noqa: E402
from adapterhub.training.train_config import PreferenceConfig  # noqa: E402
from adapterhub_converters.errors import UsageError  # noqa: E402
from tests.training.test_preference import write_config  # noqa: E402


def evaluate(folder: Path, base: Path, *names: str, **options: object) -> evaluation.EvaluationResult:
    adapter = training.InitialAdapter(folder / "out", folder / "out", oci_manifest.build(folder / "out").digest, "./out")
    files = [folder / name for name in names]
    return evaluation.evaluate(adapter, base, files, evaluation.EvaluationOptions(threads=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_pairs_are_compared_as_the_training_compared_them(method: str, tmp_path: Path, tiny_base: Path) -> None:
    path = write_config(tmp_path, tiny_base, method)
    training.run(training.read_config(path, ["train.steps=3", "preference.beta=0.5"]), tmp_path / "out")
    manifest = AdapterManifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.training is not None
    recorded = manifest.training.metrics or {}
    measured = evaluate(tmp_path, tiny_base, "other.jsonl")
    assert measured.pairs is not None
    assert (measured.pairs.method, measured.pairs.beta, measured.pairs.count) == (method, 0.5, 8)
    metrics = measured.metrics
    assert metrics["accuracy"] == recorded["heldout_accuracy"]
    assert metrics["margin"] == pytest.approx(recorded["heldout_margin"], rel=1e-5)
    if method == "simpo":
        assert metrics["base_accuracy"] == recorded["heldout_accuracy_before"]
        assert metrics["base_margin"] == pytest.approx(recorded["heldout_margin_before"], rel=1e-5)
    else:  # which compares with the base
        assert (recorded["heldout_accuracy_before"], "base_accuracy" in metrics) == (0, False)
    assert parse_gate(f"accuracy>={recorded['heldout_accuracy']}", "").passes(metrics)
    assert not parse_gate("margin>1000", "").passes(metrics)
    # The perplexity is that of the chosen sides, as of documents.
    chosen = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": line["prompt"], "completion": line["chosen"]}) + "\n" for line in chosen]
    (tmp_path / "chosen.jsonl").write_text("".join(lines))
    documents = evaluate(tmp_path, tiny_base, "chosen.jsonl")
    assert (documents.perplexity, documents.base_perplexity) == (measured.perplexity, measured.base_perplexity)
    assert documents.pairs is None
    with pytest.raises(UsageError, match="accuracy was not measured.* Evaluate pairs, or bound one of ppl, ") as caught:
        parse_gate("accuracy>0.7", "").passes(documents.metrics)
    assert caught.value.code == "metric-not-measured"
    # Among other documents, or cut before their answers, pairs are documents too.
    assert evaluate(tmp_path, tiny_base, "other.jsonl", "chosen.jsonl").pairs is None
    short = evaluate(tmp_path, tiny_base, "other.jsonl", sequence=4)
    assert short.pairs is None
    assert any(note.startswith("the sides of the pairs are not compared: no token to train on") for note in short.notes)


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({}, PreferenceConfig("dpo")),
        ({"method": "none", "beta": None, "gamma": 1.0}, PreferenceConfig("dpo")),
        ({"method": "simpo", "beta": 2.5, "gamma": 0.5}, PreferenceConfig("simpo", 2.5, 0.5)),
        ({"method": "orpo", "beta": "x", "gamma": None}, PreferenceConfig("orpo")),
        ({"method": ["dpo"]}, PreferenceConfig("dpo")),
    ],
)
def test_the_record_of_a_training_tells_the_method(recorded: dict[str, object], expected: PreferenceConfig) -> None:
    assert pairs.preference_of(recorded) == expected
