"""Pages of docs/ at work: their commands are run in turn, and print what the page shows.

A block of `console` has lines `$ COMMAND`, each with what it prints below it. Digests and numbers may differ, except those of
adapters and models, since a test has a tiny model; `…` stands for anything in a line, and alone for any lines. A block with a
title is a file, which is written.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.support.programs import write_program

# Programs that a reader has, and a test does not start.
NOT_RUN = ("llama-server ", "pip install ", "make ")
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_PORTS = {"8090": "hub start", "8000": "serve "}
_SECONDS = 300


@dataclass(frozen=True)
class Command:
    """A line that is typed, and what it prints."""

    typed: str
    printed: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A file that a page shows."""

    name: str
    text: str


def steps(page: str) -> Iterator[Command | Shown]:
    """The files and commands of a page, in order."""
    for language, title, text in _BLOCK.findall(page):
        if title:
            yield Shown(title, text)
        elif language == "console":
            for piece in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                typed, *printed = piece.splitlines()
                yield Command(typed, tuple(printed))


# How many adapters and models there are does not depend on their size.
_COUNT, _LETTERS = re.compile(r"\b\d+ (?=(?:adapters?|models)\b)"), str.maketrans("0123456789", "abcdefghij")


def _alike(line: str) -> str:
    """A line without what differs between a model of the page and a tiny one."""
    line = re.sub(r"sha256:(?:[0-9a-f]+…?|…)", "DIGEST", line)
    line = _COUNT.sub(lambda match: match[0].translate(_LETTERS), line)
    line = re.sub(r"-?\d[\d,.]*(?:e[+-]?\d+)?(?: ?(?:[kMGT]?B|[kM])\b)?", "N", line)
    return " ".join(line.split())


def expected(printed: tuple[str, ...]) -> re.Pattern[str]:
    """The pattern of an output like that of a page."""
    lines = [
        r"(?:.*\n)*?" if line.strip() == "…" else ".*".join(map(re.escape, _alike(line).split("…"))) + r"\n" for line in printed
    ]
    return re.compile("".join(lines) + r"\n*")


def as_printed(printed: tuple[str, ...], output: str) -> bool:
    """Whether an output is that of the page; a page that shows nothing allows all."""
    return not printed or expected(printed).fullmatch("".join(f"{_alike(line)}\n" for line in output.splitlines())) is not None


class Session:
    """A terminal in a folder: commands in turn, variables and the folder that they set, servers until it is closed.

    `run` runs `adapterhub` with words, in a folder, with variables, instead of a process that starts anew.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        ports: Mapping[str, int],
        run: Callable[[list[str], Path, dict[str, str]], subprocess.CompletedProcess[str]] | None = None,
    ) -> None:
        (folder / "bin").mkdir()
        wrapper = folder / "bin/adapterhub"
        write_program(wrapper, "-m", "adapterhub")
        path = os.pathsep.join([str(wrapper.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.folder, self.environment = folder, {**environment, "PATH": path, "HOME": str(folder / "home")}
        self._ports, self._run, self._code = ports, run, 0
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)

    def perform(self, step: Command | Shown) -> None:
        """Do a step of a page, or fail with what was printed instead."""
        if isinstance(step, Shown):
            path = self.folder / step.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text)
            return
        if step.typed.startswith(NOT_RUN):
            return
        output = self._typed(step)
        if self._code and not re.search("error|not ok|FAILED|MISSING", "\n".join(step.printed)):
            raise AssertionError(f"$ {step.typed}\nexit {self._code}\n{output}")
        if not as_printed(step.printed, output):
            raise AssertionError(f"$ {step.typed}\nprinted\n{output}\nand not\n" + "\n".join(step.printed))

    def _typed(self, step: Command) -> str:
        line = step.typed.replace("$?", str(self._code))
        for port, command in _PORTS.items():
            other_port = str(self._ports[port])
            line = line.replace(port, other_port).replace(command, f"{command.rstrip()} --port {other_port} ")
        if line.startswith("cd "):
            self.folder /= line.removeprefix("cd ")
            return ""
        if line.startswith("export "):
            name = line.removeprefix("export ").partition("=")[0]
            result = self._shell(f'{line}; printf %s "${name}"')
            self.environment[name] = result.stdout
            return ""
        if line.endswith(" &"):
            return self._served(line.removesuffix(" &"), step.printed)
        plain = line.startswith("adapterhub ") and not re.search(r"[|><*;&]|\$\(", line)
        words = shlex.split(line, comments=True)[1:]
        result = self._run(words, self.folder, self.environment) if plain and self._run else self._shell(f"{{ {line}\n}} 2>&1")
        self._code = result.returncode
        return result.stdout + result.stderr

    def _shell(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )

    def _served(self, line: str, printed: tuple[str, ...]) -> str:
        """Start a server, and wait until it has printed what the page shows."""
        log = self.folder / f"server-{len(self._servers)}.log"
        with open(log, "wb") as file:
            self._servers.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment, stdout=file, stderr=file,
                    start_new_session=True,
                )
            )  # fmt: skip
        deadline = time.monotonic() + _SECONDS
        while not as_printed(printed, log.read_text()):
            if time.monotonic() > deadline or self._servers[-1].poll() is not None:
                break
            time.sleep(0.05)
        return log.read_text()


def page(name: str) -> str:
    """The text of a page of docs/."""
    return (ROOT / "docs" / name).read_text()
