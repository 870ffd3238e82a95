"""A folder written as GGUF, with llama.cpp's own conversion as the oracle: every key and every byte of every tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, fuse, prepare_merge
from adapterhub.merging.into_base import merge_proof
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, json_file, safetensors_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats.gguf_model import byte_level, special_tokens, to_folder
from tests.conftest import Run, need_module, need_smollm2
from tests.converters.test_architecture_lookup import CLASSES, TOKENS, deltas, logits_of
from tests.support import llama_cpp, llama_cpp_scripts, tiny
from tests.support.llama_cpp_scripts import Converter

# What llama.cpp reads out of the folder's name and its README.md.
SAID = ("general.name", "general.tags", "general.base_model.")
DIMENSIONS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "model_type", "architectures", "n_embd", "n_head", "n_layer", "n_positions",
}  # fmt: skip


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


def silent(folder: Path) -> None:
    """Take out of config.json what transformers fills in when it isn't there."""
    import transformers

    config = json_file.read_object(folder / "config.json")
    usual = getattr(transformers, config["architectures"][0]).config_class().to_dict()
    kept = {key: value for key, value in config.items() if key in DIMENSIONS or usual.get(key, "absent") != value}
    (folder / "config.json").write_text(json.dumps(kept))


def written(folder: Path, target: Path, **options: Any) -> Path:
    prepare_merge([], folder, Options(**options), gguf=True).write(target)
    return target


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_the_result_is_llama_cpp_s_conversion_of_the_merged_folder(tmp_path: Path, converted: Converter, name: str) -> None:
    folder = tmp_path / "hf"
    tiny.model(name).save_pretrained(folder)
    silent(folder)
    adapter = Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, "test"))))
    fuse([(adapter, 1.0)], folder, tmp_path / "merged")
    report = fuse([(adapter, 1.0)], folder, tmp_path / "merged.gguf")
    assert_converted(tmp_path / "merged.gguf", theirs(converted, tmp_path / "merged", tmp_path / "theirs.gguf"))
    assert merge_proof.prove([(adapter, 1.0)], folder, tmp_path / "merged.gguf").good
    assert any("no tokenizer" in note for note in report.notes)
    assert all(change.retained and change.retained > 0.999 for change in report.touched.values())


def low_rank(m: int, n: int, scale: float = 0.1) -> LowRank:
    rng = np.random.default_rng(m + n)
    return LowRank(rng.normal(size=(4, n)).astype(np.float32), (scale * rng.normal(size=(m, 4))).astype(np.float32), 4.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter]:
    """A Llama in bfloat16 and an adapter on it."""
    need_module("torch")
    need_module("transformers")
    import torch

    folder = tmp_path_factory.mktemp("llama") / "hf"
    tiny.model().to(torch.bfloat16).save_pretrained(folder)
    tensors = read_base(folder).tensors
    return folder, Adapter(
        {
            name.removesuffix(".weight"): low_rank(*tensor.shape)
            for name, tensor in tensors.items()
            if "_proj" in name or name == "lm_head.weight"
        }
    )


@pytest.mark.peer
@pytest.mark.parametrize(
    ("flag", "options", "merged"),
    [
        ("MOSTLY_BF16", {}, {}),
        ("MOSTLY_F16", {"dtype": "f16"}, {"dtype": "f32"}),
        ("ALL_F32", {"dtype": "f32"}, {"dtype": "f32"}),
        ("MOSTLY_Q8_0", {"requantize": "q8_0"}, {"dtype": "f32"}),
    ],
)
def test_the_type_is_the_base_s_or_the_one_asked_for(
    tmp_path: Path, converted: Converter, llama: Any, flag: str, options: dict[str, Any], merged: dict[str, Any]
) -> None:
    folder, adapter = llama
    fuse([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(**options))
    fuse([(adapter, 1.0)], folder, tmp_path / "merged", options=Options(**merged))
    assert_converted(tmp_path / "out.gguf", theirs(converted, tmp_path / "merged", tmp_path / "theirs.gguf", flag))


@pytest.mark.peer
def test_llama_cpp_computes_what_transformers_computes_with_the_merged_folder(tmp_path: Path, llama: Any) -> None:
    need_module("llama_cpp_py_sync")
    folder, adapter = llama
    fuse([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(dtype="f32"))
    fuse([(adapter, 1.0)], folder, tmp_path / "merged", options=Options(dtype="f32"))
    expected = logits_of(tmp_path / "merged")
    assert np.abs(expected - logits_of(folder)).max() > 1
    assert np.abs(llama_cpp.logits(tmp_path / "out.gguf", TOKENS) - expected).max() < 1e-3


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM", "GPT2LMHeadModel")]
    + [("FalconForCausalLM", {"dtype": "f16"}), ("Gemma2ForCausalLM", {}), ("LlamaForCausalLM", {"requantize": "q8_0"})],
)
def test_the_result_proves_to_have_the_adapter_in_it(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    adapter = Adapter(dict(deltas(read_base(tmp_path / "hf"), architecture_lookup.by_class(name, "test"))))
    fuse([(adapter, 1.0)], tmp_path / "hf", tmp_path / "out.gguf", options=Options(**options))
    proof = merge_proof.prove([(adapter, 1.0)], tmp_path / "hf", tmp_path / "out.gguf")
    assert proof.good, [tensor for tensor in proof.tensors if not tensor.good]
    weaker = merge_proof.prove([(adapter, 2.0)], tmp_path / "hf", tmp_path / "out.gguf")
    assert {tensor.verdict for tensor in weaker.tensors if tensor.name.removesuffix(".weight") in adapter.deltas} == {"weaker"}


@pytest.mark.peer
def test_dora_on_weights_that_are_stored_turned_is_in_it(tmp_path: Path, converted: Converter) -> None:
    tiny.model("GPT2LMHeadModel").save_pretrained(tmp_path / "hf")
    target = "transformer.h.1.mlp.c_fc"
    plain = dict(deltas(read_base(tmp_path / "hf"), architecture_lookup.by_class("GPT2LMHeadModel", "test")))[target]
    assert isinstance(plain, LowRank)
    magnitude = np.linspace(0.5, 2, plain.shape[0], dtype=np.float32)
    adapter = Adapter({target: dataclasses.replace(plain, magnitude=magnitude)})
    fuse([(adapter, 1.0)], tmp_path / "hf", tmp_path / "out.gguf")
    fuse([(adapter, 1.0)], tmp_path / "hf", tmp_path / "merged")
    assert_converted(tmp_path / "out.gguf", converted(tmp_path / "merged", tmp_path / "theirs.gguf"))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "NemotronForCausalLM"])
