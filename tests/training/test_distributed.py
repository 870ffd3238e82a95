"""Two processes, as torchrun starts them, learn what one does."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.conftest import Run  # noqa: E402
from tests.training.test_trainer import settings  # noqa: E402


def of_two() -> dict[str, str]:
    """What torchrun tells two processes that it starts, but for which each is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {"TORCHELASTIC_RUN_ID": "two", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}


def side_by_side(run: Run, path: Path) -> str:
    """As torchrun starts them, without the seconds that it and each of them take to import torch; tests/peers has torchrun."""
    told = of_two()
    environments = [told | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda env: run("train", path, "-o", "two", "--json", env=env), environments))
    return "".join(one.stdout for one in done)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_have_the_losses_of_one(shard: bool, run: Run, tmp_path: Path, tiny_base: Path) -> None:
    """Also where each holds half of the base: three rows a step, so that one process has a pass more to make."""
    two_learn_what_one_does(lambda path: side_by_side(run, path), tmp_path, tiny_base, shard=shard)


def two_learn_what_one_does(launch: Callable[[Path], str], tmp_path: Path, tiny_base: Path, *, shard: bool) -> None:
    """Compare a training with one that `launch` does in two processes, to the folder `two`; it returns their stdout."""
    path = settings(
        tmp_path, tiny_base, rows=3, micro_rows=1, evaluate_every=2, save_every=2, clip=0.5, checkpointing=shard, steps=4
    )
    words = f'name = "someone/tiny"\ndtype = "float32"\nshard = {json.dumps(shard)}'
    path.write_text(path.read_text().replace('name = "someone/tiny"', words))
    training.run(training.read_config(path), tmp_path / "one")
    assert json.loads(launch(path))["steps"] == 4  # one of the two speaks
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(logs[0]) == 4 + 3
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-6), one
    one, two = (peft_format.read(tmp_path / name).deltas for name in ("one", "two"))
    apart = [np.abs(one[name].lora_B - two[name].lora_B).max() / np.abs(one[name].lora_B).max() for name in one]
    assert max(apart) < 1e-4
    assert not list(tmp_path.glob("*.checkpoint.safetensors"))


TURNS = """
import os, sys
from pathlib import Path
os.environ["RANK"] = "1" if os.fork() else "0"
from adapterhub.training import distributed, train_config
from adapterhub.training.layers import nf4_matrix
from adapterhub.training.model import quantized_cache
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.loading import load
quantized, quantize = [], nf4_matrix.quantize
nf4_matrix.quantize = lambda *given: quantized.append(1) or quantize(*given)
base, adapter = train_config.BaseConfig(sys.argv[1]), train_config.LoRAConfig(r=2)
with distributed.process_group(), BaseFiles(Path(sys.argv[1]), Path("cache")) as files:
    entry = quantized_cache.entry_of(files, base, adapter)
    for _ in range(2):
        made = load(files, base, adapter, location="c.toml", entry=entry)
    counts = [distributed.total(len(quantized) * (distributed.process() == number)) for number in range(2)]
assert counts == [14, 0], counts
if os.environ["RANK"] == "1":
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_one_of_two_processes_quantizes_the_base_and_the_other_reads_what_it_has_written(learn: Run, tiny_base: Path) -> None:
    result = learn(TURNS, tiny_base, env=of_two())
    assert result.returncode == 0, result.stderr[-2000:]


HALVES = """
import os, sys
import torch
from adapterhub.training import distributed
from adapterhub.training.layers import expert_stacks, lora, nf4_matrix, variants
os.environ["RANK"] = "1" if os.fork() else "0"
torch.manual_seed(0)
matrix = nf4_matrix.quantize(torch.randn(7, 130))
with distributed.process_group():
    made = [lora.FrozenLinear(matrix, None), variants.DoRALinear(matrix, None, r=2, alpha=2)]
    for layer in made:
        layer.base = nf4_matrix.shardable(layer.base)
    block = torch.nn.Sequential(*made)
    nf4_matrix.shard(block, torch.device("cpu"))
    assert [layer.base.packed.to_local().numel() for layer in made] == [(228, 227)[distributed.process()]] * 2
    assert made[0].base.unsharded.packed.numel() == 0
    assert torch.equal(made[0].base.assemble().packed, matrix.packed)
    made[1].reset(torch.Generator().manual_seed(0))
    x = torch.randn(2, 130, requires_grad=True)
    counts = [[2, 0], [0, 2]][distributed.process()]
    whole = expert_stacks.Stack([matrix, matrix], transposed=False)(x, counts)
    stack = expert_stacks.Stack([nf4_matrix.shardable(matrix), nf4_matrix.shardable(matrix)], transposed=False)
    nf4_matrix.shard(stack, torch.device("cpu"))
    assert torch.equal(stack(x, counts), whole)  # each process has tokens for another expert
    stack(x, counts).sum().backward()
    assert [distributed.rounds(rows, 2) for rows in (0, 1, 4, 5, 9)] == [0, 1, 1, 2, 3]
    assert distributed.process() == int(os.environ["RANK"])
if distributed.process() == 1:
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_each_rank_holds_half_of_the_bytes(learn: Run) -> None:
    result = learn(HALVES, env=of_two())
    assert result.returncode == 0, result.stderr[-2000:]
