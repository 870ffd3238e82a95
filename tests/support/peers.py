"""Programs of other projects that the tests run: how to see whether one works, and what installs it.

    python tests/support/peers.py        # print the Debian packages that have them

It needs the standard library only, since that is what a machine has before anything is installed.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """A program, or a set of them that is installed together.

    Attributes:
        package: The Debian package that has it.
        check: The arguments of a call that succeeds only where it works, `{folder}` being an empty folder; None to look for
            the program only.
        needs: Packages without which it starts and then fails.
    """

    package: str
    check: tuple[str, ...] | None = ("--version",)
    needs: tuple[str, ...] = ()


_BUILDAH = ("--storage-driver=vfs", "--root={folder}/root", "--runroot={folder}/run", "from", "scratch")
_CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir={folder}", "--dump-dom", "about:blank")
PROGRAMS = {
    "bash": Program("bash"),
    "buildah": Program("buildah", _BUILDAH, ("netavark",)),
    "chromium": Program("chromium", _CHROMIUM),
    "cosign": Program("cosign", ("version",)),
    "curl": Program("curl"),
    "docker-compose": Program("docker-compose", ("version",)),
    "docker-registry": Program("docker-registry"),
    "fish": Program("fish", ("-c", "true")),
    "git": Program("git"),
    "git-lfs": Program("git-lfs", ("version",)),
    "groff": Program("groff"),
    "nginx": Program("nginx-light", ("-v",)),
    "node": Program("nodejs"),
    "npm": Program("npm"),
    "openssl": Program("openssl", ("version",)),
    "oras": Program("oras", ("version",)),
    "pg_ctl": Program("postgresql"),
    "skopeo": Program("skopeo"),
    "softhsm2-util": Program("softhsm2"),
    # A container may have it and forbid what it does.
    "strace": Program("strace", ("-f", "-qq", "-o", "{folder}/calls", "true")),
    "zsh": Program("zsh", ("-c", "true")),
}


@functools.cache
def problem(path: str, name: str) -> str:
    """Return why a program at a path does not work here, in one line; empty if it does. Each is tried once a process."""
    program = PROGRAMS.get(name)
    if program is None or program.check is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        words = [path, *(word.format(folder=folder) for word in program.check)]
        environment = {**os.environ, "HOME": folder}
        try:
            result = subprocess.run(
                words, check=False, capture_output=True, text=True, timeout=120, env=environment, cwd=folder
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{name} does not start ({error})"
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        return (
            ""
            if result.returncode == 0
            else f"`{Path(path).name} {' '.join(words[1:])}`: {lines[-1] if lines else result.returncode}"
        )


def install_command(name: str) -> str:
    """Return the command that installs a program; empty if this table does not know it."""
    program = PROGRAMS.get(name)
    return f"apt-get install {' '.join((program.package, *program.needs))}" if program else ""


def debian_packages() -> list[str]:
    """Return every package that the tests can use, sorted."""
    return sorted({package for program in PROGRAMS.values() for package in (program.package, *program.needs)})


def find(name: str) -> str | None:
    """Return the path of a program, those that Debian keeps off PATH included; None if it is not installed."""
    if name == "pg_ctl":
        versions = Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")
        newest = max(versions, key=lambda path: float(path.parent.parent.name), default=None)
        return str(newest) if newest else shutil.which(name)
    return shutil.which(name)


if __name__ == "__main__":
    sys.stdout.write(" ".join(debian_packages()) + "\n")
