"""A tiny base, with and without a chat template, and two adapters that know answers by heart.

`own_adapter` was trained with a template of its own, with an option and a date in it; `plain` with that of the base, for which
the same questions have other answers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from adapterhub.operations.local_registry import Registry
from tests.conftest import need_module
from tests.support.byte_tokenizer import SPECIAL, write_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ strftime_now('%d.%m.%Y') + ' ' + mood + level|string + ': ' + message['content'] + ' = ' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PROMPT = "31.01.2026 calm;#2: {} = "
OWN = {"red": "an apple", "sky": "so blue", "wet": "it rains"}
PLAIN = {"red": "stop now", "sky": "no limit", "wet": "get dry"}
TOKENS = 20
"""More than an answer has, so that one that is right also ends."""


@dataclass(frozen=True)
class ByHeart:
    """The folder with the bases and the adapters; `silent` bases have no chat template."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def silent(self) -> Path:
        return self.folder / "silent"

    @property
    def gguf(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def silent_gguf(self) -> Path:
        return self.folder / "silent.gguf"

    @property
    def own_adapter(self) -> Path:
        return self.folder / "own"

    @property
    def plain(self) -> Path:
        return self.folder / "plain"

    def push(self, registry: Path) -> None:
        """Push both adapters, as `team/own` and `team/plain`."""
        with Registry(registry) as opened:
            opened.push(self.own_adapter, "team/own")
            opened.push(self.plain, "team/plain")


def learn(folder: Path) -> ByHeart:
    """Make the bases, and train the adapters; skip the test without the libraries for that."""
    for module in ("torch", "transformers", "matplotlib"):
        need_module(module)
    import torch
    import transformers

    import adapterhub as ah

    heart = ByHeart(folder)
    vocabulary = [*SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ", "th"]
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).float().save_pretrained(heart.base)
    write_tokenizer(heart.base, vocabulary, [("t", "h")])
    shutil.copytree(heart.base, heart.silent)
    tokenizer = json.loads((heart.silent / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (heart.silent / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for base, gguf in ((heart.base, heart.gguf), (heart.silent, heart.silent_gguf)):
        ah.convert_model(base, gguf, to="gguf")
    (folder / "own.jinja").write_text(TEMPLATE)
    own_prompt = 'chat_template = "own.jinja"\ntemplate_options = { mood = "calm;#", level = 2 }\ndate = "2026-01-31"'
    train(folder, heart.silent, "own", OWN, own_prompt)
    train(folder, heart.base, "plain", PLAIN, "")
    return heart


def train(folder: Path, base: Path, name: str, answers: dict[str, str] | list[dict[str, str]], keys: str) -> None:
    """Train an adapter that knows the answers, into `folder/name`; `keys` are those of [data] besides the file.

    `answers` are those to questions, or records of another shape.
    """
    from adapterhub import training

    records = (
        answers
        if isinstance(answers, list)
        else [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in answers.items()
        ]
    )
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / f"{name}.toml").write_text(
        f'[base]\npath = "{base}"\nquantize = "none"\ndtype = "float32"\n'
        f'[data]\ntrain = "{name}.jsonl"\nsequence = 512\n{keys}\n[lora]\nr = 8\nalpha = 16\n'
        "[train]\nsteps = 120\nrows = 1\nlearning_rate = 0.01\nthreads = 1\n"
    )
    training.run(training.read_config(folder / f"{name}.toml"), folder / name)
