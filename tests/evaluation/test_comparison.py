"""An adapter is measured as its training measured it, and refused where the numbers would mean nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import evaluation, training  # noqa: E402
from adapterhub.evaluation.document_losses import DocumentRows, document_rows  # noqa: E402
from adapterhub.manifest import oci_manifest  # noqa: E402
from adapterhub.manifest.document import AdapterManifest  # noqa: E402
from adapterhub.training.data import dataset, document_files  # noqa: E402
from adapterhub.training.train_config import BaseConfig, LoRAConfig  # noqa: E402
from adapterhub_converters.adapter import LowRank  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402
from tests.training.test_trainer import settings  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path):  # type: ignore[no-untyped-def]
    """A trained adapter, as something given, and its folder with the data."""
    folder = tmp_path_factory.mktemp("trained")
    training.run(training.read_config(settings(folder, tiny_base, steps=3)), folder / "out")
    return training.InitialAdapter(folder / "out", folder / "out", oci_manifest.build(folder / "out").digest, "./out"), folder


def test_it_measures_what_the_training_measured(trained, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, folder = trained
    manifest = AdapterManifest.read(folder / "out")
    assert manifest is not None
    assert manifest.training is not None
    recorded = manifest.training.metrics or {}
    measured = evaluation.evaluate(start, tiny_base, [folder / "heldout.jsonl"], evaluation.EvaluationOptions(threads=1))
    assert (measured.base_loss, measured.loss) == (recorded["heldout_loss_before"], recorded["heldout_loss"])
    assert measured.metrics["perplexity"] == recorded["heldout_perplexity"]
    assert measured.metrics["perplexity_ratio"] < 1
    assert (measured.sequence, measured.base["quantize"], measured.notes) == (48, "nf4", ())
    assert measured.base["weights"][0]["digest"] == (manifest.training.weights or ())[0].digest
    again = evaluation.evaluate(start, tiny_base, [folder / "heldout.jsonl"], evaluation.EvaluationOptions(threads=1))
    assert again == measured


def test_the_training_data_is_reported(trained, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, folder = trained
    options = evaluation.EvaluationOptions(quantize="none", tokens=96, threads=1)
    measured = evaluation.evaluate(start, tiny_base, [folder / "train.jsonl"], options)
    assert measured.notes == ("train.jsonl was trained on: its perplexity proves nothing",)
    assert measured.base["quantize"] == "none"
    assert measured.tokens < 96


def test_passages_that_were_trained_on_are_reported(trained, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, folder = trained
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    (tmp_path / "mixed.jsonl").write_text(json.dumps({"text": f"{texts[0]} {' '.join(f'new{word}' for word in range(30))}"}))
    options = evaluation.EvaluationOptions(threads=1, trained_on=(folder / "train.jsonl",))
    (note,) = evaluation.evaluate(start, tiny_base, [tmp_path / "mixed.jsonl"], options).notes
    assert "% of the runs of 8 words in the held-out texts are in the training data too: its perplexity says" in note
    assert evaluation.evaluate(start, tiny_base, [folder / "heldout.jsonl"], options).notes == ()


def test_a_loss_that_is_no_number_is_refused(trained, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, folder = trained
    adapter = peft_format.read(start.path)
    target = next(iter(adapter.deltas))
    delta = adapter.deltas[target]
    assert isinstance(delta, LowRank)
    broken = dataclasses.replace(delta, lora_B=np.full_like(delta.lora_B, np.inf))
    (tmp_path / "x").mkdir()
    peft_format.write(dataclasses.replace(adapter, deltas={**adapter.deltas, target: broken}, source=None), tmp_path / "x")
    with pytest.raises(RefusedError, match="the loss is nan with the adapter"):
        evaluation.evaluate(
            training.InitialAdapter(tmp_path / "x", tmp_path / "x", "", "./x"),
            tiny_base,
            [folder / "heldout.jsonl"],
            evaluation.EvaluationOptions(sequence=48, threads=1),
        )


def with_lora_B_scaled(start: training.InitialAdapter, factor: float, folder: Path) -> training.InitialAdapter:
    adapter = peft_format.read(start.path)
    deltas = {
        target: dataclasses.replace(delta, lora_B=factor * delta.lora_B)
        for target, delta in adapter.deltas.items()
        if isinstance(delta, LowRank)
    }
    folder.mkdir()
    peft_format.write(dataclasses.replace(adapter, deltas=deltas, source=None), folder)
    return training.InitialAdapter(folder, folder, "", f"./{folder.name}")


def test_several_data_sets_are_measured_as_each_alone_and_compared_on_the_same_documents(  # type: ignore[no-untyped-def]
    trained, tmp_path: Path, tiny_base: Path
) -> None:
    start, folder = trained
    sets = [[folder / "heldout.jsonl"], [folder / "train.jsonl"]]
    options = evaluation.EvaluationOptions(sequence=48, threads=1)
    alone = [evaluation.evaluate(start, tiny_base, files, options) for files in sets]
    assert evaluation.evaluate_sets(start, tiny_base, sets, options) == alone
    half_adapter = with_lora_B_scaled(start, 0.5, tmp_path / "half")
    for result, files in zip(
        evaluation.evaluate_sets(start, tiny_base, sets, options, against=half_adapter), sets, strict=True
    ):
        assert result.against is not None
        expected = result.perplexity / evaluation.evaluate(half_adapter, tiny_base, files, options).perplexity
        assert result.against.ratio == pytest.approx(expected, rel=1e-6)
        assert result.metrics["perplexity_against"] == result.against.ratio
        assert result.against.low < result.against.ratio < result.against.high
        assert result.against.documents == sum(len(file.read_text().splitlines()) for file in files)
    _, same = evaluation.evaluate_sets(start, tiny_base, sets, options, against=start)
    assert same.against is not None
    assert (same.against.ratio, same.against.low, same.against.high) == (1.0, 1.0, 1.0)
    for result in evaluation.evaluate_sets(start, tiny_base, sets, options, against_base=True):
        assert result.against is not None
        assert result.against.ratio == pytest.approx(result.metrics["perplexity_ratio"], rel=1e-6)


@pytest.mark.parametrize("tokens", [None, 64])
def test_a_text_that_fills_several_rows_is_one_document(tokens: int | None, tmp_path: Path, tiny_base: Path) -> None:
    texts = ["abcdefgh" * 20, "ijkl" * 5, "mnopq" * 3, "rstuvw" * 12]
    adapted = load_base(tiny_base, BaseConfig(str(tiny_base), quantize="none"), LoRAConfig(r=2))

    def rows_of(texts: list[str]) -> DocumentRows:
        path = tmp_path / f"{len(texts)}-{texts[0][0]}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files = [document_files.read(path)]
        built = dataset.build(files, adapted.tokenizer, sequence=32, loss="all", seed=None)
        return document_rows(built, tokens)

    together = rows_of(texts)
    loss, losses = together.measure(adapted, 2)
    assert losses.sum() == pytest.approx(loss * together.rows.label_tokens, rel=1e-5)
    assert together.tokens.sum() == together.rows.label_tokens
    if tokens is None:
        alone = [rows_of([text]) for text in texts]
        sums = sorted(float(rows.measure(adapted, 2)[1].item()) for rows in alone)
        np.testing.assert_allclose(np.sort(losses), sums, rtol=1e-2)  # the base computes in bfloat16
        assert sorted(together.tokens) == sorted(int(rows.tokens.item()) for rows in alone)
    else:
        assert 1 <= len(losses) <= len(texts)