def test_a_replaced_norm_is_the_same_into_the_folder_and_into_its_gguf(tmp_path: Path, name: str) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    norm = np.linspace(-1, 1, 64, dtype=np.float32)
    adapter = Adapter({}, replaced={"model.layers.0.input_layernorm.weight": norm})
    fuse([(adapter, 1.0)], written(tmp_path / "hf", tmp_path / "base.gguf"), tmp_path / "one.gguf")
    fuse([(adapter, 1.0)], tmp_path / "hf", tmp_path / "two.gguf")
    assert contents(tmp_path / "one.gguf")[1] == contents(tmp_path / "two.gguf")[1]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"long_factor": [1.0 + 0.1 * n for n in range(8)], "short_factor": [1.0] * 8}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "rope", "more"),
    [
        ("LlamaForCausalLM", {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}, {}),
        ("SmolLM3ForCausalLM", {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}, {}),
        ("LlamaForCausalLM", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, {}),
        (
            "Qwen3ForCausalLM",
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64, "beta_fast": 32.0},
            {},
        ),
        ("Phi3ForCausalLM", {"rope_type": "longrope", "rope_theta": 1e4, **LONG}, {"original_max_position_embeddings": 64}),
    ],
)
def test_a_scaled_rotary_embedding_is_llama_cpp_s(
    tmp_path: Path, converted: Converter, name: str, rope: dict[str, Any], more: dict[str, Any]
) -> None:
    tiny.model(name, rope_parameters=rope, **more).save_pretrained(tmp_path / "hf")
    ours = written(tmp_path / "hf", tmp_path / "out.gguf")
    assert_converted(ours, converted(tmp_path / "hf", tmp_path / "theirs.gguf"))


def test_a_config_of_older_transformers_means_the_same(tmp_path: Path, converted: Converter) -> None:
    rope = {**LLAMA3, "original_max_position_embeddings": 64}
    tiny.model(rope_parameters={**rope, "rope_theta": 5e5}).save_pretrained(tmp_path / "hf")
    config = json_file.read_object(tmp_path / "hf/config.json")
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "rope_scaling": rope, "rope_theta": 5e5}))
    ours = written(tmp_path / "hf", tmp_path / "out.gguf")
    assert_converted(ours, converted(tmp_path / "hf", tmp_path / "theirs.gguf"))


@pytest.mark.peer
def test_the_vocabulary_of_a_real_model_is_llama_cpp_s(tmp_path: Path, converted: Converter) -> None:
    source = need_smollm2()
    folder = tmp_path / "hf"
    tiny.model(vocab_size=49152, tie_word_embeddings=True).save_pretrained(folder)
    with GGUFFile(source) as file:
        for name, text in to_folder.tokenizer_files(to_folder.GGUFBase(str(source), file)).items():
            json_file.write_text(folder / name, text)
    ours = written(folder, tmp_path / "out.gguf")
    keys, _ = contents(ours)
    assert keys["tokenizer.ggml.pre"] == ("STRING", "smollm")
    assert keys["tokenizer.chat_template"][1].startswith("{%")
    assert_converted(ours, converted(folder, tmp_path / "theirs.gguf", "vocabulary"))


