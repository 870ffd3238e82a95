"""Rows: tokens that are trained on, sequence packing, and data that are refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from adapterhub.training import config_file
from adapterhub.training.data import dataset as data
from adapterhub.training.data import documents
from adapterhub.training.data.examples import encode
from adapterhub_converters.errors import AdapterhubError, FormatError, MissingExtraError, NotFoundError, RefusedError
from tests.conftest import need_module

EOS = 2


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path, tokenizer: object, **options: object) -> data.Dataset:
    return data.build([documents.read(path)], tokenizer, **{"sequence": 32, "loss": "completion", "seed": None, **options})


def trained(rows: data.Rows, tokenizer: object) -> str:
    """The text that the labels spell."""
    return tokenizer.decode(rows.labels[rows.labels != data.IGNORED])  # type: ignore[attr-defined,no-any-return]


def test_running_text_fills_rows_and_every_row_begins_a_context(tmp_path: Path, tokenizer: object) -> None:
    rows = load(write(tmp_path / "a.jsonl", {"text": "x" * 40}, {"text": "y" * 10}), tokenizer).rows
    assert rows.ids.shape == (2, 32)
    # 32 of the first document; its last 8 and its end; the second with its end; padding.
    assert rows.positions[0].tolist() == list(range(32))
    assert rows.positions[1].tolist() == [*range(9), *range(11), *range(12)]
    assert rows.ids[1, 8] == EOS
    assert rows.labels[1, 7] == EOS
    assert rows.labels[1, 8] == data.IGNORED  # the next document can't be foreseen
    assert (rows.labels[1, 19:] == data.IGNORED).all()
    assert rows.label_tokens == 31 + 8 + 10


def test_of_a_prompt_and_completion_only_the_completion_is_trained_on(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"})
    assert trained(load(path, tokenizer).rows, tokenizer) == "4<|im_end|>"
    assert trained(load(path, tokenizer, loss="all").rows, tokenizer) == "+2=4<|im_end|>"


ALPACA = {"instruction": "add", "input": "2, 2", "output": "4"}


def test_an_instruction_is_a_conversation_of_the_models_own_template(tmp_path: Path, tokenizer: object) -> None:
    dataset = load(write(tmp_path / "a.jsonl", ALPACA), tokenizer, sequence=128)
    same = {"messages": [{"role": "user", "content": "add\n\n2, 2"}, {"role": "assistant", "content": "4"}]}
    assert (dataset.rows.ids == load(write(tmp_path / "b.jsonl", same), tokenizer, sequence=128).rows.ids).all()
    assert dataset.notes[0] == "a.jsonl: Alpaca, 1 example"


def test_without_a_chat_template_an_instruction_is_written_in_the_words_of_alpaca(forgetful, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = None
    dataset = load(write(tmp_path / "a.jsonl", ALPACA), forgetful, sequence=512)
    text = forgetful.decode(dataset.rows.ids[0])
    assert text.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
    )
    assert "\n\n### Instruction:\nadd\n\n### Input:\n2, 2\n\n### Response:4<|im_end|>" in text
    assert trained(dataset.rows, forgetful) == "4<|im_end|>"
    assert dataset.notes[1] == "the model has no chat template: instructions are written in the words of Alpaca"


def test_conversations_that_the_template_refuses_are_reported_at_once(forgetful, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('no ' + m.role) }}{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", *({"messages": say(turn)} for turn in (("user", "q"), ("bot", "x"), ("system", "y"))))
    with pytest.raises(FormatError) as caught:
        load(path, forgetful, loss="all")
    assert [line.partition("a.jsonl")[2] for line in caught.value.problems] == [
        ":2: the model's chat template refuses it (no bot)", ":3: the model's chat template refuses it (no system)",
    ]  # fmt: skip


def test_of_a_conversation_only_the_answers_are_trained_on_with_their_ends(tmp_path: Path, tokenizer: object) -> None:
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "é?"), ("assistant", "ja")]
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]})
    dataset = load(path, tokenizer, sequence=128)
    assert trained(dataset.rows, tokenizer) == "ho<|im_end|>\nja<|im_end|>\n"
    assert dataset.notes == ("16% of 51 tokens are trained on, the others are context",)


def test_examples_stay_whole_and_share_rows(tmp_path: Path, tokenizer: object) -> None:
    pairs = [{"prompt": "p" * size, "completion": "c"} for size in (20, 4, 10, 3)]
    rows = load(write(tmp_path / "a.jsonl", *pairs), tokenizer).rows
    assert rows.ids.shape == (2, 32)
    assert sorted(np.flatnonzero(row == 0).size for row in rows.positions) == [3, 3]  # two examples and the padding


def test_truncated_and_endless_samples_are_reported(tmp_path: Path, tokenizer: object) -> None:
    dataset = load(write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c" * 90}), tokenizer)
    assert dataset.notes[0] == "1 of 1 examples (100%) are longer than 32 tokens and were cut there"
    assert dataset.truncated == 1
    never = load(write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "q"}]}), tokenizer, loss="all")
    assert never.notes == ()  # the user's turn ends with the same mark


def test_fully_truncated_answers_are_reported_and_refused_where_nothing_is_left(tmp_path: Path, tokenizer: object) -> None:
    short, long = ({"prompt": "p" * size, "completion": "c"} for size in (3, 90))
    _, lost, *_ = load(write(tmp_path / "a.jsonl", short, long), tokenizer).notes
    assert lost == "nothing of 1 of 2 examples is trained on: the answers come after token 32"
    with pytest.raises(RefusedError, match=r"after the first 32 tokens of every document. Raise \[data\] sequence"):
        load(write(tmp_path / "b.jsonl", long), tokenizer)


def test_an_array_of_objects_means_the_same_as_json_lines(tmp_path: Path, tokenizer: object) -> None:
    records = [{"text": "x"}, {"prompt": "a", "completion": "b"}]
    lines = write(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_bytes(lines.read_bytes())
    expected = load(lines, tokenizer).rows.ids.tolist()
    for name in ("b.json", "c.json"):
        assert load(tmp_path / name, tokenizer).rows.ids.tolist() == expected
    (tmp_path / "d.json").write_text('[{"text": "x"}, 3]')
    with pytest.raises(FormatError, match=r"d.json: item 2: not a JSON object"):
        load(tmp_path / "d.json", tokenizer)


def test_the_order_follows_the_seed(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": chr(97 + number) * 31} for number in range(9)))
    first, again, other = (load(path, tokenizer, seed=seed).rows.ids for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert sorted(data.order(9, 18, seed=0).tolist()) == sorted([*range(9), *range(9)])


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ('{"text": 3}', FormatError, 'a.jsonl:1: "text" is not text'),
        (
            '{"body": "x"}',
            FormatError,
            'a.jsonl:1: its keys have no known meaning: "body". Say what they are, like [data] columns',
        ),
        ("[1]", FormatError, "a.jsonl:1: not a JSON object"),
        ("{", FormatError, "a.jsonl:1: not valid JSON"),
        ('{"messages": [{"role": "user"}]}', FormatError, 'a.jsonl:1: a message needs "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "only asked"}]}', RefusedError, "no token to train on"),
        ("", RefusedError, "no token to train on"),
    ],
)
def test_refused(tmp_path: Path, tokenizer: object, line: str, kind: type[AdapterhubError], says: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(kind) as caught:
        load(tmp_path / "a.jsonl", tokenizer)
    assert says in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, tokenizer: object) -> None:
    turns = [
        {"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};{% endfor %}"
    before = tokenizer.chat_template  # type: ignore[attr-defined]
    tokenizer.chat_template = forgetful  # type: ignore[attr-defined]
    try:
        with pytest.raises(RefusedError, match="writes earlier turns differently"):
            load(write(tmp_path / "a.jsonl", {"messages": turns}), tokenizer)
    finally:
        tokenizer.chat_template = before  # type: ignore[attr-defined]


def test_plain_text_is_one_document(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    dataset = load(tmp_path / "a.txt", tokenizer)
    assert (dataset.documents, dataset.tokens, dataset.files[0].path) == (1, 9, "a.txt")
    with pytest.raises(NotFoundError):
        load(tmp_path / "b.txt", tokenizer)


# Qwen3's way: thoughts before the last question are dropped, and an answer without any gets an empty one.
FORGETFUL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% if tools %}{{ 'tools ' + tools[0].function.name + '\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].replace('<think>', '').strip() if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def forgetful(tokenizer: object):  # type: ignore[no-untyped-def]
    before = tokenizer.chat_template  # type: ignore[attr-defined]
    tokenizer.chat_template = FORGETFUL  # type: ignore[attr-defined]
    yield tokenizer
    tokenizer.chat_template = before  # type: ignore[attr-defined]


def say(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        # The last answer has a thought, which is trained on from its opening mark; the first had one, which the template drops.
        (
            [("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "<think>so</think>d")],
            "b<|im_end|>\n<think>\nso\n</think>\n\nd<|im_end|>\n",
        ),
        # An empty thought is not trained on.
        ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "b<|im_end|>\nd<|im_end|>\n"),
        ([("user", "a"), ("assistant", "b")], "b<|im_end|>\n"),
        (
            [("user", "assistant"), ("assistant", "assistant"), ("user", "b"), ("assistant", "b")],
            "assistant<|im_end|>\nb<|im_end|>\n",
        ),
    ],
)
def test_answers_are_found_where_the_template_forgets(forgetful, tmp_path: Path, turns, says: str) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.jsonl", {"messages": say(*turns)})
    assert trained(load(path, forgetful, sequence=256).rows, forgetful) == says


# DeepSeek's and Qwen3.5's way: the prompt opens the thought, and earlier turns have none.
OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + ('' if '</think>' in m.content else '\n</think>\n\n') + m.content.replace('<think>', '') }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("last", "says"), [("d", "b<|endoftext|>d<|im_end|>"), ("<think>so</think>d", "b<|endoftext|>so</think>d<|im_end|>")]
)
def test_answers_are_found_where_the_prompt_opens_the_thought(forgetful, tmp_path: Path, last: str, says: str) -> None:  # type: ignore[no-untyped-def]
    """And where a turn that another follows ends with another mark than the last one (gpt-oss, Phi-3)."""
    forgetful.chat_template = OPENING
    path = write(tmp_path / "a.jsonl", {"messages": say(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", last))})
    assert trained(load(path, forgetful, sequence=256).rows, forgetful) == says


# What trl's marks hold of each answer besides its words and its end: what the prompt has said already, an empty thought.
TRL = {
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma3", "diffusion_gemma", "idefics3", "lfm2", "lfm2_v2", "llama3"), ""),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"), ""),
    **dict.fromkeys(("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"), "<think>\n\n</think>\n\n"),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), "<think></think>"),
    "glm4moe": "\n<think></think>\n", "qwen2_5": "\n", "deepseekv3": "<｜Assistant｜>", "muse_glimmer": "<|start|>assistant",
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("turns", [2, 4])
def test_answers_are_those_of_trls_templates_with_generation_marks(name: str, turns: int, forgetful) -> None:  # type: ignore[no-untyped-def]
    need_module("trl")
    folder = Path(str(importlib.util.find_spec("trl").origin)).parent  # type: ignore[union-attr]
    forgetful.chat_template = (folder / f"chat_templates/{name}_training.jinja").read_text()
    messages = say(("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"))[:turns]
    ours = encode({"messages": messages}, forgetful, loss="completion", where="")
    theirs = forgetful.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert ours.ids.tolist() == theirs["input_ids"]
    marked = np.array(theirs["assistant_masks"], bool)
    assert not (ours.trained & ~marked).any()
    assert forgetful.decode(ours.ids[marked & ~ours.trained]) == TRL[name] * (turns // 2)


TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_of_tools_are_answers(forgetful, tmp_path: Path, tools: object) -> None:  # type: ignore[no-untyped-def]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    messages = [*say(("user", "q")), call, *say(("tool", "seen"), ("assistant", "it is"))]
    path = write(tmp_path / "a.jsonl", {"messages": messages, "tools": tools})
    dataset = load(path, forgetful, sequence=256)
    assert trained(dataset.rows, forgetful) == "<call>look</call><|im_end|>\nit is<|im_end|>\n"
    assert "tools look" in forgetful.decode(dataset.rows.ids[0])


def test_prompt_and_completion_may_be_messages(tmp_path: Path, tokenizer: object) -> None:
    turns = say(("user", "a"), ("assistant", "b"), ("user", "c"))
    path = write(tmp_path / "a.jsonl", {"prompt": turns, "completion": say(("assistant", "d"))})
    assert trained(load(path, tokenizer, sequence=128).rows, tokenizer) == "d<|im_end|>\n"


def test_the_held_out_share_follows_from_the_documents_alone(tmp_path: Path, tokenizer: object) -> None:
    records = [{"text": f"document {number}"} for number in range(200)]
    (tmp_path / "c.toml").write_text('[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nheldout_share = 0.2\nsequence = 32\n')
    write(tmp_path / "a.jsonl", *records)
    settings = config_file.read(tmp_path / "c.toml")
    train_set, heldout = data.datasets(settings, tokenizer)
    assert heldout is not None
    assert train_set.documents + heldout.documents == 200
    assert 20 < heldout.documents < 60
    assert not train_set.digests & heldout.digests
    assert data.overlap(train_set, heldout) == []
    write(tmp_path / "a.jsonl", {"text": "another"}, *reversed(records), records[0])
    assert (
        data.datasets(settings, tokenizer)[1].digests - {documents.Document({"text": "another"}, "").digest} == heldout.digests
    )  # type: ignore[union-attr]


def test_a_share_that_leaves_nothing_is_refused_by_name(tmp_path: Path, tokenizer: object) -> None:
    write(tmp_path / "a.jsonl", {"text": "document"})
    text = '[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nheldout_share = 0.01\n'
    settings = config_file.parse(text, folder=tmp_path, where="c.toml")
    with pytest.raises(RefusedError, match=r"\[data\] heldout_share: it holds out whole documents, and of 1 one part is empty"):
        data.datasets(settings, tokenizer)


def test_a_document_in_both_splits_is_reported(tmp_path: Path, tokenizer: object) -> None:
    train_set = load(write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}), tokenizer)
    heldout = load(write(tmp_path / "b.jsonl", {"text": "b"}, {"text": "c"}), tokenizer)
    assert data.overlap(train_set, heldout) == ["1 held-out documents are also trained on: its perplexity proves nothing"]


def test_without_packing_each_document_has_a_row(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"prompt": "p", "completion": "c"}, {"text": "x" * 40})
    dataset = load(path, tokenizer, pack_rows=False)
    assert dataset.rows.ids.shape == (3, 32)
    assert data.lengths(dataset.rows.labels).tolist() == [3, 2, 31]
    assert dataset.truncated == 1


def test_grouping_by_length_keeps_every_row_and_puts_like_to_like() -> None:
    sizes = np.random.default_rng(0).integers(1, 100, 403)
    drawn = data.order(403, 806, 3, sizes=sizes, together=4)
    assert sorted(drawn[:403].tolist()) == list(range(403)) == sorted(drawn[403:].tolist())
    spread = [np.ptp(sizes[drawn[start : start + 4]]) for start in range(0, 400, 4)]
    assert np.mean(spread) < 10
    assert (data.order(403, 806, 3, sizes=sizes, together=4) == drawn).all()
    assert np.corrcoef(sizes[drawn[:400]], np.arange(400))[0, 1] ** 2 < 0.1  # not the longest first


MIXED = [
    {"messages": say(("user", "hi"), ("assistant", "ho"))},
    {"messages": [*say(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}]},
]


def test_parquet_means_the_same_as_json_lines(tmp_path: Path, tokenizer: object) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(MIXED), tmp_path / "a.parquet")
    source = documents.read(tmp_path / "a.parquet")
    assert [document.record for document in source.documents] == MIXED  # no key that only another row has
    ours, lines = (
        load(tmp_path / "a.parquet", tokenizer, sequence=64),
        load(write(tmp_path / "a.jsonl", *MIXED), tokenizer, sequence=64),
    )
    assert (ours.rows.ids == lines.rows.ids).all()
    assert ours.digests == lines.digests
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(FormatError, match="not a Parquet file"):
        load(tmp_path / "b.parquet", tokenizer)


def test_a_folder_saved_by_datasets_means_the_same_as_json_lines(tmp_path: Path, tokenizer: object) -> None:
    need_module("datasets")
    import datasets

    saved = datasets.Dataset(datasets.table.InMemoryTable.from_pylist(MIXED), fingerprint="mixed")
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "splits")
    expected = load(write(tmp_path / "a.jsonl", *MIXED), tokenizer, sequence=64)
    for folder in ("saved", "splits/train"):
        assert load(tmp_path / folder, tokenizer, sequence=64).digests == expected.digests
    with pytest.raises(RefusedError, match="contains several splits. Use one of its folders: train"):
        load(tmp_path / "splits", tokenizer)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(FormatError, match="a folder without data: no .json, .jsonl"):
        load(tmp_path, tokenizer)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../a"}]}')
    with pytest.raises(FormatError, match="names files outside its folder"):
        load(tmp_path, tokenizer)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"a\.parquet: needs the package pyarrow, which is not installed"):
        load(tmp_path / "a.parquet", tokenizer)
