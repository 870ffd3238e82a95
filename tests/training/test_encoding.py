"""Documents are encoded in batches by several processes, in their order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.prompts import chat_template, process_limits
from adapterhub.training.data import encoding, template_renderers
from adapterhub.training.data.document_files import Document
from adapterhub_converters.errors import FormatError

# It does not end for one conversation, and takes none that says "no".
PICKY = (
    "{% for m in messages %}{% if 'forever' in m.content|string %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif 'no' in m.content|string %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def picky(tokenizer: Any) -> Any:
    before = tokenizer.chat_template
    tokenizer.chat_template = PICKY
    yield tokenizer
    tokenizer.chat_template = before


def limited_processes() -> list[str]:
    """The processes with limits that threads of this one have started."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    lines = [Path(f"/proc/{pid}/cmdline") for pid in children]
    return [str(line) for line in lines if line.exists() and b"limited_process.py" in line.read_bytes()]


def count_starts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list to which every process that starts adds itself."""
    starts = list[object]()
    start = process_limits.Process._start
    monkeypatch.setattr(process_limits.Process, "_start", lambda process: starts.append(process) or start(process))
    return starts


def conversation(number: int, question: str = "Why?") -> Document:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Because of {number}."}]
    return Document({"messages": turns}, f"a.jsonl:{number}")


def test_many_documents_are_encoded_in_their_order(picky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [conversation(number) for number in range(300)]
    documents[7] = Document({"text": "plain"}, "a.jsonl:7")
    batches: list[int] = []
    in_process = [example.ids.tolist() for example, _ in encoding.encode_documents(documents, picky, loss="completion")]
    monkeypatch.setattr(encoding, "_MANY", 100)
    encoded = encoding.encode_documents(documents, picky, loss="completion", on_batch=batches.append)
    in_workers = [(example.ids.tolist(), digest) for example, digest in encoded]
    assert in_workers == [(ids, document.digest) for ids, document in zip(in_process, documents, strict=True)]
    assert sum(batches) == 300
    assert "Because of 299." in picky.decode(in_process[-1])


def test_refused_conversations_are_reported_after_the_last_document(picky: Any) -> None:
    documents = [conversation(1), conversation(2, "no"), conversation(3), conversation(4, "no")]
    encoded = encoding.encode_documents(documents, picky, loss="completion")
    assert [next(encoded)[1], next(encoded)[1]] == [documents[0].digest, documents[2].digest]
    with pytest.raises(FormatError) as caught:
        next(encoded)
    assert [line[:9] for line in caught.value.problems] == ["a.jsonl:2", "a.jsonl:4"]


def test_a_template_that_does_not_end_costs_only_its_conversation(picky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    documents = [conversation(1), conversation(2, "forever"), conversation(3)]
    encoded = encoding.encode_documents(documents, picky, loss="completion")
    assert [next(encoded)[1], next(encoded)[1]] == [documents[0].digest, documents[2].digest]
    with pytest.raises(FormatError, match="a.jsonl:2: the model's chat template exceeds 1 s"):
        next(encoded)


def test_a_batch_of_conversations_that_do_not_end_costs_the_time_of_a_few(picky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0)
    chat_template.process.cache_clear()
    starts = count_starts(monkeypatch)
    documents = [conversation(number, "forever") for number in range(64)]
    with pytest.raises(FormatError) as caught:
        list(encoding.encode_documents(documents, picky, loss="completion"))
    assert [line[:9] for line in caught.value.problems] == ["a.jsonl:0", "a.jsonl:1"]
    assert len(starts) == 2


def test_the_process_that_rendered_before_renders_a_few_documents(picky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "Why?"}]
    chat_template.render(picky, turns, location="")
    starts = count_starts(monkeypatch)
    documents = [conversation(number) for number in range(5 * 64)]
    for _ in ("training", "held out"):
        assert len(list(encoding.encode_documents(documents, picky, loss="completion"))) == len(documents)
    assert not starts


def test_the_answers_that_an_interrupt_left_are_no_answers_to_later_requests(picky: Any) -> None:
    process = process_limits.Process("template", PICKY)

    def request(content: str) -> list[Any]:
        return [{"messages": [{"role": "user", "content": content}]}, None]

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            process.request_all([request("a"), request("forever"), request("b")], 10, 10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert process.request(request("c"), 10) == "[user]c;"


def test_an_interrupt_ends_renders_that_do_not_end(picky: Any) -> None:
    """Ctrl-C during the batch does not wait for the limits of the conversations in it, 10 seconds each."""
    started = len(limited_processes())

    def interrupted() -> None:
        request = (PICKY, [{"messages": [{"role": "user", "content": "forever"}]}, None])
        with template_renderers.Renderers(2) as renderers:
            list(renderers.answered(interrupted_after((number, [request] * 64) for number in range(2))))

    def interrupted_after(batches: Iterable[Any]) -> Iterator[Any]:
        yield from batches
        while len(limited_processes()) < started + 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(limited_processes()) == started