TEXT = (
    "The quick brown fox's 12345 jumps\n\n over\t the lazy dog's 3 tails!  I'VE told 'em: naïve Straße, 我想在apple工作1314天～"
    " нещо на Български  \r\n   🚀 (normal) 😶 ''''''```````\"\"\"\"......!!!!!!??????  x=3.14; if(a<b){c+=d[1000]}  e/f "
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 pieces with byte fallback."""
    need_module("sentencepiece")
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text((TEXT.replace("\r", "") + "\n") * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mine>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def unprefixed(pieces: Path) -> Path:
    """The same that puts no space before a text, as Gemma's."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    path = pieces.with_name("unprefixed.model")
    path.write_bytes(model.SerializeToString())
    return path


CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "add_bos_token": True,
    "added_tokens_decoder": {
        "1": {"content": "<s>", "special": True},
        "400": {"content": "<|end|>", "special": False},
        "401": {"content": "a\u2581b", "special": False},
    },
    "chat_template": [{"name": "default", "template": "{{ x }}"}, {"name": "tool-use", "template": "{{ y }}"}],
}


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
        "Gemma3ForCausalLM", "Phi3ForCausalLM", "NemotronForCausalLM", "Ernie4_5ForCausalLM", "GraniteForCausalLM",
        "Ernie4_5_MoeForCausalLM", "Ministral3ForCausalLM", "ApertusForCausalLM", "Qwen2VLForConditionalGeneration",
    ],
)  # fmt: skip
def test_a_vocabulary_of_pieces_is_llama_cpp_s(
    tmp_path: Path, converted: Converter, pieces: Path, unprefixed: Path, name: str
) -> None:
    folder = tmp_path / "hf"
    tiny.model(name, vocab_size=408, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    shutil.copyfile(unprefixed if name.startswith("Gemma") else pieces, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "tokenizer_class": "LlamaTokenizer"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 400}))
    ours = written(folder, tmp_path / "out.gguf")
    assert_converted(ours, converted(folder, tmp_path / "theirs.gguf", "vocabulary"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", b'{"<|end|>": "x"}', "the id of '<|end|>' is 'x', not a number"),
        ("added_tokens.json", b'{"<|end|>": 500}', "an added token 500, but the model has 400 rows"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8 text"),
        ("tokenizer.model", b"\x0a\xff", "tokenizer.model"),
    ],
)
def test_invalid_files_next_to_pieces_are_refused(
    tmp_path: Path, pieces: Path, name: str, content: bytes, message: str
) -> None:
    tiny.model(vocab_size=400).save_pretrained(tmp_path / "hf")
    shutil.copyfile(pieces, tmp_path / "hf/tokenizer.model")
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    (tmp_path / "hf" / name).write_bytes(content)
    with pytest.raises(AdapterhubError, match=re.escape(message)):
        written(tmp_path / "hf", tmp_path / "out.gguf")


def test_llama_cpp_tokenizes_as_sentencepiece(tmp_path: Path, pieces: Path) -> None:
    need_module("llama_cpp_py_sync")
    import sentencepiece

    tiny.model(vocab_size=400).save_pretrained(tmp_path / "hf")
    shutil.copyfile(pieces, tmp_path / "hf/tokenizer.model")
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    with llama_cpp.opened(written(tmp_path / "hf", tmp_path / "out.gguf")) as run:
        assert run.tokens(TEXT, raw=True) == sentencepiece.SentencePieceProcessor(str(pieces)).encode(TEXT)


def of_bytes(split: byte_level.Split, **more: Any) -> dict[str, Any]:
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
    return document | more


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of 400 tokens with a tokenizer of one's own."""
    need_module("tokenizers")
    root = tmp_path_factory.mktemp("bytes") / "hf"
    tiny.model(vocab_size=400).save_pretrained(root)

    def make(folder: Path, document: Mapping[str, Any], **config: Any) -> Path:
        shutil.copytree(root, folder)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.peer
@pytest.mark.parametrize("split", byte_level.SPLITS, ids=lambda split: split.name)
def test_llama_cpp_splits_a_text_as_the_tokenizer_does(tmp_path: Path, folder_of: Any, split: byte_level.Split) -> None:
    need_module("llama_cpp_py_sync")
    from tokenizers import Tokenizer

    document = of_bytes(split)
    folder = folder_of(tmp_path / "hf", document, add_bos_token=False)
    with llama_cpp.opened(written(folder, tmp_path / "out.gguf")) as run:
        assert run.tokens(TEXT, raw=True) == Tokenizer.from_str(json.dumps(document)).encode(TEXT).ids


@pytest.mark.parametrize(
    ("name", "more", "wanted"),
    [
        (
            "Glm4MoeForCausalLM",
            {},
            {"pre": "glm4", "bos_token_id": 402, "eot_token_id": 1, "unknown_token_id": 0, "eom_token_id": 403},
        ),
        ("HunYuanDenseV1ForCausalLM", {"eod_token_id": 9}, {"pre": "llama-bpe", "eos_token_id": 9, "eot_token_id": 7}),
        ("PhiForCausalLM", {}, {"pre": "llama-bpe", "add_bos_token": False}),
        ("Lfm2ForCausalLM", {}, {"pre": "lfm2"}),
    ],
)
def test_the_tokens_that_a_family_has_of_its_own_are_written(
    tmp_path: Path, name: str, more: dict[str, Any], wanted: dict[str, Any]
) -> None:
    need_module("tokenizers")
    folder = tmp_path / "hf"
    tiny.model(name, vocab_size=408).save_pretrained(folder)
    changed(folder, **more)
    document = of_bytes(next(split for split in byte_level.SPLITS if split.name == "llama-bpe"))
    named = {"[gMASK]": 402, "<|observation|>": 403}
    document["added_tokens"] += [{"id": number, "content": text, "special": True} for text, number in named.items()]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    keys, _ = contents(written(folder, tmp_path / "out.gguf"))
    assert {key: keys[f"tokenizer.ggml.{key}"][1] for key in wanted} == wanted


def template(*single: Any, pair: Any = ()) -> dict[str, Any]:
    def part(token: str) -> dict[str, Any]:
        return {"Sequence": {"id": token, "type_id": 0}} if token in "AB" else {"SpecialToken": {"id": token, "type_id": 0}}

    tokens = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    return {
        "type": "TemplateProcessing",
        "single": [part(token) for token in single],
        "pair": [part(token) for token in pair],
        "special_tokens": {"<s>": tokens},
    }


PROCESSED: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}),
    ({"type": "ByteLevel"}, {"bos_token": "<s>"}),
    (template("<s>", "A", pair=("<s>", "A", "<s>", "B")), {"bos_token": "<s>", "eos_token": "</s>"}),
    (template("<s>", "A", "</s>", pair=("<s>", "A", "</s>", "B", "</s>")), {"bos_token": "<s>", "eos_token": "</s>"}),
    (template("A", "</s>"), {"eos_token": "<s>", "pad_token": {"content": "</s>"}}),
    (template("<s>", "A", pair=("<s>", "A", "</s>", "B")), {"bos_token": "<s>", "eos_token": "</s>"}),
    ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>", "A")]}, {"cls_token": "<s>"}),
    (template("<s>", "A"), {"add_bos_token": False, "bos_token": "<s>", "chat_template": "{{ x }}"}),
]
# Prints the keys of special tokens for each folder named.
_GGUF_PY = """
import json, sys, gguf
for folder in sys.argv[1:]:
    writer = gguf.GGUFWriter(None, "llama")
    gguf.SpecialVocab(folder).add_to_gguf(writer)
    print(json.dumps({key: value.value for key, value in writer.kv_data[0].items() if key != "general.architecture"}))
"""


