"""What a dry run tells of the data: the same numbers as the training, or estimates from a part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.training import config_file
from adapterhub.training.data import dataset, survey
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError


def settings(tmp_path: Path, section_text: str = "") -> TrainConfig:
    text = f'[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nsequence = 32\n{section_text}[train]\nrows = 2\nepochs = 2\n'
    return config_file.parse(text, folder=tmp_path, location="c.toml")


@pytest.mark.parametrize("section_text", ["", "pack = false\n", "heldout_share = 0.3\n"])
def test_the_numbers_are_those_of_the_training(tmp_path: Path, tokenizer: object, section_text: str) -> None:
    records = [{"prompt": "p" * size, "completion": "c" * size} for size in range(1, 40)] + [{"text": "x" * 100}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = settings(tmp_path, section_text)
    data_survey, (train, heldout) = survey.survey(config, tokenizer), dataset.datasets(config, tokenizer)
    assert data_survey.count is not None
    assert (data_survey.documents, data_survey.heldout_documents) == (train.documents, heldout.documents if heldout else 0)
    assert (data_survey.count.tokens, data_survey.count.trained, data_survey.count.rows) == (
        train.tokens,
        train.rows.label_tokens,
        len(train.rows),
    )
    assert data_survey.count.steps == config.steps(len(train.rows))
    assert data_survey.count.steps_per_epoch == -(len(train.rows) // -2)
    assert data_survey.count.share == 1
    assert data_survey.notes == train.notes
    assert any("are left out: their answers come after token 32" in note for note in data_survey.notes)
    assert [file.split for file in data_survey.files] == ["train", *["heldout"] * bool(heldout)]


def test_large_data_are_estimated_from_a_part(tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_MAX_DOCUMENTS", 50)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * (number % 17)}) + "\n" for number in range(1000)))
    data_survey, (train, _) = survey.survey(settings(tmp_path), tokenizer), dataset.datasets(settings(tmp_path), tokenizer)
    assert data_survey.count is not None
    assert data_survey.count.share < 0.06
    assert data_survey.count.tokens == pytest.approx(train.tokens, rel=0.1)
    assert data_survey.count.rows == pytest.approx(len(train.rows), rel=0.1)


def test_of_one_large_text_only_the_beginning_is_encoded(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_MAX_CHARACTERS", 500)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 10_000}))
    count = survey.survey(settings(tmp_path), tokenizer).count
    assert count is not None
    assert count.tokens == pytest.approx(10_000, rel=0.05)


def test_data_are_read_where_nothing_can_count_their_tokens(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        survey.survey(settings(tmp_path), None)
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    data_survey = survey.survey(settings(tmp_path), None)
    assert (data_survey.count, data_survey.documents, data_survey.files[0].contents) == (
        None,
        1,
        "questions with answers, 1 example",
    )


def test_data_that_teach_nothing_are_refused(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(RefusedError, match="no token to train on: there are no documents"):
        survey.survey(settings(tmp_path), tokenizer)


def test_held_out_documents_are_encoded_and_refused_as_in_the_training(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n')
    (tmp_path / "h.jsonl").write_text(json.dumps({"prompt": "p" * 100, "completion": "c"}))
    config = settings(tmp_path, 'heldout = ["h.jsonl"]\n')
    refused: list[str] = []
    for read in (survey.survey, dataset.datasets):
        with pytest.raises(AdapterhubError) as caught:
            read(config, tokenizer)
        refused.append(str(caught.value))
    assert refused[0] == refused[1]
    assert "h.jsonl" in refused[0]
