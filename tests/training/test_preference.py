"""Preferences: the papers' losses, pairs that stay together, a reference that is the base, and what a training records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub.manifest.document import AdapterManifest  # noqa: E402
from adapterhub.training import config_file, train_config  # noqa: E402
from adapterhub.training.cost import memory  # noqa: E402
from adapterhub.training.data import dataset, document_files, record_shapes  # noqa: E402
from adapterhub.training.data.example import Example  # noqa: E402
from adapterhub.training.data.examples import encode  # noqa: E402
from adapterhub.training.data.packed_rows import IGNORED  # noqa: E402
from adapterhub.training.layers import lora  # noqa: E402
from adapterhub.training.loop import preference, training_loop  # noqa: E402
from adapterhub.training.loop.loss import logprobs  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub_converters.bases import read_base  # noqa: E402
from adapterhub_converters.errors import FormatError, RefusedError, UsageError  # noqa: E402
from tests.training.conftest import packed_rows  # noqa: E402
from tests.training.test_kinds import STEPS, loaded, whole  # noqa: E402

ROWS, MAX_LENGTH = 4, 96
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"{number}?"}],
        "chosen": [{"role": "assistant", "content": "ab" * (1 + number % 5)}],
        "rejected": [{"role": "assistant", "content": "ba" * (1 + number % 3)}],
    }
    for number in range(8)
]
DPO = train_config.PreferenceConfig("dpo", beta=0.5)


def examples(pairs: list[dict[str, Any]], tokenizer: Any) -> list[Example]:
    split_pairs = [record_shapes.pair(pair, "") for pair in pairs]
    return [
        encode(pair[side], tokenizer, loss="completion", location="") for pair in split_pairs for side in record_shapes.SIDES
    ]


def our_losses(
    loaded: Any, settings: train_config.TrainConfig, chosen: train_config.PreferenceConfig, *, packed: bool = False
) -> list[float]:
    rows = packed_rows(examples(PAIRS, loaded.tokenizer), 2 * MAX_LENGTH, pack_rows=packed, pairs=True)
    state = new_state(loaded.model, settings.train)
    return [training_loop.advance(loaded, rows, state, settings.train, STEPS, preference=chosen)["loss"] for _ in range(STEPS)]


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo"])
def test_packed_pairs_learn_what_padded_ones_do(method: Any, tiny_base: Path) -> None:
    """All pairs in a step, in few rows or in one each."""
    chosen = train_config.PreferenceConfig(method)
    runs = []
    for packed in (True, False):
        settings = whole(tiny_base)
        loaded_model = loaded(settings)
        rows = packed_rows(examples(PAIRS, loaded_model.tokenizer), 2 * MAX_LENGTH, pack_rows=packed, pairs=True)
        assert preference.pair_count(rows) == len(PAIRS)
        assert (len(rows) < len(PAIRS)) == packed
        options = replace(settings.train, rows=len(rows), micro_rows=None if packed else 2)
        state = new_state(loaded_model.model, options)
        runs.append([training_loop.advance(loaded_model, rows, state, options, 6, preference=chosen)["loss"] for _ in range(6)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][-1] < runs[0][0]


def test_the_losses_are_those_of_the_papers() -> None:
    sums = preference.Sums(torch.tensor([[-3.0, -8.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[-5.0, -7.0]]))
    sigmoid = 1 / (1 + np.exp(-0.1 * (2 - -1)))
    assert [float(value) for value in preference.dpo(sums, 0.1, 0)] == pytest.approx([-np.log(sigmoid), 0.3])
    odds = np.log(np.exp(-1) / (1 - np.exp(-1))) - np.log(np.exp(-2) / (1 - np.exp(-2)))
    assert [float(value) for value in preference.orpo(sums, 0.1, 0)] == pytest.approx(
        [1 - 0.1 * np.log(1 / (1 + np.exp(-odds))), odds]
    )
    assert [float(value) for value in preference.simpo(sums, 2.0, 1.0)] == pytest.approx([np.log(1 + np.exp(-(2 - 1))), 2.0])
    certain = preference.Sums(torch.zeros(1, 2), torch.ones(1, 2))
    assert all(bool(torch.isfinite(value).all()) for value in preference.orpo(certain, 0.1, 0))


def test_the_reference_is_the_base_whatever_was_learned(tiny_base: Path) -> None:
    settings = whole(tiny_base, dropout=0.5)
    loaded_model = loaded(settings)
    rows = packed_rows(examples(PAIRS, loaded_model.tokenizer), MAX_LENGTH, pairs=True)
    with lora.without_delta(loaded_model.model):
        before = logprobs(loaded_model, rows)
    state = new_state(loaded_model.model, settings.train)
    for _ in range(3):
        training_loop.advance(loaded_model, rows, state, settings.train, 3, preference=DPO)
    with lora.without_delta(loaded_model.model):
        assert torch.equal(logprobs(loaded_model, rows), before)
    assert not torch.equal(logprobs(loaded_model, rows), before)
    assert loaded_model.model.training


# ---- data

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    ("record", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a"), ("q", "b")),
        ({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}, ("Human: q Assistant:", " a"), (..., " b")),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, ([Q], [A]), ([Q], [B])),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, ([Q], [A]), ([Q], [B])),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}, ([Q, A, Q], [A]), ([Q, A, Q], [B])),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, ([Q], [A]), ([Q], [B])),
    ],
)
def test_pairs_in_the_shapes_that_people_have(record: Any, chosen: Any, rejected: Any) -> None:
    split_pair = record_shapes.pair(record, "")
    for side, (prompt, completion) in zip(("chosen", "rejected"), (chosen, rejected), strict=True):
        assert split_pair[side]["completion"] == completion
        assert prompt is ... or split_pair[side]["prompt"] == prompt


def test_questions_with_two_answers_are_pairs_too() -> None:
    split_pair = record_shapes.pair({"question": "q", "chosen": "a", "rejected": "b", "system": "s"}, "")
    assert split_pair["chosen"] == {"instruction": "q", "output": "a", "system": "s"}
    assert split_pair["rejected"] == {"instruction": "q", "output": "b", "system": "s"}
    with pytest.raises(FormatError, match='has no "chosen" and "rejected"'):
        record_shapes.pair({"prompt": "q", "completion": "a"}, "x:1")


def test_a_side_is_cut_at_half_a_row_and_a_pair_without_an_answer_left_out(tokenizer: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": "q", "chosen": "a" * 40, "rejected": "b"}, {"prompt": "q" * 40, "chosen": "a", "rejected": "b"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    file = document_files.read(path, document_files.Options(pairs=True))
    built = dataset.build([file], tokenizer, sequence=48, loss="completion", seed=0, pairs=True)
    assert preference.pair_count(built.rows) == 1
    assert (built.documents, built.truncated) == (2, 3)
    assert "1 of 2 pairs are left out: their answers come after token 24" in built.notes
    assert built.rows.label_tokens == 23 + 2
    assert (built.rows.labels[0, :23] != IGNORED).all()


# ---- a training

TOML = """
[base]
path = {base}
[data]
train = "pairs.jsonl"
heldout = "other.jsonl"
sequence = 96
[train]
steps = 12
rows = 2
learning_rate = 0.01
threads = 1
evaluate_every = 4
[preference]
method = "{method}"
"""


def write_config(folder: Path, base: Path, method: str) -> Path:
    for name, numbers in (("pairs", range(40)), ("other", range(40, 48))):
        lines = [{"prompt": f"{n}", "chosen": "yes" * (1 + n % 2), "rejected": "no" * (1 + n % 3)} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "c.toml").write_text(TOML.format(base=json.dumps(str(base)), method=method))
    return folder / "c.toml"


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo"])
def test_a_training_prefers_the_chosen_answers_and_records_it(method: str, tmp_path: Path, tiny_base: Path) -> None:
    read = training.read_config(write_config(tmp_path, tiny_base, method))
    preview = training.preview(read)
    assert [file.contents for file in preview.data.files] == ["preference pairs, 40 examples", "preference pairs, 8 examples"]
    assert preview.data.count is not None
    events: list[Any] = []
    result = training.run(read, tmp_path / "out", on_event=events.append)
    assert result.accuracy_before is not None
    assert result.accuracy_after == 1.0 > result.accuracy_before - 1e-9
    assert result.perplexity_after is None
    evaluated = [event for event in events if isinstance(event, training.EvaluationEvent)]
    assert [event.step for event in evaluated] == [0, 4, 8, 12]
    assert evaluated[-1].margin > evaluated[0].margin
    manifest = AdapterManifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.training is not None
    assert (manifest.training.config or {})["preference"]["method"] == method
    assert (manifest.training.metrics or {})["heldout_accuracy"] == 1.0
    card = (tmp_path / "out/README.md").read_text()
    assert "| held-out pairs preferred |" in card


def test_an_adapter_is_trained_further_on_preferences(tmp_path: Path, tiny_base: Path) -> None:
    """Where the base is no reference; the second training begins where the first one ended."""
    read = training.read_config(write_config(tmp_path, tiny_base, "orpo"), ["train.steps=2", "lora.dora=true"])
    first = training.run(read, tmp_path / "first")
    start = training.InitialAdapter(tmp_path / "first", tmp_path / "first", f"sha256:{'0' * 64}", "x")
    second = training.run(read, tmp_path / "second", start=start)
    before, after = (
        json.loads((folder / "adapter.json").read_text())["training"]["metrics"] for folder in (first.folder, second.folder)
    )
    assert after["heldout_loss_before"] == before["heldout_loss"]
    assert after["heldout_loss"] < before["heldout_loss"]


def test_the_reference_is_one_more_forward_pass(tmp_path: Path, tiny_base: Path) -> None:
    spec = read_base(tiny_base)
    counts: dict[str, Any] = {"tokens": 10, "label_tokens": 3, "trained": 7, "context": 5.0}
    without, with_reference = (
        memory.flops(training.read_config(write_config(tmp_path, tiny_base, method)), spec, **counts)
        for method in ("orpo", "dpo")
    )
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert with_reference - without == 10 * (2 * 2 * layer + 4 * 2 * 64 * 5) + 3 * 2 * 259 * 64


def test_what_cannot_go_with_a_preference_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    path = write_config(tmp_path, tiny_base, "dpo")
    for change, message in (
        ("lora.dora=true", "cannot be combined with dpo"), ("lora.init=pissa", "cannot be combined with dpo"),
        ("data.loss=all", "cannot be combined with a preference"), ("preference.beta=0", "too small"),
        ("preference.method=ppo", "is not one of none, dpo, orpo, simpo"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            config_file.read(path, [change])
    start = training.InitialAdapter(tmp_path, tmp_path, "", "x")
    with pytest.raises(RefusedError, match="compares with the base alone"):
        training.run(training.read_config(path), tmp_path / "out", start=start)
