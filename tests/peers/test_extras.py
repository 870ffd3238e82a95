"""Each extra alone: it does what it is for without the others, and what needs another names the line that installs it."""

from __future__ import annotations

import os
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, _environment
from tests.support.environments import environment
from tests.support.folders import adapter, base, pairs

pytestmark = pytest.mark.peer
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("", "hub", "serve", "postgres", "sign")  # those that take no minutes; `oidc` has the package of `sign`
ALSO = {"hub": "serve"}  # it brings the packages of another as well
# A command, and the extra that it needs.
COMMANDS = {
    "hub start --port 0": "hub",
    "serve team/* --base base --engine vllm --engine-url http://127.0.0.1:9": "serve",
    "key generate signing": "sign",
    "eval sql --data new.jsonl --base base": "train",
    "show sql --plot sql.png": "plot",
    "push sql s3://bucket/team/sql:prod": "objectstore",
}
# Without any, all of these work.
LIGHT = (
    "info",
    "validate sql --base base",
    "push sql team/sql --base base",
    "pull team/sql -o pulled",
    "convert sql sql-mlx --to mlx --base base",
    "merge sql sql --method linear -o both",
    "merge sql --into base -o merged",
    "fsck",
)


def python(extra: str) -> Path:
    """The Python with what `pip install 'adapterhub[EXTRA]'` brings, and nothing else."""
    return environment(*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else ()))


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_alone_does_what_it_is_for_and_names_the_extra_that_another_command_needs(extra: str, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    base(tmp_path / "base")
    program = [str(python(extra)), "-m", "adapterhub", "--registry", "registry"]

    def run(line: str) -> subprocess.CompletedProcess[str]:
        command = [*program, *line.split()]
        environment = {**_environment(tmp_path, None), "HOME": str(tmp_path)}
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        out = ""
        if line.startswith("hub start") and process.stdout and (out := process.stdout.readline()):
            os.killpg(process.pid, signal.SIGTERM)  # it serves
        remaining_output, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out + remaining_output, err)

    run("init registry")
    (tmp_path / "new.jsonl").write_text('{"text": "text"}\n')
    for line in LIGHT:
        result = run(line)
        assert result.returncode == 0, (line, result.stdout, result.stderr)
    for line, needed in COMMANDS.items():
        result = run(line)
        assert "Traceback" not in result.stderr
        if needed in (extra, ALSO.get(extra)):
            assert result.returncode != 9, (line, result.stderr)
        else:
            assert result.returncode == 9, (line, result.returncode, result.stdout, result.stderr)
            assert f"pip install 'adapterhub[{needed}]'" in result.stderr
