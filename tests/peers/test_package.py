"""The wheel and the sdist: the same bytes twice, with all that the program reads, and installable without an extra."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, need_program
from tests.support.environments import environment

pytestmark = pytest.mark.peer
TOOLS = ("build==1.6.1", "hatchling==1.27.0", "twine==7.0.0")
EPOCH = "1764115200"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """The sdist and the wheel made of it, of two builds in folders of different names, from a clone of the commit."""
    git, python, builds = need_program("git"), environment(*TOOLS), []
    for name in ("one", "another-name"):
        folder = tmp_path_factory.mktemp(name)
        subprocess.run([git, "clone", "-q", "--depth", "1", f"file://{ROOT}", folder / "clone"], check=True)
        command = [str(python), "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "clone")]
        subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH}, check=True, capture_output=True)
        (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
        builds.append((sdist, wheel))
    return builds


def test_two_builds_have_the_same_bytes(built: list[tuple[Path, Path]]) -> None:
    first, second = built
    assert [path.name for path in first] == ["adapterhub-0.1.0.tar.gz", "adapterhub-0.1.0-py3-none-any.whl"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_index_would_take_them(built: list[tuple[Path, Path]]) -> None:
    result = subprocess.run(
        [environment(*TOOLS), "-m", "twine", "check", "--strict", *built[0]], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.count("PASSED")) == (0, 2), result.stdout


def test_the_wheel_has_every_file_of_the_packages_and_no_other(built: list[tuple[Path, Path]]) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    packages = {
        "adapterhub/": "",
        "converters/adapterhub_converters/": "converters/",
        "schemas/adapterhub_schemas/": "schemas/",
    }
    expected = {path.removeprefix(cut) for path in listed for package, cut in packages.items() if path.startswith(package)}
    with zipfile.ZipFile(built[0][1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == expected
        assert max(info.date_time for info in wheel.infolist()) == min(info.date_time for info in wheel.infolist())


def test_the_sdist_has_what_its_tests_and_pages_need(built: list[tuple[Path, Path]]) -> None:
    with tarfile.open(built[0][0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "mkdocs.yml", "docs/reference.py", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "demo/", "site/")) or name.endswith(".pyc")]


def interpreter(version: str) -> str:
    """A Python of that version, if there is one that starts."""
    for name in (f"python{version}", *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip(f"no Python {version} is here")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_wheel_runs_without_an_extra_in_every_python(version: str, built: list[tuple[Path, Path]], tmp_path: Path) -> None:
    subprocess.run([interpreter(version), "-m", "venv", tmp_path / "venv"], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for words in (
        ["pip", "install", "-q", str(built[0][1])],
        ["adapterhub", "convert", "--list"],
        ["adapterhub", "explain", "pickle"],
    ):
        result = subprocess.run(
            [tmp_path / "venv/bin" / words[0], *words[1:]], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert result.returncode == 0, result.stderr
