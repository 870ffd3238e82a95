"""Run programs on the same work in turn, report their medians and ratios, and check them.

The programs alternate, so a machine that slows down slows all of them. A run counts from fork to exit, imports included,
because that is what a user waits for. Peak memory is the kernel's `ru_maxrss` of the child, which on Linux starts at what
the parent held (`exec_mmap` in fs/exec.c): so a script imports nothing heavy, and runs a function that does in a process
of its own (`process`, `call`).

Without options a script measures at the sizes of docs/benchmarks.md. Every script takes

    --smoke            the smallest sizes, one round: seconds in all, and figures that mean nothing
    --json FILE        write the tables as JSON too
    --only PART…       run some parts of the script
    --against PEER…    run only peers whose names contain one of these words
    --dir DIR          work in DIR, and keep the inputs there for the next run

and its own sizes. A peer that is not installed is reported as missing. The exit code is 1 if a figure makes no sense or
the outputs of two programs differ where they must not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = (sys.executable, "-m", "adapterhub")
PATHS = [str(path) for path in (ROOT, ROOT / "converters", ROOT / "schemas")]
sys.path[:0] = PATHS
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    "PYTHONPATH": os.pathsep.join(PATHS),
    "PYTHONDONTWRITEBYTECODE": "",  # bytecode is kept between runs, as it is for an installed package
    "HF_HUB_OFFLINE": "1",
}
_MAX_RATIO = 1e6  # times
_RESULT = "result of the process: "

Figures = dict[str, float]
"""Column to value; the last word of a column is its unit."""

# How a ratio to ours is read: the peer needs so many times more, or is so many times slower.
COSTS, RATES = {"seconds", "ms", "MB", "%", "requests", "pairs"}, {"MB/s", "GB/s", "tokens/s", "requests/s"}


@dataclass(frozen=True)
class Program:
    """A command under the name that docs/benchmarks.md has for it, and the programs and Python packages that it needs.

    One that measures `itself` is a `process` of a function that returns its figures.
    """

    name: str
    command: Sequence[str]
    needs: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    itself: bool = False

    def run(self) -> Figures:
        """The figures of one run."""
        figures, output = timed(self.command, self.env)
        return {**_result(output), "peak MB": figures["peak MB"]} if self.itself else figures


def lacking(needs: Iterable[str]) -> str:
    """The programs and Python packages among these that are not installed."""
    return ", ".join(
        need
        for need in needs
        if not shutil.which(need, path=ENVIRONMENT["PATH"]) and not (need.isidentifier() and importlib.util.find_spec(need))
    )


def timed(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[Figures, str]:
    """Run a command once: seconds, CPU seconds (of its children too) and peak memory; its output. A failure raises with it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**ENVIRONMENT, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{output[-3000:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "CPU seconds": usage.ru_utime + usage.ru_stime, "peak MB": peak / 1e6}, output


def process(function: Callable[..., Any], *arguments: object, python: object = sys.executable, **options: object) -> list[str]:
    """The command that calls a function of one of these files with JSON values, or paths as strings."""
    module = Path(function.__code__.co_filename).stem
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import {module}; words, options = json.loads(sys.argv[1]); "
    code += f"print({_RESULT!r} + json.dumps({module}.{function.__name__}(*words, **options)))"
    return [str(python), "-c", code, json.dumps([arguments, options], default=str)]


def call(function: Callable[..., Any], *arguments: object, **options: object) -> Any:
    """The result of a function that runs in a process of its own."""
    return _result(timed(process(function, *arguments, **options))[1])


def _result(output: str) -> Any:
    return json.JSONDecoder().raw_decode(output.rpartition(_RESULT)[2])[0]


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def medians(rounds: Sequence[Figures]) -> Figures:
    """The median of each column."""
    return {column: statistics.median(figures[column] for figures in rounds) for column in rounds[0]}


class Bench:
    """One run of a script: its options, a folder to work in, and the results so far.

    `jobs` are those of the script, each with the names of its peers.
    """

    def __init__(self, jobs: Mapping[str, Sequence[str]], options: argparse.Namespace, scratch: Path) -> None:
        self.jobs, self.options, self.scratch = jobs, options, scratch
        self.results: list[dict[str, Any]] = []
        self.needs: set[str] = set()
        self._columns: list[str] = []

    def input_folder(self, function: Callable[..., None], *arguments: object, **options: object) -> Path:
        """The folder that `function(folder, …)` fills, unless an earlier run with the same `--dir` did."""
        words = [function.__name__, *map(str, arguments), *(f"{name}={value}" for name, value in options.items())]
        folder = (self.options.dir or self.scratch) / "-".join(words)
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            call(function, partial, *arguments, **options)
            partial.rename(folder)
        return folder

    def turns(self, *programs: Program, fresh: Sequence[Path] = ()) -> dict[str, Figures | str]:
        """The median figures of each program, or what it lacks, after a round that is not counted.

        `fresh` are files and folders that the programs make; they are removed before each round.
        """
        words = self.options.against
        chosen = [
            program
            for program in programs
            if program.name == "adapterhub" or not words or any(word in program.name for word in words)
        ]
        lacks = {program.name: lacking(program.needs) for program in chosen}
        self.needs.update(need for program in chosen for need in program.needs if not lacks[program.name])
        rounds: dict[str, list[Figures]] = {program.name: [] for program in chosen}
        count = self.options.rounds
        for _ in range(count + (count > 1)):
            for path in fresh:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for program in chosen:
                if not lacks[program.name]:
                    rounds[program.name].append(program.run())
        return {name: lacks[name] or medians(runs[-count:]) for name, runs in rounds.items()}

    def add(
        self, job: str, detail: str, figures_by_program: Mapping[str, Figures | str], claims: Mapping[str, bool] | None = None
    ) -> None:
        """Record and print the figures of a job; a string instead of figures is what a program lacks."""
        if undeclared := set(figures_by_program) - {"adapterhub", *self.jobs[job]}:
            raise ValueError(f"{', '.join(sorted(undeclared))}: not among the declared peers of {job!r}")
        ours = figures_by_program["adapterhub"]
        programs = {
            name: {"missing": outcome}
            if isinstance(outcome, str)
            else {"figures": outcome, "ratios": _ratios(ours, outcome, name)}
            for name, outcome in figures_by_program.items()
        }
        self.results.append({"job": job, "detail": detail, "programs": programs, "claims": dict(claims or {})})
        self._print(self.results[-1])

    def _print(self, result: dict[str, Any]) -> None:
        print(f"\n{result['job']}: {result['detail']}; median of {self.options.rounds}")
        columns = next((list(program["figures"]) for program in result["programs"].values() if "figures" in program), [])
        if columns != self._columns:
            self._columns = columns
            print((" " * 46 + "".join(f"{column:>12}{'':8}" for column in columns)).rstrip())
        for name, program in result["programs"].items():
            cells = ""
            for column, value in program.get("figures", {}).items():
                times = program["ratios"].get(column)
                ratio = "" if times is None else f"{times:.{1 if times >= 1 else 2}f}x"
                cells += f"{f'{value:,.0f}' if value >= 1000 else f'{value:.4g}':>12}{ratio:>8}"
            print(f"  {name:44}{cells or 'missing: ' + program['missing']}".rstrip())
        for claim, holds in result["claims"].items():
            print(f"  {claim}: {'yes' if holds else 'NO'}", flush=True)

    def problems(self) -> list[str]:
        """Everything that makes no sense in the results."""
        messages = []
        for result in self.results:
            messages += [f"{result['job']}: not true: {claim}" for claim, holds in result["claims"].items() if not holds]
            for name, program in result["programs"].items():
                for column, value in {**program.get("figures", {}), **program.get("ratios", {})}.items():
                    # A program may need no temporary files and no memory beyond its imports.
                    least = 0.0 if column in ("temporary MB", "grown MB") else math.ulp(0.0)
                    if not (math.isfinite(value) and value >= least):
                        messages.append(f"{result['job']}: {name}: {column} is {value}")
        if not (self.options.only or self.options.against):
            reported = {(result["job"], name) for result in self.results for name in result["programs"]}
            declared = {(job, name) for job, peers in self.jobs.items() for name in ("adapterhub", *peers)}
            messages += [f"{job}: {name}: not measured" for job, name in sorted(declared - reported)]
        return messages


def _ratios(ours: Figures | str, theirs: Figures, name: str) -> Figures:
    """How many times better ours is, by column."""
    if isinstance(ours, str) or name == "adapterhub":
        return {}
    kinds = {column: column.split()[-1] for column in theirs if ours.get(column) and theirs[column]}
    ratios = {
        column: theirs[column] / ours[column] if kind in COSTS else ours[column] / theirs[column]
        for column, kind in kinds.items()
        if kind in COSTS | RATES
    }
    # Of next to nothing, such as a few bytes of temporary files, anything is a million times.
    return {column: ratio for column, ratio in ratios.items() if ratio < _MAX_RATIO}


def machine() -> str:
    """The processor, how many threads of it there are, and how many processes wanted them just now."""
    try:
        names = [
            line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} × {name}" + (f" with a load of {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "")


def versions(needs: Iterable[str]) -> dict[str, str]:
    """The versions of the Python packages among what programs need; a program tells its own in no common way."""
    installed_versions = {}
    for need in sorted(needs):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed_versions[need] = importlib.metadata.version(need)
    return installed_versions


def main(doc: str | None, jobs: Mapping[str, Sequence[str]], *parts: Callable[[Bench], None], **sizes: tuple[Any, Any]) -> None:
    """The command line of a script: run its parts. `sizes` are its options, each with its usual and its smallest value."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.__name__ for part in parts], help="%(choices)s")
    parser.add_argument("--against", nargs="+", metavar="PEER", help="words in the names of peers")
    parser.add_argument("--dir", type=Path, help="work here, and keep the inputs")
    for name, (usual, _) in sizes.items():
        kind: dict[str, Any] = {"action": "store_true", "default": None} if usual is False else {"type": type(usual)}
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"default: {usual}", **kind)
    options = parser.parse_args()
    for name, (usual, smallest) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, smallest if options.smoke else usual)
    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="adapterhub-bench-", dir=options.dir) as scratch:
        bench = Bench(jobs, options, Path(scratch).resolve())
        for part in parts:
            if not options.only or part.__name__ in options.only:
                part(bench)
    if options.json:
        report = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine(),
            "versions": versions(bench.needs),
            "sizes": {name: getattr(options, name) for name in sizes},
            "results": bench.results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit("\n".join(f"error: {problem}" for problem in bench.problems()) or 0)
