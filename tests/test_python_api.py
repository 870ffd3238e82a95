"""The Python API: every example of docs/python.md and of the docstrings, its types, and what importing it costs."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.trust import keys
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.conftest import ROOT, need_module
from tests.support.adapters import write_adapter
from tests.training.conftest import tiny_base

__all__ = ["tiny_base"]


def adapter_on_tiny(path: Path, seed: int) -> Path:
    """A PEFT folder of rank 2 on the attention of the tiny base."""
    rng = np.random.default_rng(seed)
    widths = {"q_proj": 64, "v_proj": 32}
    write_adapter(path, seed, target_modules=list(widths))
    tensors = {}
    for layer in range(2):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(2, 64)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(width, 2)).astype(np.float32)
    safetensors_file.write(path / peft.WEIGHTS, tensors, {"format": "pt"})
    return path


@pytest.fixture
def place(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two adapters, their base, and the config of a training; the user has nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_base, tmp_path / "tiny")
    shutil.copytree(tiny_base, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "special_tokens*"))
    for seed, name in enumerate(("sql", "french")):
        adapter_on_tiny(tmp_path / name, seed)
    for name in ("team", "other"):
        keys.generate(tmp_path / name)
    for name, text in (("train", "abcdefgh"), ("heldout", "cdef")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * 8)
    (tmp_path / "letters.toml").write_text(
        '[base]\npath = "tiny"\n[data]\ntrain = ["train.jsonl"]\nheldout = ["heldout.jsonl"]\nsequence = 16\n'
        "[lora]\nr = 2\n[train]\nsteps = 30\nrows = 2\nthreads = 1\nlearning_rate = 0.01\n"
    )
    return tmp_path


def test_every_example_of_the_page_runs(place: Path) -> None:
    page = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)


def test_every_docstring_example_gives_the_documented_result(place: Path) -> None:
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = (
        "load", "read_base", "check", "convert", "convert_model", "merge", "push", "pull", "resolve", "Registry", "train",
        "evaluate", "open_trainer", "scan", "sign", "verify", "attest", "audit", "bom",
    )  # fmt: skip
    for name in names:
        (example,) = finder.find(getattr(ah, name), name, globs={"ah": ah, "print": lambda _: None})
        assert example.examples, name
        assert runner.run(example).failed == 0, name


def test_importing_it_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import adapterhub; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not {"numpy", "click", "torch", "sqlite3", "json", "adapterhub_converters"} & loaded
    assert [name for name in done.stdout.split() if name.startswith("adapterhub.")] == ["adapterhub.version"]


def test_every_public_name_is_there_and_listed() -> None:
    assert set(ah.__all__) <= set(dir(ah))
    for name in ah.__all__:
        assert getattr(ah, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ah.nothing


def test_the_api_passes_the_strict_type_checker_of_another_project(tmp_path: Path) -> None:
    need_module("mypy")
    (tmp_path / "theirs.py").write_text(STRANGER)
    done = subprocess.run(
        # The project's own settings skip libraries such as torch, which no public type comes from: a tenth of the time.
        [sys.executable, "-m", "mypy", "--strict", f"--config-file={ROOT}/pyproject.toml", "--cache-dir=cache", "theirs.py"],
        check=False, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "MYPYPATH": os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))},
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("theirs.py")]
    assert [line.replace("builtins.", "") for line in found] == ['theirs.py:25: note: Revealed type is "float"'], done.stdout


STRANGER = """
from pathlib import Path
import adapterhub as ah

adapter: ah.Adapter = ah.load("./sql")
targets: list[str] = adapter.targets
report: ah.Report = ah.check(Path("sql"), base="./tiny")
ok: bool = report.ok
loss: ah.LossReport = ah.convert("./sql", "sql.gguf", to="gguf")
both: ah.Combined = ah.merge(["./sql", "./french"], "./both", method="ties", density=0.2)
size: int = ah.merge("./sql", "./merged", into="./tiny").size
with ah.Registry("~/adapters") as registry:
    version: ah.Version = registry.push("./sql", "team/sql:prod")
    pulled: ah.Pulled = registry.pull("team/sql:prod", "./out")
    names: list[str] = [row.name for row in registry.search("text to sql", base="Qwen/Qwen3-0.6B")]
served: ah.Served = ah.resolve("team/sql", runtime="vllm", base="./tiny")
sent = ah.push("./sql", "oci://registry.example/team/sql:v2")
assert isinstance(sent, ah.Sent)
digest: str = sent.digest
ah.pull("hf://team/sql@main", "./out", workspace=ah.Workspace(tell=print))
ah.train("sql.toml", on_event=print)
signed: ah.Signature = ah.sign("./sql", "team.key")
attested: tuple[ah.Attested, ...] = ah.attest("team/sql", "team.key", fits="./tiny", parents=["team.pub"])
verified: ah.Verified = ah.verify("team/sql", keys=["team.pub", Path("keys")])
reveal_type(ah.evaluate("./sql", data="heldout.jsonl", base="./tiny").perplexity)
"""


def test_in_a_notebook_texts_of_others_are_escaped(place: Path) -> None:
    config = json.loads((place / "sql/adapter_config.json").read_text())
    (place / "sql/adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"<script>": 3}}))
    shown = ah.check("./sql")._repr_html_()
    assert "pattern-unused" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


_OPERATIONS = sorted((ROOT / "adapterhub/operations").glob("*.py"))
_LIBRARY = ["api", "local_registry", *(f"operations/{path.stem}" for path in _OPERATIONS)]


@pytest.mark.parametrize("name", _LIBRARY)
def test_nothing_of_it_reads_the_environment_prints_or_exits(name: str) -> None:
    tree = ast.parse((ROOT / "adapterhub" / f"{name}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    attributes = {f"{node.value.id}.{node.attr}" for node in nodes if isinstance(node.value, ast.Name)}
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not attributes & {"os.environ", "os.getenv", "sys.exit"}
    assert not calls & {"print", "exit", "input"}


def test_every_public_function_is_documented() -> None:
    for name in (
        "attest",
        "audit",
        "bom",
        "check",
        "convert",
        "convert_model",
        "evaluate",
        "generate",
        "load",
        "merge",
        "pull",
        "push",
        "read_base",
        "scan",
        "sign",
        "train",
        "verify",
    ):
        text = inspect.getdoc(getattr(ah, name)) or ""
        assert "Args:" in text, name
        assert "Example:" in text, name
        parameters = set(inspect.signature(getattr(ah, name)).parameters) - {"how"}
        assert [key for key in parameters if f"    {key}:" not in text] == [], name
