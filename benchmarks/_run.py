"""Run the scripts of this folder one after the other, and write a summary of what they measured to docs/benchmarks.md.

    python benchmarks/_run.py [NAME…] [-- OPTIONS OF THE SCRIPTS]
    python benchmarks/_run.py --tables

A name is that of a script, or of a script at other sizes (`OTHER_SIZES`). Its figures are in results/NAME.json with the date,
the machine, the versions of the peers, and the ratios in the last committed results; `--tables` prints them all, as the site
has them below the summary. What has been measured at this commit is not measured again unless it is named, so a run that was
interrupted goes on where it was; nor do results of other options count. Inputs stay in the temporary folder for the next.
Exit code 1 if a script failed or did not end in time; the page then has its earlier results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs/benchmarks.md"
BEGIN, END = "<!-- begin: make bench -->\n", "<!-- end: make bench -->\n"
SCRIPTS = sorted(path.stem for path in HERE.glob("[!_]*.py"))
OTHER_SIZES = {
    "serve-float32": ["--dtype", "float32", "--only", "batch"],
    "serve-1.1B": ["--base", "1.1B", "--only", "batch", "--steps", "8", "--rounds", "1"],
    "train-1024": ["--sequence", "1024"],
    "train-1.1B": ["--base", "1.1B", "--checkpointing", "--steps", "5", "--rounds", "1"],
}
NAMES = [*SCRIPTS, *OTHER_SIZES]
_ALONE = {"growth"}  # it compares adapterhub with itself
_BAR = 12  # characters of a bar for a hundred times
_FALL = 0.9  # of the ratio of the last run: what is below is marked
_MAX_MINUTES = 20  # of a script


class Row(NamedTuple):
    """A row of the summary: our job, a peer's name, how many times ours its time is now and was in the last run."""

    job: str
    detail: str
    peer: str
    ratio: float
    last_ratio: float | None
    memory: str

    def __str__(self) -> str:
        last = "" if self.last_ratio is None else f"{times(self.last_ratio)} -> "
        return f"{self.job}: {self.detail}, {self.peer}: {last}{times(self.ratio)}{self.mark}"

    @property
    def mark(self) -> str:
        """An arrow if the ratio fell by more than a tenth."""
        return "" if self.last_ratio is None or self.ratio >= _FALL * self.last_ratio else " ▼"


