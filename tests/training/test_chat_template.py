"""The chat template of a training: its date, the same for all conversations and recorded, and one of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training as train
from adapterhub.evaluation import EvaluationOptions, evaluate
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.prompts import chat_template
from adapterhub.training import config_file, trainer
from adapterhub.training.data import dataset
from adapterhub.training.data.examples import encode
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from tests.support.byte_tokenizer import TEMPLATE
from tests.training.test_trainer import contents, settings

CLOCK = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE


@pytest.fixture
def dated(tmp_path: Path, tiny_base: Path) -> Path:
    """A config whose base writes the date into conversations, as Llama 3.2 and gpt-oss do."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": CLOCK}))
    path = settings(tmp_path, base, save_every=2)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    return path


def test_a_date_in_the_chat_template_is_that_of_the_first_day(
    dated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_today", lambda: "2026-01-31")
    events: list[object] = []
    train.run(train.read_config(dated), tmp_path / "first", on_event=events.append)
    (ready,) = [event for event in events if isinstance(event, train.Ready)]
    assert (
        "the chat template writes a date: 2026-01-31, in all conversations and in the record; [data] date sets it"
        in ready.notes
    )
    manifest = AdapterManifest.read(tmp_path / "first")
    assert manifest is not None
    assert manifest.training is not None
    assert (manifest.training.config or {})["data"]["date"] == "2026-01-31"

    def stop(event: object) -> None:
        if isinstance(event, train.StepEvent) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(train.read_config(dated), tmp_path / "stopped", on_event=stop)
    monkeypatch.setattr(trainer, "_today", lambda: "2026-02-01")
    train.run(train.read_config(dated), tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "first")
    train.run(train.read_config(dated, ["data.date=2026-01-31"]), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    train.run(train.read_config(dated), tmp_path / "later")
    weights = "adapter_model.safetensors"
    assert contents(tmp_path / "later")[weights] != contents(tmp_path / "first")[weights]
    initial = train.InitialAdapter(
        tmp_path / "first", tmp_path / "first", oci_manifest.build(tmp_path / "first").digest, "./first"
    )
    measured = evaluate(initial, tmp_path / "base", [tmp_path / "heldout.jsonl"], EvaluationOptions(threads=1))
    assert measured.loss == (manifest.training.metrics or {})["heldout_loss"]


def test_what_is_no_date_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[data\] date: is not a date. Write it like 2026-11-26"):
        config_file.parse('[base]\npath = "m"\n[data]\ntrain = "t"\ndate = "soon"\n', folder=Path(), location="c.toml")


@pytest.fixture
def plain_base(tmp_path: Path, tiny_base: Path) -> Path:
    """A base that was not trained on conversations: it has no chat template."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return base


@pytest.fixture
def chats(tmp_path: Path, plain_base: Path) -> Path:
    """A config with conversations for it."""
    path = settings(tmp_path, plain_base)
    for name in ("train", "heldout"):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": name[0]}]
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    return path


def test_conversations_for_a_base_without_a_template_are_refused_with_the_way_out(chats: Path, tmp_path: Path) -> None:
    way_out = r'train.jsonl:1: is a conversation, and the base has no chat template. Set \[data\] chat_template = "plain"'
    with pytest.raises(RefusedError, match=way_out):
        train.run(train.read_config(chats), tmp_path / "out")
    with pytest.raises(NotFoundError, match=r"\[data\] chat_template: no file 'chatlm'. The names are chatml, plain"):
        train.run(train.read_config(chats, ["data.chat_template=chatlm"]), tmp_path / "out")


def test_a_template_of_ones_own_is_kept_in_the_adapter_and_used_by_eval(chats: Path, tmp_path: Path) -> None:
    own_template = "{{ mood }} " + TEMPLATE
    (tmp_path / "own.jinja").write_text(own_template)
    changes = ["data.chat_template=own.jinja", 'data.template_options={mood = "calm"}']
    train.run(train.read_config(chats, changes), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own_template
    manifest = AdapterManifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.training is not None
    assert "chat_template.jinja" in {file.path for file in manifest.files}
    digest = oci_manifest.build(tmp_path / "out").digest
    initial = train.InitialAdapter(tmp_path / "out", tmp_path / "out", digest, "./out")
    measured = evaluate(initial, tmp_path / "base", [tmp_path / "heldout.jsonl"], EvaluationOptions(threads=1))
    assert measured.loss == (manifest.training.metrics or {})["heldout_loss"]


def test_another_prompt_than_that_of_the_adapter_to_start_from_is_noted(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ mood }} " + CLOCK)
    own_options = [
        "data.chat_template=own.jinja",
        'data.template_options={mood = "calm"}',
        "data.date=2026-01-31",
        "train.steps=1",
    ]
    train.run(train.read_config(chats, own_options), tmp_path / "first")
    digest = oci_manifest.build(tmp_path / "first").digest
    start = train.InitialAdapter(tmp_path / "first", tmp_path / "first", digest, "./first")

    def notes(name: str, changes: list[str]) -> list[str]:
        events: list[train.Event] = []
        train.run(train.read_config(chats, changes), tmp_path / name, start=start, on_event=events.append)
        ready = next(event for event in events if isinstance(event, train.Ready))
        return [note for note in ready.notes if "was trained with" in note]

    assert notes("same", own_options) == []
    result = "; the result is asked as [data] sets it"
    assert notes("later", [*own_options, "data.date=2026-02-01"]) == [f"./first was trained with the date 2026-01-31{result}"]
    assert notes("plain", ["data.chat_template=plain", "train.steps=1"]) == [
        f"./first was trained with another chat template and other options of the template{result}"
    ]


def with_template(name: str) -> train.TrainConfig:
    """A config with a template by its name."""
    text = f'[base]\npath = "m"\n[data]\ntrain = "t"\nchat_template = "{name}"\n'
    return config_file.parse(text, folder=Path(), location="c.toml")


@pytest.mark.parametrize(("name", "answer"), [("chatml", "a<|im_end|>\n"), ("plain", " a<|im_end|>")])
def test_templates_by_name(name: str, answer: str, plain_base: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_base)
    chat_template.apply(tokenizer, dataset.configured_prompt(with_template(name), tokenizer))
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    example = encode({"messages": turns}, tokenizer, loss="completion", location="")
    assert tokenizer.decode(example.ids[example.trained]).startswith(answer)


def test_chatml_needs_a_tokenizer_with_its_marks(plain_base: Path) -> None:
    transformers = pytest.importorskip("transformers")
    core = (plain_base / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>")
    (plain_base / "tokenizer.json").write_text(core)
    config = (plain_base / "tokenizer_config.json").read_text().replace("<|im_end|>", "<|other|>")
    (plain_base / "tokenizer_config.json").write_text(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_base)
    with pytest.raises(RefusedError, match=r'no token <\|im_end\|>, with which chatml ends what somebody says. Set "plain"'):
        dataset.configured_prompt(with_template("chatml"), tokenizer)


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "strftime_now", "chat_template"])
def test_an_option_that_a_conversation_sets_is_refused(name: str) -> None:
    """It would count neither in the training nor when the adapter is asked."""
    text = f'[base]\npath = "m"\n[data]\ntrain = "t"\ntemplate_options = {{ {name} = "x" }}\n'
    config = config_file.parse(text, folder=Path(), location="c.toml")
    with pytest.raises(RefusedError, match=rf"c.toml: \[data\] template_options: `{name}` is set by each conversation"):
        dataset.configured_prompt(config, None)