@pytest.mark.peer
def test_special_tokens_are_those_of_gguf_py(tmp_path: Path, converted: Converter) -> None:
    scripts = llama_cpp_scripts.found()
    assert scripts
    added = [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}]
    model = {"eos_token_id": 2, "pad_token_id": None, "text_config": {"eos_token_id": 3, "pad_token_id": 0}}
    folders = [tmp_path / str(number) for number in range(len(PROCESSED))]
    for folder, (processor, config) in zip(folders, PROCESSED, strict=True):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "post_processor": processor, "model": {}}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps(model))
    child = [sys.executable, "-c", _GGUF_PY, *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(scripts / "gguf-py")}
    result = subprocess.run(child, env=environment, check=True, capture_output=True, text=True)
    for folder, line in zip(folders, result.stdout.splitlines(), strict=True):
        found = special_tokens.special_tokens(special_tokens.read_tokenizer(folder, model), None)
        assert {key: value.value for key, value in found.items()} == json.loads(line), folder.name


def changed(folder: Path, **config: Any) -> None:
    document = json_file.read_object(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**document, **config}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu, but llama.cpp's llama computes swish"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "a rotary embedding of the type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "a rotary embedding of the type 'longrope'"),
        ({"model_type": "llama9"}, "model_type 'llama9' has no verified conversion"),
        ({"architectures": ["RWKV7ForCausalLM"]}, "RWKV7ForCausalLM has no verified mapping"),
        ({"vocab_size": 127}, "vocab_size is 127, and there are 128 rows of embeddings"),
        (
            {"num_hidden_layers": 1},
            "model.layers.1.input_layernorm.weight (64,): no known tensor of llama.cpp's llama corresponds to it",
        ),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is many, but a GGUF needs a number there"),
        ({"rope_parameters": {"rope_type": "linear", "factor": []}}, "factor is [], but a GGUF needs a number there"),
        ({"scoring_func": ["sigmoid"]}, "scoring_func \"['sigmoid']\" is not supported by llama.cpp"),
        ({"rope_scaling": 3}, "rope_scaling is not an object"),
        ({"max_position_embeddings": 1 << 32}, "max_position_embeddings is 4294967296, but a GGUF needs a number there"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps is 1e+300, but a GGUF needs a number there"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -1}},
            "original_max_position_embeddings is -1, but a GGUF needs a number there",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, but a GGUF needs a number there"),
    ],
)
def test_a_config_that_llama_cpp_would_pass_over_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    need_module("transformers")
    tiny.model().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **config)
    with pytest.raises(AdapterhubError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


PERIODIC = ["full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "Qwen3MoeForCausalLM",
            {"norm_topk_prob": False},
            "norm_topk_prob is False, but llama.cpp's code for qwen3_moe uses True",
        ),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("DeepseekV2ForCausalLM", {"n_group": 2, "topk_group": 1}, "groups of experts are chosen by their best one"),
        ("DeepseekV3ForCausalLM", {"rope_interleave": False}, "rope_interleave is False"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func is softmax"),
        ("DeepseekV3ForCausalLM", {"n_group": 2, "topk_group": 2}, "all 2 groups of experts are chosen"),
        ("DeepseekV3ForCausalLM", {"rope_parameters": {**YARN, "rope_type": "linear"}}, "the rotary embedding is linear"),
        ("NemotronForCausalLM", {"rope_parameters": YARN}, "the rotary embedding is yarn"),
        ("Qwen2ForCausalLM", {"head_dim": 32}, "head_dim is 32, but llama.cpp's code for qwen2 uses 16"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, ".bias, but llama.cpp's qwen3 has none"),
        ("SeedOssForCausalLM", {"mlp_bias": True}, ".bias, but llama.cpp's seed_oss has none"),
        ("Starcoder2ForCausalLM", {"use_bias": False}, "llama.cpp's starcoder2 needs one"),
        ("Olmo2ForCausalLM", {"tie_word_embeddings": True}, "no tensor for llama.cpp's output.weight"),
        ("CohereForCausalLM", {"use_qk_norm": True}, "norms of queries and keys from 64 layers on"),
        ("GptOssForCausalLM", {"swiglu_limit": 1.0}, "swiglu_limit is 1.0"),
        ("GptOssForCausalLM", {"layer_types": PERIODIC}, "other layers attend to the whole text"),
        ("Gemma2ForCausalLM", {"layer_types": PERIODIC}, "the last of every 2 layers for that"),
        ("Gemma3ForCausalLM", {"layer_types": PERIODIC}, "the last of every 6 layers for that"),
        ("Cohere2ForCausalLM", {"layer_types": PERIODIC}, "the last of every 4 layers for that"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1]}, "other layers are without a rotary embedding"),
        ("GraniteForCausalLM", {"residual_multiplier": 0.0}, "residual_multiplier is 0"),
        ("LlamaForCausalLM", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "beta_slow of the rotary embedding is 2.0"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {**YARN, "attention_factor": 2.0}},
            "attention_factor of the rotary embedding is 2",
        ),
        ("LlamaForCausalLM", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale and mscale_all_dim"),
        ("DeepseekV2ForCausalLM", {"rope_parameters": YARN}, "mscale and mscale_all_dim are (None, None)"),
        (
            "Phi3ForCausalLM",
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG, "attention_factor": 3.0},
                "original_max_position_embeddings": 64,
            },
            "attention_factor of the rotary embedding is 3",
        ),
        ("CohereForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "type 'linear'"),
    ],
)
def test_a_model_of_another_function_than_llama_cpp_s_code_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    need_module("transformers")
    tiny.model(name, **config).save_pretrained(tmp_path / "hf")
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("pattern", [2, 6, None])
def test_an_old_config_gives_the_layers_with_a_window_by_a_period(tmp_path: Path, pattern: int | None) -> None:
    need_module("transformers")
    tiny.model("Gemma3ForCausalLM").save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", layer_types=None, sliding_window_pattern=pattern)
    with pytest.raises(RefusedError, match="the last of every 6 layers") if pattern == 2 else contextlib.nullcontext():
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").exists() == (pattern != 2)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("MistralForCausalLM", {"sliding_window": 8}, "not to the last 8 tokens"),
        ("MistralForCausalLM", {"sliding_window": 256}, None),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "last 8 tokens"),
        ("Qwen3ForCausalLM", {"use_sliding_window": False, "sliding_window": 8}, None),
        ("Phi3ForCausalLM", {"sliding_window": 8}, "last 8 tokens"),
        ("Gemma2ForCausalLM", {"sliding_window": 8}, None),
        ("GptOssForCausalLM", {"rope_parameters": {**YARN, "truncate": False}}, "rounds the bounds"),
    ],
)
def test_what_long_texts_lose_is_reported(tmp_path: Path, name: str, config: dict[str, Any], said: str | None) -> None:
    need_module("transformers")
    tiny.model(name, **config).save_pretrained(tmp_path / "hf")
    notes = prepare_merge([], tmp_path / "hf", Options(), gguf=True).write(tmp_path / "out.gguf").notes
    assert [note for note in notes if "no tokenizer" not in note] == [note for note in notes if said and said in note]
    assert bool(said) == (len(notes) == 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a vocabulary of the kind WordPiece"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "a vocabulary of the kind BPE with byte fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer {'type': 'Lowercase'}"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "texts are split by"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "a post-processor 'RobertaProcessing'"),
        ({"post_processor": template("<s>", "<s>", "A")}, "a template that adds more than one token"),
        ({"added_tokens": ["x"]}, "added_tokens is malformed"),
        ({"model": {"vocab": {"a": "b"}}}, "model is malformed"),
        ({"pre_tokenizer": {"type": "Split", "pattern": 3}}, "pre_tokenizer is malformed"),
        ({"pre_tokenizer": {"pretokenizers": 1}}, "pre_tokenizer is malformed"),
        ({"post_processor": template("<s>", "A") | {"single": ["A"]}}, "post_processor is malformed"),
        ({"added_tokens": [{"id": 500, "content": "x"}]}, "a token 500, but the model 400 rows"),
        ({"added_tokens": [{"id": 3, "content": "é"}]}, "the added token 'é' has characters that stand for bytes"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_refused(
    tmp_path: Path, folder_of: Any, more: dict[str, Any], message: str
) -> None:
    folder = folder_of(tmp_path / "hf", of_bytes(byte_level.SPLITS[0], **more))
    with pytest.raises(AdapterhubError) as caught:
        written(folder, tmp_path / "out.gguf")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm.weight", None, "no tensor for llama.cpp's output_norm.weight"),
        ("lm_head.weight", None, "no tensor for llama.cpp's output.weight"),
        ("lm_head.weight", (120, 64), r"an output layer \(120, 64\) that contradict"),
        ("model.layers.1.mlp.up_proj.weight", None, r"layer 1 has no tensor for ffn_up.weight, but others have \(96, 64\)"),
        ("model.layers.1.mlp.up_proj.weight", (94, 64), r"layer 1 has \(94, 64\) for ffn_up.weight"),
        ("model.layers.0.mlp.up_proj.bias", (96,), r"layer 1 has no tensor for ffn_up.bias"),
        ("model.layers.1.", None, "num_hidden_layers is 2, but there are 1"),
    ],
)
def test_a_folder_that_lacks_a_tensor_is_refused(
    tmp_path: Path, llama: Any, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    folder = shutil.copytree(llama[0], tmp_path / "hf")
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        tensors = {tensor: np.array(file.tensor(tensor)) for tensor in file.tensors if not tensor.startswith(name)}
    more = {name: np.zeros(shape, np.float32)} if shape else {}
    safetensors_file.write(folder / "model.safetensors", {**tensors, **more}, {})
    with pytest.raises(RefusedError, match=message):
        written(folder, tmp_path / "out.gguf")


def test_numbers_that_no_gguf_holds_are_left_out_of_what_is_optional(tmp_path: Path, llama: Any, folder_of: Any) -> None:
    folder = folder_of(tmp_path / "hf", of_bytes(byte_level.SPLITS[0]))
    changed(folder, bos_token_id=1 << 40)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1 << 40, "top_p": 0.5}))
    keys, _ = contents(written(folder, tmp_path / "out.gguf"))
    assert {"general.sampling.top_k", "tokenizer.ggml.bos_token_id"}.isdisjoint(keys)
    assert keys["general.sampling.top_p"][1] == 0.5


