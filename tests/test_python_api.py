"""The Python API: every example of docs/python.md and of the docstrings, its types, and what importing it costs."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest

import adapterhub as ah
from adapterhub.cli.commands import merge
from adapterhub.merging.adapters.methods import METHODS, MergeMethod
from adapterhub.merging.into_base import merge_options, mixtures
from adapterhub.operations import train
from adapterhub.operations.merge_into import BaseWeights
from adapterhub.trust import keys
from adapterhub_converters import formats
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from adapterhub_converters.runtime_rules import RUNTIMES, RuntimeName
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
        "load", "read_base", "check", "convert", "convert_model", "merge", "merge_into", "push", "pull", "resolve", "Registry",
        "train", "evaluate", "open_trainer", "scan", "sign", "verify", "attest", "audit", "bom",
    )  # fmt: skip
    for name in names:
        (example,) = finder.find(getattr(ah, name), name, globs={"ah": ah, "print": lambda _: None})
        assert example.examples, name
        assert runner.run(example).failed == 0, name


def test_importing_it_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import adapterhub; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not {"numpy", "click", "torch", "sqlite3", "json"} & loaded
    modules = {name for name in result.stdout.split() if name.startswith("adapterhub")}
    assert modules == {"adapterhub", "adapterhub.version", "adapterhub_converters", "adapterhub_converters.lazy_imports"}


def test_every_public_name_is_there_and_listed() -> None:
    assert set(ah.__all__) <= set(dir(ah))
    for name in ah.__all__:
        assert getattr(ah, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ah.nothing


def strictly_checked(text: str, folder: Path) -> list[str]:
    """Return what mypy says about a file of another project."""
    need_module("mypy")
    (folder / "theirs.py").write_text(text)
    result = subprocess.run(
        # The project's own settings skip libraries such as torch, which no public type comes from: a tenth of the time.
        [sys.executable, "-m", "mypy", "--strict", f"--config-file={ROOT}/pyproject.toml", "--cache-dir=cache", "theirs.py"],
        check=False, capture_output=True, text=True, cwd=folder,
        env={**os.environ, "MYPYPATH": os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))},
    )  # fmt: skip
    return [line.replace("builtins.", "") for line in result.stdout.splitlines() if line.startswith("theirs.py")]


def test_the_api_passes_the_strict_type_checker_of_another_project_and_misspelled_words_do_not(tmp_path: Path) -> None:
    lines, last_line = strictly_checked(f"{STRANGER}{MISSPELLED}", tmp_path), len(STRANGER.splitlines())
    assert lines[0] == f'theirs.py:{last_line}: note: Revealed type is "float"'
    errors = [line for line in lines[1:] if ": error: " in line]
    assert [int(line.split(":")[1]) for line in errors] == [last_line + 1 + at for at in range(MISSPELLED.count("\n"))], lines
    assert all("[arg-type]" in line or "[list-item]" in line for line in errors)


def test_every_closed_set_of_words_of_the_api_is_that_of_its_table() -> None:
    assert get_args(formats.WrittenFormat) == tuple(name for name, row in formats.FORMATS.items() if row.writes)
    assert get_args(formats.PackageFormat) == tuple(formats.PACKAGES)
    assert {*get_args(formats.QuantizedDtype)} == {*merge_options.REQUANTIZE, *mixtures.MIXTURES}
    assert {*get_args(formats.FloatDtype)} == {*merge_options.DTYPES} == {*train._DTYPES} - {None}
    assert get_args(RuntimeName) == tuple(RUNTIMES)
    assert get_args(MergeMethod) == tuple(METHODS)
    onto = next(option.type for option in merge.merge.params if option.name == "onto")
    assert isinstance(onto, click.Choice)
    assert {*get_args(BaseWeights)} == {*onto.choices}


def test_the_file_of_another_project_calls_every_public_function() -> None:
    functions = {name for name in ah.__all__ if inspect.isfunction(getattr(ah, name))}
    assert functions == {name for name in functions if f"ah.{name}(" in STRANGER}


def test_every_public_function_returns_one_type() -> None:
    methods = (getattr(ah.Registry, name) for name in dir(ah.Registry) if not name.startswith("_"))
    functions = filter(inspect.isfunction, (*methods, *(getattr(ah, name) for name in ah.__all__)))
    assert [function.__qualname__ for function in functions if " | " in inspect.signature(function).return_annotation] == []


def test_every_error_of_the_formats_is_a_public_name() -> None:
    tree = ast.parse((ROOT / "converters/adapterhub_converters/errors.py").read_text())
    errors = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Error")}
    assert len(errors) > 10
    assert errors <= set(ah.__all__)


STRANGER = """
from pathlib import Path
import adapterhub as ah

base: ah.BaseSpec = ah.read_base("./tiny")
adapter: ah.Adapter = ah.load("./sql", base=base)
targets: list[str] = adapter.targets
manifest: ah.AdapterManifest = adapter.manifest
report: ah.Report = ah.check(Path("sql"), base="./tiny")
ok: bool = report.ok and ah.validate("./sql").ok
try:
    loss: ah.LossReport = ah.convert("./sql", "sql.gguf", to="gguf")
except (ah.OutputExistsError, ah.RefusedError) as error:
    code: int = error.exit_code
