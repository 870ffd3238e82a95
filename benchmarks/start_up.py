"""The fixed cost of twelve commands on an adapter of 1 MB, against `python -c "import numpy"`, whole processes in turn.

    python benchmarks/start_up.py [--rounds 9]

CPU seconds come first, since they hardly depend on what else the machine does. The base has the shape of a model of 28 million
parameters, and holes for weights. A push finds no registry, a pull no folder. `tests/cli/test_start_up.py` counts the modules
that such commands load and the functions that they call.
"""

from __future__ import annotations

import sys

from _bench import OURS, Bench, Figures, Program, main, timed
from _models import adapter, base

NUMPY = 'python -c "import numpy"'
MODEL, RANK = "28M", 8
# The paths of two adapters, of the base and of the output take the places of the words in capitals.
COMMANDS = {
    "list": "",
    "tag": "team/sql prod",
    "log": "team/sql",
    "info": "",
    "pull": "team/sql -o OUTPUT",
    "show": "team/sql",
    "validate": "ADAPTER",
    "validate --base": "BASE ADAPTER",
    "push": "ADAPTER team/sql",
    "convert --to mlx": "ADAPTER OUTPUT",
    "convert --to gguf": "ADAPTER OUTPUT --base BASE",
    "merge": "ADAPTER SECOND -o OUTPUT",
}
JOBS = {f"fixed cost of {command}": [NUMPY] for command in COMMANDS}


def commands(bench: Bench) -> None:
    """Measure each command between two imports of numpy."""
    output, registry, empty = (bench.scratch / name for name in ("output", "registry", "empty"))
    paths = {
        "ADAPTER": bench.input_folder(adapter, MODEL, RANK),
        "SECOND": bench.input_folder(adapter, MODEL, RANK // 2),
        "BASE": bench.input_folder(base, MODEL, values=False),
        "OUTPUT": output,
    }
    timed([*OURS, "push", str(paths["ADAPTER"]), "team/sql"], {"ADAPTERHUB_REGISTRY": str(registry)})
    numpy = Program(NUMPY, [sys.executable, "-c", "import numpy"])
    for job, (command, arguments) in zip(JOBS, COMMANDS.items(), strict=True):
        words = [str(paths.get(word, word)) for word in f"{command} {arguments}".split()]
        environment = {"ADAPTERHUB_REGISTRY": str(empty if command == "push" else registry)}
        turns = bench.turns(Program("adapterhub", [*OURS, *words], env=environment), numpy, fresh=[output, empty])
        bench.add(job, "1 MB, CPU time", {name: _cpu_first(figures) for name, figures in turns.items()})


def _cpu_first(figures: Figures | str) -> Figures | str:
    """Put the CPU seconds, whose ratio the summary has, before the wall time."""
    return figures if isinstance(figures, str) else {"CPU seconds": figures["CPU seconds"], **figures}


if __name__ == "__main__":
    main(__doc__, JOBS, commands, rounds=(9, 1))
