"""What commands load before they do their work: most of the time of a small job is that of imports.

A bound that is far above what is measured is lowered in the same change, so that what was gained once is not lost unnoticed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub.operations.local_registry import Registry
from tests.support import folders

_CODE = """
import collections, json, sys
calls = collections.Counter()
def count(frame, event, _):
    if event == "call":
        calls[frame.f_globals.get("__name__", "").partition(".")[0]] += 1
from adapterhub.cli.main import run
sys.setprofile(count)
code = run(json.loads(sys.argv[1]))
sys.setprofile(None)
packages = ("adapterhub", "adapterhub_converters", "adapterhub_schemas")
modules = [name for name in sys.modules if name.partition(".")[0] in packages]
with open(sys.argv[2], "w") as file:
    counts = {"modules": len(modules), "calls": sum(calls[name] for name in packages), "numpy": "numpy" in sys.modules}
    json.dump({"code": code, **counts}, file)
"""
# Command to the most modules of adapterhub that it loads, and the most of our functions that it calls.
_BOUNDS = {
    ("list",): (112, 1900),
    ("tag", "team/sql:v1", "prod"): (114, 2600),
    ("log", "team/sql"): (109, 1950),
    ("info",): (107, 2000),
    ("pull", "team/sql", "-o", "out"): (111, 2750),
    ("validate", "sql"): (108, 5950),
    ("validate", "sql", "--base", "base"): (184, 12000),
    ("show", "team/sql"): (165, 5950),
    ("push", "sql", "team/other"): (167, 9250),
    ("convert", "sql", "mlx", "--to", "mlx"): (131, 6600),
    ("convert", "sql", "out.gguf", "--base", "base"): (203, 13500),
    ("merge", "sql", "sql2", "-o", "merged"): (209, 11200),
}
# The import of numpy takes as long as one of these commands.
_WITHOUT_NUMPY = {"list", "tag", "log", "info", "pull", "push", "validate"}


@pytest.mark.parametrize("command", _BOUNDS, ids=" ".join)
def test_a_command_loads_no_more_than_it_did(command: tuple[str, ...], tmp_path: Path) -> None:
    folders.adapter(tmp_path / "sql", folders.pairs(2))
    folders.adapter(tmp_path / "sql2", folders.pairs(2))
    folders.base(tmp_path / "base")
    with Registry(tmp_path / "registry") as registry:
        registry.push(tmp_path / "sql", "team/sql")
    environment = {**os.environ, "ADAPTERHUB_REGISTRY": str(tmp_path / "registry"), "HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", _CODE, json.dumps(command), "counts.json"]
    result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["code"] == 0, result.stderr
    modules, calls = _BOUNDS[command]
    assert 0.9 * modules <= counts["modules"] <= modules
    assert 0.8 * calls <= counts["calls"] <= calls
    assert counts["numpy"] == (command[0] not in _WITHOUT_NUMPY or "--base" in command)


def test_the_garbage_collector_runs_while_a_command_works_and_skips_what_was_imported(tmp_path: Path) -> None:
    code = (
        "import gc, sys\n"
        "from adapterhub.__main__ import main\n"
        "sys.argv[1:] = ['list']\n"
        "try:\n    main()\n"
        "finally:\n    print(gc.isenabled(), gc.get_freeze_count() > 10_000, file=sys.stderr)\n"
    )
    environment = {**os.environ, "ADAPTERHUB_REGISTRY": str(tmp_path), "HOME": str(tmp_path)}
    with Registry(tmp_path):
        pass
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "True True"
