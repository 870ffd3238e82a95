"""Two processes under torchrun learn what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import train  # noqa: E402
from adapterhub_converters import peft as peft_format  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.train.test_train import settings  # noqa: E402


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_have_the_losses_of_one(shard: bool, tmp_path: Path, tiny_base: Path) -> None:
    """Also where each holds half of the base: three rows a step, so that one process has a pass more to make."""
    path = settings(tmp_path, tiny_base, rows=3, micro_rows=1, evaluate_every=2, save_every=2, clip=0.5, checkpointing=shard)
    words = f'name = "someone/tiny"\ndtype = "float32"\nshard = {json.dumps(shard)}'
    path.write_text(path.read_text().replace('name = "someone/tiny"', words))
    train.run(train.read_config(path), tmp_path / "one")
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "converters", "schemas")),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "adapterhub"]
    done = subprocess.run(
        [*command, "train", str(path), "-o", "two", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 6  # one of the two speaks
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(logs[0]) == 6 + 4
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-6), one
    one, two = (peft_format.read(tmp_path / name).deltas for name in ("one", "two"))
    apart = [np.abs(one[name].lora_B - two[name].lora_B).max() / np.abs(one[name].lora_B).max() for name in one]
    assert max(apart) < 1e-4
    assert not list(tmp_path.glob("*.checkpoint.safetensors"))


HALVES = """
import torch
from adapterhub.train import ranks
from adapterhub.train.layers import dora, experts, lora, nf4, shards
torch.manual_seed(0)
matrix = nf4.quantise(torch.randn(7, 130))
with ranks.joined():
    made = [lora.FrozenLinear(matrix, None), dora.DoRALinear(matrix, None, r=2, alpha=2)]
    for layer in made:
        layer.base = shards.part(layer.base)
    block = torch.nn.Sequential(*made)
    shards.divide(block, torch.device("cpu"))
    assert [layer.base.packed.to_local().numel() for layer in made] == [(228, 227)[ranks.number()]] * 2
    assert made[0].base.rest.packed.numel() == 0
    assert torch.equal(made[0].base.whole().packed, matrix.packed)
    made[1].reset(torch.Generator().manual_seed(0))
    x = torch.randn(2, 130, requires_grad=True)
    counts = [[2, 0], [0, 2]][ranks.number()]
    whole = experts.Stack([matrix, matrix], transposed=False)(x, counts)
    stack = experts.Stack([shards.part(matrix), shards.part(matrix)], transposed=False)
    shards.divide(stack, torch.device("cpu"))
    assert torch.equal(stack(x, counts), whole)  # each process has tokens for another expert
    stack(x, counts).sum().backward()
    assert [ranks.rounds(rows, 2) for rows in (0, 1, 4, 5, 9)] == [0, 1, 1, 2, 3]
    print("whole")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_each_rank_holds_half_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "halves.py").write_text(HALVES)
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "converters", "schemas")),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "halves.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.count("whole") == 2, done.stderr[-2000:]