def test_what_a_gguf_of_a_folder_cannot_be_is_refused(tmp_path: Path, llama: Any) -> None:
    folder, adapter = llama
    table = np.zeros((130, 64), np.float32)
    resized = Adapter({}, copies={"model.embed_tokens.weight": table, "lm_head.weight": table})
    with pytest.raises(RefusedError, match="the adapter resizes the vocabulary, and a GGUF contains the tokenizer") as caught:
        fuse([(resized, 1.0)], folder, tmp_path / "out.gguf")
    assert caught.value.hint == "Merge into a folder, add the tokenizer there, and convert that"
    with pytest.raises(RefusedError, match="nf4: is a type of Hugging Face folders"):
        fuse([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(requantize="nf4"))
    with pytest.raises(RefusedError, match="matrices become q8_0 already"):
        fuse([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(requantize="q8_0", dtype="f16"))
    with pytest.raises(RefusedError, match="becomes one GGUF file"):
        fuse([(adapter, 1.0)], folder, tmp_path / "out.gguf", options=Options(shard_size=1000))
    assert not list(tmp_path.iterdir())


def test_integers_in_the_place_of_a_matrix_are_not_compared(tmp_path: Path, llama: Any) -> None:
    folder, adapter = llama
    fuse([(adapter, 1.0)], folder, tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as file:
        kinds, said = file.header.kinds, file.header.metadata
        tensors = {name: np.array(file.tensor(name)) for name in file.tensors}
    tensors["blk.0.attn_q.weight"] = np.ones(tensors["blk.0.attn_q.weight"].shape, np.int32)
    metadata = {key: MetadataValue(kinds[key], np.array(said[key]).tolist()) for key in said}
    gguf_output.write(tmp_path / "out.gguf", metadata, tensors)
    with pytest.raises(RefusedError, match=r"blk.0.attn_q.weight: is I32, a type without weights to compare"):
        merge_proof.prove([(adapter, 1.0)], folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a SentencePiece model: it has no pieces"),
        (b"\x0a\xff", "truncated, or not a SentencePiece model"),
        (b"\x0a\x02\x0a\x05", "piece 0: truncated, or not a SentencePiece model"),
        (b"\x08\x01", "piece 0: not a SentencePiece model: a number is in place of a message"),
        (b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01\xff", "piece 1: not UTF-8 text"),
        (b"\x0a\x02\x08\x01", "piece 0: its text, score or type is not one that SentencePiece writes"),
        (b"\x0a\x02\x18\x09", "piece 0: its text, score or type is not one that SentencePiece writes"),
        (b"\x0a\x03\x0a\x01a", "a SentencePiece model of another kind than BPE, which llama.cpp would merge as BPE"),
    ],
)
def test_a_broken_tokenizer_model_is_refused(tmp_path: Path, raw: bytes, message: str, llama: Any) -> None:
    shutil.copytree(llama[0], tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").write_bytes(raw)
    with pytest.raises(AdapterhubError, match=rf"tokenizer\.model: {message}"):
        written(tmp_path / "hf", tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["tekken.json", "vocab.json", "spiece.model"])
def test_a_tokenizer_in_another_file_is_named(tmp_path: Path, name: str, llama: Any) -> None:
    shutil.copytree(llama[0], tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(b"{}")
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    says = f"hf: its only tokenizer is {name}, which is not supported. Save it with transformers as tokenizer.json"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "there", "says"),
    [
        ("GemmaForCausalLM", "tokenizer.json", "llama.cpp's gemma reads its vocabulary from tokenizer.model, which is missing"),
        ("GPT2LMHeadModel", "tokenizer.model", "llama.cpp's gpt2 reads its vocabulary from tokenizer.json, which is missing"),
    ],
)
def test_a_tokenizer_file_that_llama_cpp_does_not_read_for_a_family_is_not_enough(
    tmp_path: Path, name: str, there: str, says: str
) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / there).write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}')
    with pytest.raises(RefusedError, match=f"{says}. Copy it from the original model"):
        written(tmp_path / "hf", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "there", "message"),
    [
        ("Glm4ForCausalLM", ["<|endoftext|>"], "tokenizer.json: the added token <|user|> of GLM-4 is missing"),
        ("Glm4MoeForCausalLM", ["[gMASK]"], "tokenizer.json: the added token <|user|> of GLM-4.5 is missing"),
    ],
)
def test_a_token_that_a_family_needs_and_lacks_is_named(tmp_path: Path, name: str, there: list[str], message: str) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    tokens = [{"id": number, "content": text} for number, text in enumerate(there)]
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Lfm2ForCausalLM", {"layer_types": None}, "layer_types does not have one entry for each of 2 layers"),
        ("Qwen3_5ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types does not have one entry for each of 2 layers"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar is 17, but llama.cpp's gemma2 uses 16"),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG, "short_factor": [1.0]}},
            "long_factor and short_factor of the rotary embedding do not have 8 numbers each",
        ),
        ("LlamaForCausalLM", {"num_hidden_layers": 1 << 31}, "num_hidden_layers is 2147483648, not a number from 1 to 10,000"),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, "num_attention_heads is 0, not a number from 1 to 1,048,576"),
        ("ApertusForCausalLM", {"head_dim": 1 << 31}, "head_dim is 2147483648, not a number from 1 to 1,048,576"),
        (
            "Cohere2ForCausalLM",
            {"rotary_pct": -1},
            "rope.dimension_count of the GGUF would be -16, which does not fit into UINT32",
        ),
        (
            "Lfm2ForCausalLM",
            {"num_key_value_heads": 1 << 31},
            r"attention.head_count_kv of the GGUF would be \[.*, which does not fit into \[INT32\]",
        ),
    ],
)
def test_a_config_of_numbers_that_no_model_of_its_family_has_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **config)
    with pytest.raises(RefusedError, match=f"config.json: {message}"):
        written(tmp_path / "hf", tmp_path / "out.gguf")