model: ah.ConvertedModel = ah.convert_model("./tiny", "tiny.gguf", to="gguf")
both: ah.MergeResult = ah.merge(["./sql", "./french"], "./both", method="ties", density=0.2)
merged: ah.MergeReport = both.report
fused: ah.ModelMergeReport = ah.merge_into("./sql", "./tiny", "./merged")
size: int = fused.size
described: ah.DescribeResult = ah.describe("./sql", license="MIT")
bill: ah.Bill = ah.bom("./sql", base="./tiny")
difference: ah.Difference = ah.diff("./sql", "./french")
scan: ah.Scan = ah.scan("./sql")
with ah.Registry("~/adapters") as registry:
    pushed: ah.PushResult = registry.push("./sql", "team/sql:prod", message="first", tags=["new"])
    version: ah.Version | None = pushed.version
    pulled: ah.PullResult = registry.pull("team/sql:prod", "./out", replace=True)
    row: ah.VersionRow = registry.search("text to sql", base="Qwen/Qwen3-0.6B")[0]
    shown: ah.VersionDocument = registry.show("team/sql")
    tags: list[str] = shown["tags"]
    lineage: ah.Lineage = registry.lineage("team/sql")
    entries: list[ah.Entry] = registry.log("team/sql")
    matches: ah.ContentMatches = registry.find("./sql")
    number: int = registry.deprecate("team/sql:v1", "overfits")
served: ah.PreparedVersion = ah.resolve("team/sql", runtime="vllm", base="./tiny")
sent: ah.PushResult = ah.push("./sql", "oci://registry.example/team/sql:v2", to=ah.Conversion("gguf", dtype="q8_0"))
digest: str = sent.digest
ah.pull("hf://team/sql@main", "./out", workspace=ah.Workspace(tell=print))
trained: ah.TrainingResult = ah.train("sql.toml", on_event=print)
with ah.open_trainer("sql.toml") as trainer:
    trainer.save()
generation: ah.Generation = ah.generate("./sql", "SELECT", base="./tiny")
signed: ah.Signature = ah.sign("./sql", "team.key")
attested: tuple[ah.VerifiedAttestation, ...] = ah.attest("team/sql", "team.key", fits="./tiny", parents=["team.pub"])
verified: ah.Verification = ah.verify("team/sql", keys=["team.pub", Path("keys")])
audit: ah.Audit = ah.audit("adapters")
ah.sign_checkpoint("adapters", "checkpoint.json", "team.key")
measured: ah.EvaluationResult = ah.evaluate("./sql", data="heldout.jsonl", base="./tiny")
reveal_type(measured.perplexity)
"""


# Each line has one word that is not in its closed set.
MISSPELLED = """\
ah.convert("./sql", "sql.gguf", to="ggfu")
ah.convert("./sql", "sql.gguf", to="gguf", dtype="q8")
ah.convert_model("./tiny", "tiny.gguf", to="gguf", dtype="q4_k_l")
ah.merge(["./sql", "./french"], "./both", method="tise")
ah.merge_into("./sql", "./tiny", "./merged", requantize="q9_0")
ah.merge_into("./sql", "./tiny", "./merged", onto="trained")
ah.check("./sql", runtimes=["vlm"])
ah.resolve("team/sql", runtime="llamacpp")
ah.push("./sql", "team/sql", to="pefft")
ah.pull("team/sql", to=ah.Conversion("gguf", dtype="f61"))
ah.evaluate("./sql", data="heldout.jsonl", base="./tiny", quantize="nf8")
report.count("errors")
difference.count("equal")
"""


def test_in_a_notebook_texts_of_others_are_escaped(place: Path) -> None:
    config = json.loads((place / "sql/adapter_config.json").read_text())
    (place / "sql/adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"<script>": 3}}))
    html = ah.check("./sql")._repr_html_()
    assert "pattern-unused" in html
    assert "&lt;script&gt;" in html
    assert "<script>" not in html


def test_in_a_notebook_every_table_has_numbers_and_sizes_for_people_and_no_repr(place: Path) -> None:
    adapter, difference = ah.load("./sql"), ah.diff("./sql", "./french")
    loss = ah.convert("./sql", "sql.raw.safetensors", to="raw")
    with ah.Registry("notebook") as registry:
        registry.push("./sql", "team/sql")
        versions = registry.list()
    merged = ah.merge_into("./sql", "./tiny", "./merged-in-a-notebook")
    tables = [value._repr_html_() for value in (adapter, adapter.manifest, difference, loss, versions, merged)]
    assert [table for table in tables if not table.startswith("<table>") or "&lt;" in table] == []
    assert [number for table in tables for number in re.findall(r"\d+\.\d{4,}|\b\d{5,}\b|null|\[\]", table)] == []
    assert "<caption>Adapter ./sql: 4 modules" in tables[0]
    assert "<td>repo " in tables[1]
    assert re.search(r"<td>[\d.]+%</td>", tables[2])
    assert re.search(r"<td>[\d.]+ kB</td>", tables[4])


def test_a_delta_shows_the_shapes_of_its_arrays_and_not_their_numbers(place: Path) -> None:
    assert repr(ah.load("./sql").deltas["model.layers.0.self_attn.q_proj"]) == (
        "<LowRank: lora_A (2, 64), lora_B (64, 2), alpha 4.0>"
    )


@pytest.mark.parametrize(("command", "function"), [("eval", "evaluate"), ("run", "generate"), ("rm", "Registry.remove")])
def test_the_name_of_a_command_leads_to_its_function(command: str, function: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{command}'. Did you mean: '{function}'?"):
        getattr(ah, command)
    assert callable(operator.attrgetter(function)(ah))


def test_what_dir_lists_is_public() -> None:
    assert [name for name in dir(ah) if not name.startswith("__")] == sorted(ah.__all__)


_OPERATIONS = sorted((ROOT / "adapterhub/operations").glob("*.py"))


@pytest.mark.parametrize("path", _OPERATIONS, ids=lambda path: str(path.stem))
def test_nothing_of_it_reads_the_environment_prints_or_exits(path: Path) -> None:
    tree = ast.parse(path.read_text())
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
        "merge_into",
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
