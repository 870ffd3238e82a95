"""A training opens each file of its base at most twice: for headers and small files, and for tensors; of its result, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.byte_tokenizer import write_tokenizer
from tests.support.opens import opens

# transformers opens config.json and the tokenizer's files itself, some of them several times: its opens are not counted.
TRANSFORMERS = """
import collections, json, os, sys
import transformers
opened = collections.Counter()
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened[os.path.basename(os.fsdecode(arguments[0]))] += 1
transformers.AutoConfig, transformers.AutoTokenizer
sys.addaudithook(count)
transformers.AutoConfig.from_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps(opened))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    numbers = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers, bos_token_id=1, eos_token_id=2))
    folder = tmp_path_factory.mktemp("opens") / "base"
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """A config with a copy of the base."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "t.jsonl").write_text('{"text": "a b c d e f"}\n' * 8)
    (tmp_path / "c.toml").write_text(
        '[base]\npath = "base"\n[data]\ntrain = "t.jsonl"\nsequence = 32\n[lora]\nr = 2\n[train]\nsteps = 1\nthreads = 1\n'
    )
    return tmp_path / "c.toml"


@pytest.fixture
def by_transformers(base: Path, learn: Run) -> dict[str, int]:
    """How often transformers alone opens each file of a base."""
    result = learn(TRANSFORMERS, base)
    assert result.returncode == 0, result.stderr[-2000:]
    document: dict[str, int] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("keys", ["", "cache = false"])
def test_each_base_file_is_opened_at_most_twice(
    keys: str, config: Path, by_transformers: dict[str, int], tmp_path: Path, run: Run
) -> None:
    config.write_text(config.read_text().replace('path = "base"\n', f'path = "base"\n{keys}\n'))

    def train(out: str) -> dict[str, int]:
        counted = opens(run, tmp_path, tmp_path, "train", "c.toml", "-o", out)
        names = [path.name for path in (tmp_path / "base").iterdir()]
        return {name: counted[f"base/{name}"] - by_transformers.get(name, 0) for name in names}

    counts = train("one")
    weights = [name for name in counts if name.endswith(".safetensors")]
    assert len(weights) > 1
    assert {name: count for name, count in counts.items() if count > 2} == {}
    assert {counts[name] for name in weights} == {2}
    if not keys:
        # The tensors now come from the quantized cache: of the base only headers are read.
        counts = train("two")
        assert {counts[name] for name in weights} == {1}


def test_each_file_of_the_trained_adapter_is_read_once(config: Path, tmp_path: Path, run: Run) -> None:
    counts = opens(run, tmp_path, tmp_path, "train", "c.toml", "-o", "one")
    result = {Path(path).name: count for path, count in counts.items() if "one.partial" in path}
    assert result.keys() >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "log.jsonl"}
    # Written, read for its manifest, and flushed to the disk.
    assert max(count for name, count in result.items() if name != "loss.png") <= 3, result