def test_kinds_of_layers_by_an_interval_are_those_of_a_list(tmp_path: Path) -> None:
    need_module("transformers")
    tiny.model("Qwen3_5ForCausalLM").save_pretrained(tmp_path / "hf")
    listed = contents(written(tmp_path / "hf", tmp_path / "listed.gguf"))
    changed(tmp_path / "hf", layer_types=None, full_attention_interval=2)
    keys, tensors = contents(written(tmp_path / "hf", tmp_path / "interval.gguf"))
    assert keys.pop("qwen35.full_attention_interval")[1] == 2
    assert listed[0].pop("qwen35.full_attention_interval")[1] == 4
    assert (keys, tensors) == listed


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "message"),
    [
        (
            "Qwen2MoeForCausalLM", "model.layers.1.mlp.experts.0.up_proj.weight", None,
            "the tensor of expert 0 for llama.cpp's blk.1.ffn_up_exps is missing, and others up to 3 are there",
        ),
        (
            "Qwen2MoeForCausalLM", "model.layers.1.mlp.experts.2.up_proj.weight", (4, 4),
            "model.layers.1.mlp.experts.2.up_proj.weight (4, 4): other experts have",
        ),
        (
            "ApertusForCausalLM", "model.layers.1.mlp.act_fn.beta", None,
            "layer 1 has no tensor of one number for llama.cpp's xielu.beta",
        ),
    ],
)  # fmt: skip
def test_a_part_of_a_layer_that_is_missing_is_named(
    tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...] | None, message: str
) -> None:
    need_module("transformers")
    folder = tmp_path / "hf"
    tiny.model(name).save_pretrained(folder)
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        tensors = {one: np.array(file.tensor(one)) for one in file.tensors}
    del tensors[tensor]
    if shape:
        tensors[tensor] = np.zeros(shape, np.float32)
    safetensors_file.write(folder / "model.safetensors", tensors, {})
    with pytest.raises(RefusedError) as caught:
        written(folder, tmp_path / "out.gguf")
    assert message in str(caught.value)


