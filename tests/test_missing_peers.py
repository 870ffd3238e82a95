"""What a run says about programs and packages of others that are missing here, or installed in part."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, missing, need_program
from tests.support import peers, skips

SCRIPTS = {
    "fails": '#!/bin/sh\necho "libpeer.so.1: cannot open shared object file" >&2\nexit 127\n',
    "dies": "#!/bin/sh\nkill -9 $$\n",
    "is no program": "\x7fELF",
}
REASONS = {"fails": "libpeer.so.1: cannot open shared object file", "dies": "exit -9", "is no program": "Exec format error"}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("name", [name for name in peers.PROGRAMS if name != "pg_ctl"])
def test_a_program_that_is_there_and_does_not_run_is_missing_with_the_reason(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(SCRIPTS[kind])
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ADAPTERHUB_REQUIRE_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception) as caught:
        need_program(name)
    (line,) = skips.summary([str(caught.value)])
    assert line.startswith(f"    1 {name} (")
    assert REASONS[kind] in line
    assert line.endswith(f": {peers.install_command(name)}")


def test_postgresql_outside_path_is_tried_too(tmp_path: Path) -> None:
    (tmp_path / "pg_ctl").write_text(SCRIPTS["fails"])
    (tmp_path / "pg_ctl").chmod(0o755)
    assert peers.problem(str(tmp_path / "pg_ctl"), "pg_ctl") == f"`pg_ctl --version`: {REASONS['fails']}"


def test_a_program_whose_other_files_are_absent_is_missing(tmp_path: Path) -> None:
    (tmp_path / "pg_ctl").write_text("#!/bin/sh\n")
    (tmp_path / "pg_ctl").chmod(0o755)
    (tmp_path / "initdb").touch()
    assert peers.problem(str(tmp_path / "pg_ctl"), "pg_ctl") == "postgres isn't there"


def test_every_program_has_a_command_that_installs_it() -> None:
    assert [
        name
        for name in peers.PROGRAMS
        if not re.match(r"apt-get install \w|pip install \w|see https:", peers.install_command(name))
    ] == []


def test_tests_look_for_no_program_that_the_table_lacks() -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    named = {name for source in sources for name in re.findall(r'need_program\("([\w-]+)"\)', source)}
    assert named <= peers.PROGRAMS.keys()


def test_every_package_is_installed_by_its_own_name() -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    modules = {name for source in sources for name in re.findall(r'(?:need_module|importorskip)\("(\w+)', source)}
    packages = importlib.metadata.packages_distributions()
    named = {
        module: (re.findall(r"[\w-]+", peers.pip_command(module).replace("--no-deps", ""))[2], packages[module])
        for module in modules & packages.keys()
    }
    assert {module: pair for module, pair in named.items() if not _is_one_of(*pair)} == {}


def _is_one_of(package: str, distributions: list[str]) -> bool:
    return any(package.lower() == distribution.lower().replace("_", "-") for distribution in distributions)


@pytest.mark.parametrize("required", [True, False])
def test_where_all_peers_are_required_only_those_that_are_fail(required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_REQUIRE_PEERS", "1")
    with pytest.raises(pytest.fail.Exception if required else pytest.skip.Exception):
        missing("a peer", required=required)


def test_a_run_ends_with_a_line_for_each_peer_and_the_command_that_installs_it() -> None:
    reasons = [
        *["Skipped: oras isn't installed [apt-get install oras]"] * 3,
        "Skipped: buildah isn't installed: `buildah from scratch`: no [netavark] here [apt-get install buildah netavark]",
        *["could not import 'obstore': No module named 'obstore'"] * 2,
        "could not import 'moto.server': No module named 'moto'",
        "could not import 'torch': libtorch.so: cannot open",
        "could not import 'fcntl': No module named 'fcntl'",
        "needs fork",
    ]
    assert skips.summary(reasons) == [
        "    3 oras: apt-get install oras",
        "    2 obstore: pip install obstore",
        "    1 buildah (`buildah from scratch`: no [netavark] here): apt-get install buildah netavark",
        "    1 moto: pip install 'moto[server]'",
        "    1 torch (libtorch.so: cannot open): pip install torch",
        "    1 could not import 'fcntl': No module named 'fcntl'",
        "    1 needs fork",
    ]


def test_a_run_without_peers_prints_these_lines(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(
        "import pytest\nfrom tests.conftest import need_module, need_program\n"
        "def test_a():\n    need_program('oras')\n"
        "def test_b():\n    need_module('no_such_module')\n"
        "def test_c():\n    pytest.importorskip('no_such_module')\n"
    )
    words = ["-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull, tmp_path]
    environ = {key: value for key, value in os.environ.items() if key != "ADAPTERHUB_REQUIRE_PEERS"}
    environ |= {"PATH": "/nowhere", "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "converters", "schemas"))}
    result = subprocess.run([sys.executable, "-m", "pytest", *words], check=False, capture_output=True, text=True, env=environ)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.partition(" skipped tests ")[2].splitlines()[1:3]
    assert lines == ["    2 no_such_module: pip install no-such-module", "    1 oras: apt-get install oras"], result.stdout