def main(words: Sequence[str]) -> int:
    """Measure what is missing or named, and write the page."""
    if words == ["--tables"]:
        print(tables(RESULTS), end="")
        return 0
    names, extra_options = split(words)
    if unknown := sorted(set(names) - set(NAMES)):
        print(f"error: {', '.join(unknown)}: no such script; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or NAMES:
        options = [*OTHER_SIZES.get(name, []), *extra_options]
        if (names or not is_done(name, options)) and not measure(name, options):
            failed.append(name)
    PAGE.write_text(written(PAGE.read_text(), RESULTS))
    reports = reports_in(RESULTS)
    print(*rows({name: reports[name] for name in names or NAMES if name in reports}), sep="\n")
    print(f"wrote {PAGE.relative_to(HERE.parent)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The scripts that are named, and what follows `--`."""
    at = [*words, "--"].index("--")
    return list(words[:at]), list(words[at + 1 :])


def commit() -> str:
    """The commit of this checkout, or empty outside of git."""
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def is_done(name: str, options: Sequence[str]) -> bool:
    """Whether there are results of this commit with these options."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return False
    report = json.loads(path.read_text())
    return bool(commit()) and (report["commit"], report["options"]) == (commit(), list(options))


def script(name: str) -> str:
    """The file of the script of a name."""
    return f"{name.partition('-')[0]}.py"


def measure(name: str, options: Sequence[str]) -> bool:
    """Run a script, and keep its results if it succeeds in time."""
    RESULTS.mkdir(exist_ok=True)
    print(f"-> {name}", flush=True)
    inputs = Path(tempfile.gettempdir()) / "adapterhub-bench"
    partial = RESULTS / f".{name}.json"
    command = [sys.executable, str(HERE / script(name)), "--json", str(partial), "--dir", str(inputs), *options]
    start = time.monotonic()
    try:
        subprocess.run(command, check=True, timeout=60 * _MAX_MINUTES)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        partial.unlink(missing_ok=True)
        print(f"error: {name}: {error}", file=sys.stderr)
        return False
    minutes = round((time.monotonic() - start) / 60, 1)
    report = {"commit": commit(), "options": list(options), "minutes": minutes, **json.loads(partial.read_text())}
    add_last_ratios(report, committed_report(name))
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.rename(RESULTS / f"{name}.json")
    return True


def committed_report(name: str) -> dict[str, Any]:
    """Return the report of a script that the last commit has, empty if it has none."""
    command = ["git", "show", f"HEAD:./results/{name}.json"]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return json.loads(result.stdout) if result.returncode == 0 else {}


def add_last_ratios(report: dict[str, Any], last_report: dict[str, Any]) -> None:
    """Add to each program of a report its ratio in the last one, if that was run with the same options."""
    if report["options"] != last_report.get("options"):
        return
    last_ratios = {(row.job, row.peer): row.ratio for row in rows({"last": last_report})}
    for result in report["results"]:
        for peer, program in result["programs"].items():
            if (result["job"], peer) in last_ratios:
                program["last_ratio"] = last_ratios[result["job"], peer]


def reports_in(results: Path) -> dict[str, dict[str, Any]]:
    """The reports of a folder by the names of their scripts."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("[!.]*.json"))}


def tables(results: Path) -> str:
    """Return the Markdown of all figures, a section for each script."""
    return "".join(f"{line}\n" for name, report in reports_in(results).items() for line in section(name, report))


def written(page: str, results: Path) -> str:
    """The page with the summary of the results between its marks."""
    before, begin, after_begin = page.partition(BEGIN)
    _, end, after = after_begin.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE}: the marks are missing")
    return before + BEGIN + "".join(f"{line}\n" for line in summary(reports_in(results))) + END + after


def summary(reports: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A row for each program that others wrote."""
    yield from ("### Summary", "", "| job | against | last run | times | peak MB, ours and theirs |")
    yield "| --- | --- | ---: | ---: | ---: |"
    last_label = ""
    for row in rows(reports):
        label = f"{row.job}: {row.detail}"
        last = "" if row.last_ratio is None else times(row.last_ratio)
        cells = "" if label == last_label else cell(label), cell(row.peer), last, f"{times(row.ratio)}{row.mark}", row.memory
        yield f"| {' | '.join(cells)} |"
        last_label = label
    yield ""


def rows(reports: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Yield a row for each program that others wrote, with its first ratio."""
    for name, report in reports.items():
        for result in report["results"] if name not in _ALONE else ():
            our_figures = result["programs"]["adapterhub"].get("figures", {})
            for peer, program in result["programs"].items():
                if peer.startswith("adapterhub") or not program.get("ratios"):
                    continue
                ratios = next(iter(program["ratios"].values())), program.get("last_ratio")
                yield Row(result["job"], result["detail"], peer, *ratios, memory(our_figures, program["figures"]))


def memory(our_figures: dict[str, float], their_figures: dict[str, float]) -> str:
    """The peaks of both: those of the servers, where these are what is compared."""
    column = next((column for column in ("server MB", "peak MB") if column in our_figures and column in their_figures), None)
    return (
        ""
        if column is None or our_figures[column] == their_figures[column]
        else f"{figure(our_figures[column])}, {figure(their_figures[column])}"
    )


def section(name: str, report: dict[str, Any]) -> Iterator[str]:
    """The lines of one script."""
    yield from (f"### {name}", "")
    options = f" {' '.join(report['options'])}" if report["options"] else ""
    sizes = ", ".join(
        f"{key.replace('_', '-')} {value}" for key, value in report["sizes"].items() if value not in (None, False)
    )
    minutes = f", in {report['minutes']} minutes" if "minutes" in report else ""
    yield f"`benchmarks/{script(name)}{options}` on {report['date']}{minutes}, {report['machine']}; {sizes}."
    if report["versions"]:
        yield f"With {', '.join(f'{peer} {version}' for peer, version in report['versions'].items())}."
    if "--smoke" in report["options"]:
        yield "At the smallest sizes, which only show that the script runs: **the figures mean nothing.**"
    for result in report["results"]:
        yield from ("", f"**{result['job']}**: {result['detail']}", "")
        yield from table(result["programs"])
        for claim, holds in result["claims"].items():
            yield from ("", f"{claim[0].upper()}{claim[1:]}: {'yes' if holds else '**no**'}.")
    yield ""


def table(programs: dict[str, Any]) -> Iterator[str]:
    """A row for each program: its figures, and how many times ours its time is, as a number and a bar."""
    columns = next((list(program["figures"]) for program in programs.values() if "figures" in program), [])
    first = next(iter(columns), "")
    yield f"| program | {' | '.join(columns)} | times | |"
    yield f"| --- |{' ---: |' * (len(columns) + 1)} --- |"
    for name, program in programs.items():
        if "missing" in program:
            yield f"| {cell(name)} | missing: {cell(program['missing'])} |{' |' * (len(columns) + 1)}"
            continue
        ratio = program["ratios"].get(first)
        figures = " | ".join(figure(program["figures"].get(column)) for column in columns)
        yield f"| {cell(name)} | {figures} | {'' if ratio is None else times(ratio)} | {bar(ratio or 1.0)} |"


def figure(value: float | None) -> str:
    """A number with what digits mean something."""
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio with two digits, or all of a large one."""
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.2g}×"


def bar(ratio: float) -> str:
    """A bar on a logarithmic scale: an eighth at once or less, the whole for a hundred times or more."""
    from math import log10

    return "▇" * max(1, min(_BAR, round(_BAR * log10(max(ratio, 1.0)) / 2)))


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
