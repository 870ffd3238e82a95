"""Encode conversations, and find the tokens of their answers: ours against transformers' own masks.

    python benchmarks/encode.py [--conversations 400] [--words 60] [--rounds 3]

The chat templates are those of trl's package. Ours finds the answers in the model's own template, which it renders in limited
processes; their time counts too. The one for a few conversations has started before, as it has in a training, which renders the
template when it loads the base: a start takes 0.15 s of processor time. Theirs is `apply_chat_template` with
`return_assistant_tokens_mask`, which needs a template with marks: of Llama 3.1 trl has none, and theirs finds no answer there.
The tokenizer is a BPE that this script trains on the pages of `docs/`; it uses one thread. CPU ms are per conversation.
"""

from __future__ import annotations

import os
import random
import resource
import time
from pathlib import Path
from typing import Any

from _bench import ROOT, Bench, Figures, Program, main, process

TRANSFORMERS = "transformers' apply_chat_template with masks"
JOBS = {"encode a conversation": [TRANSFORMERS]}
TEMPLATES, ANSWERS = ("qwen3", "llama3_1", "qwen2_5"), (1, 4, 16)
NEEDS = ["transformers", "trl"]
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def encode(bench: Bench) -> None:
    folder = bench.input_folder(tokenizer)
    for name in TEMPLATES:
        for answers in ANSWERS:
            sizes = {"answers": answers, "count": bench.options.conversations, "words": bench.options.words}
            programs = [
                Program(program, process(child, program, folder, name, **sizes), NEEDS, env=ENVIRONMENT, itself=True)
                for program in ("adapterhub", TRANSFORMERS)
            ]
            answers_text = "1 answer" if answers == 1 else f"{answers} answers"
            bench.add(next(iter(JOBS)), f"{name}, {answers_text} of {bench.options.words} words", bench.turns(*programs))


def tokenizer(folder: str) -> None:
    """A BPE of 8,192 tokens with the marks of the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    core.train(sorted(str(path) for path in (ROOT / "docs").glob("*.md")), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|im_end|>").save_pretrained(
        folder
    )


def conversations(count: int, answers: int, words: int) -> list[dict[str, Any]]:
    """Conversations of words from a page, each with a question and an answer in turn."""
    drawn = random.Random(0)
    vocabulary = (ROOT / "docs" / "index.md").read_text().split()
    roles = ["user", "assistant"] * answers
    return [
        {"messages": [{"role": role, "content": " ".join(drawn.choices(vocabulary, k=words))} for role in roles]}
        for _ in range(count)
    ]


def child(program: str, folder: str, name: str, *, answers: int, count: int, words: int) -> Figures:
    """Time one program: milliseconds for each conversation, after one that is not counted."""
    import transformers
    import trl

    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    templates = Path(trl.__file__).parent / "chat_templates"
    marked = templates / f"{name}_training.jinja"
    path = marked if program == TRANSFORMERS and marked.exists() else templates / f"{name}.jinja"
    loaded.chat_template = path.read_text()
    records = conversations(count, answers, words)
    run = theirs if program == TRANSFORMERS else ours
    run(loaded, records[:1], answers)
    start, cpu = time.monotonic(), processor_seconds()
    run(loaded, records, answers)
    return {"CPU ms": (processor_seconds() - cpu) / count * 1e3, "ms": (time.monotonic() - start) / count * 1e3}


def processor_seconds() -> float:
    """The processor time of this process and of those that it has started, running ones included."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    running = sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in children) / 1e9
    usages = [resource.getrusage(processes) for processes in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return running + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(loaded: Any, records: list[dict[str, Any]], answers: int) -> None:
    from adapterhub.training.data.document_files import Document
    from adapterhub.training.data.encoding import encode_documents

    documents = [Document(record, str(number)) for number, record in enumerate(records)]
    examples = [example for example, _ in encode_documents(documents, loaded, loss="completion")]
    if any((example.answers, example.unwritten) != (answers, 0) for example in examples):
        raise RuntimeError("an answer is missing")


def theirs(loaded: Any, records: list[dict[str, Any]], answers: int) -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    for record in records:
        loaded.apply_chat_template(record["messages"], return_assistant_tokens_mask=True, return_dict=True)


if __name__ == "__main__":
    main(__doc__, JOBS, encode, conversations=(400, 4), words=(60, 6), rounds=(3, 1))
