"""The clients of the Hugging Face Hub as their users have them: versions of huggingface_hub, and @huggingface/hub."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import need_program
from tests.support.environments import environment, node_packages

# huggingface_hub with hf-xet, where its own requirement allows that one, and without.
CLIENTS: list[tuple[str, str | None]] = [
    ("0.36.2", None), ("0.36.2", "1.5.2"), ("0.36.2", "1.8.0"),
    ("1.16.4", None), ("1.16.4", "1.5.2"), ("1.16.4", "1.8.0"),
    ("1.20.0", None), ("1.20.0", "1.5.2"), ("1.20.0", "1.8.0"),
    ("1.33.0", None), ("1.33.0", "1.8.0"),
    ("2.4.0", None), ("2.4.0", "1.8.0"),
]  # fmt: skip
JAVASCRIPT = "2.17.5"


def name(client: tuple[str, str | None]) -> str:
    """A client's name in the ids of tests."""
    version, xet = client
    return f"{version}-xet-{xet}" if xet else f"{version}-no-xet"


@dataclass(frozen=True)
class HubClient:
    """A huggingface_hub in an environment of its own, whose caches and logins are in a folder of its own.

    Attributes:
        version: Of huggingface_hub.
        xet: Of hf-xet; None where it isn't installed.
        python: The Python of its environment.
        home: Its HF_HOME; calls share it, as those of a user do.
    """

    version: str
    xet: str | None
    python: Path
    home: Path

    @classmethod
    def create(cls, version: str, xet: str | None, home: Path) -> HubClient:
        """The client of these versions, installed if need be."""
        client = f"huggingface_hub=={version}"
        python = environment(client, f"hf-xet=={xet}") if xet else environment(client, without=("hf-xet",))
        return cls(version, xet, python, home)

    def hf(
        self, endpoint: str, *words: object, env: dict[str, str] | None = None, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run `hf WORDS…` against the hub at `endpoint`."""
        return _call([self.python.parent / "hf", *words], self._environ(endpoint, env), self.home.parent, code)

    def script(
        self, endpoint: str, text: str, *words: object, env: dict[str, str] | None = None, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of Python that imports huggingface_hub; `words` are its sys.argv[1:]."""
        return _call([self.python, "-c", text, *words], self._environ(endpoint, env), self.home.parent, code)

    def _environ(self, endpoint: str, variables: dict[str, str] | None) -> dict[str, str]:
        silent = dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "NO_COLOR"), "1")
        return _clean() | silent | {"HF_HOME": str(self.home), "HF_ENDPOINT": endpoint} | (variables or {})


@dataclass(frozen=True)
class JavaScriptClient:
    """@huggingface/hub under node."""

    folder: Path

    @classmethod
    def create(cls, version: str = JAVASCRIPT) -> JavaScriptClient:
        """The client of a version, installed if need be."""
        need_program("node")
        return cls(node_packages(f"@huggingface/hub@{version}"))

    def script(self, text: str, *words: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a module of JavaScript that imports @huggingface/hub; `words` are its process.argv.slice(1)."""
        return _call(["node", "--input-type=module", "--eval", text, "--", *words], _clean(), self.folder, code)


def _clean() -> dict[str, str]:
    """The environment without what would change a client, or have it find our modules."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH", "XDG_"))}


def _call(command: list[object], env: dict[str, str], cwd: Path, code: int | None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    result = subprocess.run(words, check=False, capture_output=True, text=True, timeout=240, env=env, cwd=cwd)
    assert code in (None, result.returncode), f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result
