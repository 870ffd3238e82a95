"""Folders for their conversion to GGUF, and llama.cpp's own conversion of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.merging import Options, prepare_merge
from adapterhub_converters.adapter import LowRank
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.formats.gguf_model import byte_level
from tests.support.llama_cpp_scripts import Converter


def written(folder: Path, target: Path, **options: Any) -> Path:
    prepare_merge([], folder, Options(**options), gguf=True).write(target)
    return target


def low_rank(m: int, n: int, scale: float = 0.1) -> LowRank:
    rng = np.random.default_rng(m + n)
    return LowRank(rng.normal(size=(4, n)).astype(np.float32), (scale * rng.normal(size=(m, 4))).astype(np.float32), 4.0)


def changed(folder: Path, **config: Any) -> None:
    document = json_file.read_object(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**document, **config}))


SAID = ("general.name", "general.tags", "general.base_model.")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys with their types and values, and tensors with their types, shapes and bytes."""
    with GGUFFile(path) as file:
        kinds, metadata = file.header.kinds, file.header.metadata
        keys = {key: (kinds[key], np.asarray(value).tolist()) for key, value in metadata.items() if not key.startswith(SAID)}
        tensors = {name: (info.type_name, info.shape, file.raw(name).tobytes()) for name, info in file.tensors.items()}
    return keys, tensors


def assert_converted(ours: Path, theirs: Path) -> None:
    (keys, tensors), (wanted_keys, wanted_tensors) = contents(ours), contents(theirs)
    assert {key: value for key, value in keys.items() if not key.startswith("adapterhub.")} == wanted_keys
    assert set(tensors) == set(wanted_tensors)
    for name, tensor in tensors.items():
        assert tensor[:2] == wanted_tensors[name][:2], name
        assert tensor[2] == wanted_tensors[name][2], name


def theirs(converted: Converter, folder: Path, target: Path, *flags: str) -> Path:
    """llama.cpp's conversion; of Gemma 3 it wants a vocabulary, to which it cuts the table of embeddings."""
    config = json_file.read_object(folder / "config.json")
    vocabulary = folder / "tokenizer.json"
    if config["architectures"][0].startswith("Gemma3") and not vocabulary.exists():
        rows = {str(number): number for number in range(config["vocab_size"])}
        vocabulary.write_text(json.dumps({"model": {"vocab": rows}, "added_tokens": []}))
        try:
            return converted(folder, target, *flags)
        finally:
            vocabulary.unlink()
    return converted(folder, target, *flags)


TEXT = (
    "The quick brown fox's 12345 jumps\n\n over\t the lazy dog's 3 tails!  I'VE told 'em: naïve Straße, 我想在apple工作1314天～"
    " нещо на Български  \r\n   🚀 (normal) 😶 ''''''```````\"\"\"\"......!!!!!!??????  x=3.14; if(a<b){c+=d[1000]}  e/f "
)


def of_bytes(split: byte_level.Split, **fields: Any) -> dict[str, Any]:
    """A tokenizer.json of 400 tokens, learned from the text, that splits by these rules."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if rule == "digit" else pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in split.rules
        if rule != "words"
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="words" in split.rules))
    tokenizer = Tokenizer(models.BPE(ignore_merges=split.whole_tokens_first))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|user|>"]
    tokenizer.train_from_iterator(
        [TEXT] * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document | fields