def test_the_commands_report_what_they_do(tmp_path: Path, run: Run, llama: Any) -> None:
    from adapterhub_converters.formats import peft

    folder, adapter = llama
    (tmp_path / "adapter").mkdir()
    peft.write(adapter, tmp_path / "adapter")
    asked = ("merge", tmp_path / "adapter", "--into", folder, "-o", "x.gguf", "--dtype", "f16", "--json")
    planned = json.loads(run(*asked, "--dry-run").stdout)
    assert not (tmp_path / "x.gguf").exists()
    assert {**planned, "output": "x.gguf"} == json.loads(run(*asked).stdout)
    assert (len(planned["touched"]), planned["tensors"]) == (15, 21)
    proven = run("verify-merge", "x.gguf", "--base", folder, "--adapter", tmp_path / "adapter")
    assert "21 tensors: 15 exact, 6 untouched" in proven.stdout


def test_a_whole_model_is_converted(tmp_path: Path, run: Run, llama: Any) -> None:
    stdout = run("convert", llama[0], "whole.gguf", "--to", "gguf", "--dtype", "q8_0").stdout
    assert "21 tensors" in stdout
    assert "changed" not in stdout
    assert "a GGUF base model is needed. Name the .gguf file" in run("convert", llama[0], "x", "--to", "hf", code=2).stderr
    assert "--rank" in run("convert", llama[0], "other.gguf", "--to", "gguf", "--rank", "2", code=2).stderr
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["whole.gguf"]


