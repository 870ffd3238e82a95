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
    pair_environment = of_two()
    environments = [pair_environment | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda env: run("train", path, "-o", "two", "--json", env=env), environments))
    return "".join(result.stdout for result in results)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("rows", [1, 3])
def test_two_ranks_have_the_losses_of_one(rows: int, run: Run, tmp_path: Path, tiny_base: Path) -> None:
    """Also where one of them has no row of a step, or a pass less to make."""
    two_learn_what_one_does(lambda path: side_by_side(run, path), tmp_path, tiny_base, rows=rows)


def two_learn_what_one_does(launch: Callable[[Path], str], tmp_path: Path, tiny_base: Path, *, rows: int) -> None:
    """Compare a training with one that `launch` does in two processes, to the folder `two`; it returns their stdout."""
    path = settings(
        tmp_path, tiny_base, rows=rows, micro_rows=1, evaluate_every=2, save_every=2, clip=0.5, checkpointing=rows > 1, steps=4
    )
    path.write_text(path.read_text().replace('name = "someone/tiny"', 'name = "someone/tiny"\ndtype = "float32"'))
    training.run(training.read_config(path), tmp_path / "one")
    assert json.loads(launch(path))["steps"] == 4  # one of the two speaks
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(logs[0]) == 4 + 3
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-6), first
    first, second = (peft_format.read(tmp_path / name).deltas for name in ("one", "two"))
    apart = [np.abs(first[name].lora_B - second[name].lora_B).max() / np.abs(first[name].lora_B).max() for name in first]
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


ROWLESS = """
import os, sys
from pathlib import Path
os.environ["RANK"] = "1" if os.fork() else "0"
import numpy as np
from adapterhub.training import distributed, train_config
from adapterhub.training.data.packed_rows import Rows
from adapterhub.training.loop import heldout, loss, preference
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.loading import load
row = np.arange(9)[None]
rows = Rows(row[:, :-1], row[:, 1:], row[:, :-1] % 4)
with BaseFiles(Path(sys.argv[1])) as files:
    base = load(files, train_config.BaseConfig(sys.argv[1], dtype="float32"), None, location="c.toml")
def evaluate():
    return heldout.evaluate(base, rows, 2), preference.evaluate(base, rows, 2, train_config.PreferenceConfig("orpo"))
alone = evaluate()
with distributed.process_group():
    assert len(list(loss.passes(rows, 2))) == [1, 0][distributed.process()]
    assert evaluate() == alone
if os.environ["RANK"] == "1":
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_a_process_without_rows_gets_the_evaluations_of_all(learn: Run, tiny_base: Path) -> None:
    result = learn(ROWLESS, tiny_base, env=of_two())
    assert result.returncode == 0, result.stderr[-2000:]