def test_rows_in_another_order_come_in_any_tiles(tmp_path: Path) -> None:
    from adapterhub.merging.into_base.folder_to_gguf import LaidOut, Piece
    from adapterhub.merging.into_base.tensor_files import OpenFiles, StoredRows
    from adapterhub.merging.into_base.tensor_types import kind
    from adapterhub_converters.formats.gguf_model.arrangement import SourcePart

    whole = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    safetensors_file.write(tmp_path / "w.safetensors", {"w": whole}, {})
    with safetensors_file.SafetensorsFile(tmp_path / "w.safetensors") as file:
        offset = file.tensors["w"].offset
    form = kind("F32")
    assert form
    stored = StoredRows(tmp_path / "w.safetensors", offset, 96, 5, form)
    picks = architecture_lookup.permute_rows(np.arange(96), 4)
    laid = LaidOut((Piece(SourcePart("w", 0, 96, picks=picks), stored), Piece(SourcePart("w", 10, 20), stored)), 116, 5, 1.0)
    expected = np.concatenate([whole[picks], whole[10:30]]) + 1
    with OpenFiles() as opened:
        for start in range(0, 116, 7):
            out = np.empty((min(7, 116 - start), 5), np.float32)
            laid.read(opened, start, start + len(out), out, lambda _use, size: np.empty(size, np.uint8))
            assert np.array_equal(out, expected[start : start + 7])
