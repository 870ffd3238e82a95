"""A version for a runtime: what it reads, or an error with a check's code; one folder, whoever asks and however it ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.project.policy import Policy
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub.serve.resolving import served_folder
from adapterhub_converters.adapter import LowRank
from adapterhub_converters.errors import AdapterhubError, IntegrityError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import peft
from adapterhub_converters.runtime_rules import RUNTIMES, RuntimeName
from tests.conftest import need_module
from tests.registry.forks import finished, fork, under_strace
from tests.support.folders import Shapes, adapter, base, pairs

QV: Shapes = {**pairs(2), **pairs(2, module="model.layers.{}.self_attn.v_proj")}
OTHER = pairs(1, module="model.layers.{}.other.x_proj")
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ah.Workspace:
    """A registry without adapters, a cache, and a base in the folder `base`."""
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")
    return ah.Workspace(registry="registry", policy=None, cache="cache")


def push_adapter(workspace: ah.Workspace, shapes: Shapes = QV, ref: str = "team/sql", **config: Any) -> str:
    """Push an adapter of its own; its digest."""
    folder = Path(ref.replace("/", "-").replace(":", "-") + str(len([*Path.cwd().iterdir()])))
    return str(ah.push(adapter(folder, shapes, **config), ref, workspace=workspace).digest)


def files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, inodes and times of all that is below a folder."""
    return sorted((str(path), path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


def product(delta: object) -> np.ndarray:
    """What a delta adds to the weight."""
    assert isinstance(delta, LowRank)
    return np.asarray(delta.scaling * (delta.lora_B.astype(np.float64) @ delta.lora_A))


def resolve_ref(workspace: ah.Workspace, runtime: Any = "vllm", ref: str = "team/sql") -> PreparedVersion:
    return ah.resolve(ref, runtime=runtime, base="base", workspace=workspace)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_runtime_gets_the_function_that_was_pushed_in_its_own_format(workspace: ah.Workspace, runtime: str) -> None:
    digest = push_adapter(workspace, use_rslora=True)
    served = resolve_ref(workspace, runtime)
    assert (served.ref, served.name, served.digest, served.rank) == ("team/sql:v1", "team/sql", digest, 2)
    assert served.model == f"team/sql@{digest}"
    assert served.path.is_relative_to(Path.cwd() / "cache/served" / digest.replace(":", "-"))
    loaded, source = ah.load(served.path), ah.load("team/sql", workspace=workspace)
    assert loaded.targets == source.targets
    for target, delta in source.deltas.items():
        np.testing.assert_allclose(product(loaded.deltas[target]), product(delta), rtol=1e-5)
    if RUNTIMES[runtime].format == "peft" and runtime != "sglang":
        assert (served.path / peft.WEIGHTS).read_bytes() == next(Path.cwd().glob("team-sql*")).joinpath(
            peft.WEIGHTS
        ).read_bytes()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("stored", ["gguf", "mlx"])
def test_a_version_in_another_format_is_served_all_the_same(
    workspace: ah.Workspace, stored: Literal["gguf", "mlx"], runtime: RuntimeName
) -> None:
    push_adapter(workspace)
    ah.push("team/sql", "team/other", to=stored, base="base", workspace=workspace)
    served, source = resolve_ref(workspace, runtime, "team/other"), ah.load("team/sql", workspace=workspace)
    assert served.path.is_file() == (runtime == "llama.cpp")
    assert ah.load(served.path, base="base").targets == source.targets
    for target, delta in ah.load(served.path, base="base").deltas.items():
        np.testing.assert_allclose(product(delta), product(source.deltas[target]), rtol=1e-5)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("vllm", ["--enable-lora", "--max-lora-rank", "8", "--lora-modules"]),
        (
            "sglang",
            ["--enable-lora", "--lora-strict-loading", "--max-lora-rank", "2", "--lora-target-modules", "q_proj", "v_proj"],
        ),
        ("llama.cpp", ["--lora"]),
        ("mlx", ["--adapter-path"]),
        ("peft", []),
        ("transformers", []),
    ],
)
def test_the_flags_are_those_that_the_runtime_needs(workspace: ah.Workspace, runtime: str, words: list[str]) -> None:
    push_adapter(workspace)
    served = resolve_ref(workspace, runtime)
    assert list(served.flags[: len(words)]) == words
    if runtime in ("vllm", "sglang"):
        module = json.loads(served.flags[-1])
        assert {served.model, str(served.path)} <= set(module.values())
    else:
        assert not words or served.flags[1] == str(served.path)


def sglang(folder: Path) -> dict[str, np.ndarray]:
    """The deltas that SGLang computes: it scales by lora_alpha / r, and has room for r rows (sglang/srt/lora/lora.py)."""
    config = json.loads((folder / peft.CONFIG).read_text())
    assert isinstance(config["target_modules"], list)
    scaling = config["lora_alpha"] / config["r"]
    tensors: dict[str, np.ndarray] = {}
    for target, delta in ah.load(folder).deltas.items():
        assert isinstance(delta, LowRank)
        assert delta.lora_A.shape[0] == config["r"]
        tensors[target] = scaling * (delta.lora_B.astype(np.float64) @ delta.lora_A)
    return tensors


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (QV, {"use_rslora": True}),
        (QV, {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
        ({**QV, **pairs(1, r=3)}, {"rank_pattern": {"layers.0.self_attn.q_proj": 3}}),
        ({**QV, **pairs(1, r=3)}, {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "use_rslora": True}),
        (QV, {"target_modules": ".*(q_proj|v_proj)"}),
    ],
)
def test_what_sglang_reads_of_a_config_is_all_there_is(workspace: ah.Workspace, shapes: Shapes, config: dict[str, Any]) -> None:
    push_adapter(workspace, shapes, **config)
    served = resolve_ref(workspace, "sglang")
    source = ah.load("team/sql", workspace=workspace)
    computed = sglang(served.path)
    assert computed.keys() == source.deltas.keys()
    for target, delta in source.deltas.items():
        np.testing.assert_allclose(computed[target], product(delta), rtol=1e-5)
    written = json.loads((served.path / peft.CONFIG).read_text())
    assert not any(written.get(key) for key in ("use_rslora", "rank_pattern", "alpha_pattern"))
    assert served.rank == written["r"] == max(shape[0] for name, shape in shapes.items() if "lora_A" in name)


def test_rslora_is_a_note_and_an_alpha(workspace: ah.Workspace) -> None:
    push_adapter(workspace, use_rslora=True)
    served = resolve_ref(workspace, "sglang")
    assert [note for note in served.notes if "rsLoRA" in note] == [f"rsLoRA is folded into lora_alpha {4 * math.sqrt(2):.9g}"]


@pytest.mark.parametrize(
    ("runtime", "shapes", "config", "code", "says"),
    [
        ("vllm", {**QV, **OTHER}, {}, "runtime", "vllm: refused: expected target modules"),
        ("sglang", {**QV, **OTHER}, {}, "no-such-module", "such as model.layers.0.other.x_proj"),
        ("peft", {**QV, **OTHER}, {}, "no-such-module", "such as model.layers.0.other.x_proj"),
        ("vllm", pairs(3), {}, "base-shallower", "vllm: ignored"),
        ("vllm", pairs(2, size=(16, 8)), {}, "shape-mismatch", "such as model.layers.0.self_attn.q_proj"),
        ("llama.cpp", pairs(2, size=(16, 8)), {}, "shape-mismatch", "llama.cpp: refused"),
        (
            "vllm",
            {**pairs(1), f"{Q0}.lora_magnitude_vector": (8,)},
            {"use_dora": True},
            "runtime",
            "vLLM does not yet support DoRA",
        ),
        ("vllm", pairs(2, r=600), {"r": 600}, "rank-above-max", "supports ranks up to 512"),
        ("sglang", pairs(2), {}, "runtime", "q_proj without v_proj"),
    ],
)
def test_what_would_not_be_applied_is_refused_and_leaves_nothing(
    workspace: ah.Workspace, runtime: str, shapes: Shapes, config: dict[str, Any], code: str, says: str
) -> None:
    push_adapter(workspace, shapes, **config)
    with pytest.raises(RefusedError) as caught:
        resolve_ref(workspace, runtime)
    assert caught.value.exit_code == 6
    assert caught.value.code == code
    assert says in str(caught.value)
    assert caught.value.where == "team/sql:v1"
    assert [*Path("cache/served").glob("*/*")] == []


def test_it_is_made_once_and_never_written_again(workspace: ah.Workspace) -> None:
    push_adapter(workspace)
    first = resolve_ref(workspace)
    before = files(Path("cache/served"))
    assert resolve_ref(workspace) == first
    assert ah.resolve(first.model, runtime="vllm", base="base", workspace=workspace).path == first.path
    assert files(Path("cache/served")) == before
    assert {path.stat().st_mode & 0o222 for path in [first.path, *first.path.iterdir()]} == {0}


def test_a_file_of_the_adapter_that_is_named_as_ours_does_no_harm(workspace: ah.Workspace) -> None:
    folder = adapter(Path("odd"), QV)
    (folder / "served.json").write_text("{}")
    ah.push(folder, "team/sql", workspace=workspace)
    assert resolve_ref(workspace) == resolve_ref(workspace)
    assert len([*Path("cache/served").glob("*/*")]) == 1


def test_a_gguf_is_a_base_too(workspace: ah.Workspace) -> None:
    from tests.support import tiny

    need_module("torch")
    model = tiny.model()
    tiny.adapter(model, Path("real"), target_modules=["q_proj", "v_proj"])
    ah.push("real", "team/sql", workspace=workspace)
    tiny.write_gguf(tiny.model(), Path("base.gguf"))
    served = ah.resolve("team/sql", runtime="llama.cpp", base="base.gguf", workspace=workspace)
    assert served.path.name == "adapter.gguf"
    tiny.write_gguf(tiny.model(vocab_size=64), Path("base.gguf"))
    assert ah.resolve("team/sql", runtime="llama.cpp", base="base.gguf", workspace=workspace).path != served.path


def test_a_tag_that_moves_leads_to_another_folder_and_the_old_one_stays(workspace: ah.Workspace) -> None:
    push_adapter(workspace, ref="team/sql:prod")
    old = resolve_ref(workspace, ref="team/sql:prod")
    before = files(old.path)
    push_adapter(workspace, ref="team/sql:prod", lora_alpha=8)
    new = resolve_ref(workspace, ref="team/sql:prod")
    assert (old.ref, new.ref) == ("team/sql:v1", "team/sql:v2")
    assert old.path != new.path
    assert files(old.path) == before


def test_another_base_is_another_folder(workspace: ah.Workspace) -> None:
    push_adapter(workspace)
    base(Path.cwd() / "other", vocab=16)
    paths = {ah.resolve("team/sql", runtime="vllm", base=base, workspace=workspace).path for base in ("base", "other", None)}
    assert len(paths) == 3
    assert "not compared with a base model" in ah.resolve("team/sql", runtime="vllm", workspace=workspace).notes


def test_of_processes_that_resolve_at_once_all_get_the_same_folder(workspace: ah.Workspace) -> None:
    digest = push_adapter(workspace)

    def work() -> None:
        assert resolve_ref(workspace, "llama.cpp").digest == digest

    assert finished([fork(work) for _ in range(4)]) == [0] * 4
    (folder,) = Path("cache/served").glob("*/*")
    assert resolve_ref(workspace, "llama.cpp").path.parent == folder.absolute()


@pytest.mark.parametrize("calls", [1, 3, 6, 10])
@pytest.mark.parametrize("call", ["write", "rename", "fsync"])
def test_a_process_that_is_killed_leaves_nothing_that_is_half(workspace: ah.Workspace, call: str, calls: int) -> None:
    push_adapter(workspace)
    code = under_strace(f"{call}:signal=SIGKILL:when={calls}", lambda: resolve_ref(workspace, "llama.cpp"))
    assert code in (0, -signal.SIGKILL)
    served = resolve_ref(workspace, "llama.cpp")
    assert len(ah.load(served.path).deltas) == 4
    folders = [path for path in served.path.parent.parent.iterdir() if not path.name.startswith(".")]
    assert folders == [served.path.parent]
    for leftover in folders[0].parent.glob(".*"):
        os.utime(leftover, (1, 1))
    served_folder(workspace).sweep()
    assert [*folders[0].parent.iterdir()] == folders


def test_a_damaged_registry_is_an_error_and_not_a_folder(workspace: ah.Workspace) -> None:
    push_adapter(workspace)
    for blob in Path("registry/.adapterhub/blobs/sha256").iterdir():
        if blob.stat().st_size > 1000:
            blob.chmod(0o644)
            blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        resolve_ref(workspace)
    assert [*Path("cache/served").glob("*/*")] == []


def test_addresses_are_pulled_once(workspace: ah.Workspace) -> None:
    digest = push_adapter(workspace)
    ah.push("team/sql", "layout://sql.tar:v1", workspace=workspace)
    served = resolve_ref(workspace, ref="layout://sql.tar:v1")
    assert served.digest == digest
    local = resolve_ref(workspace)
    assert local.path == served.path  # the same bytes for the same runtime
    with pytest.raises(NotFoundError):
        resolve_ref(workspace, ref="layout://sql.tar:v2")
    assert resolve_ref(workspace, ref=f"layout://sql.tar@{digest[:20]}").digest == digest
    with pytest.raises(AdapterhubError):
        resolve_ref(workspace, ref="layout://sql.tar@sha256:5f5f")
    pinned = f"layout://sql.tar@{digest}"
    shutil.move("sql.tar", "gone.tar")
    with pytest.raises(NotFoundError):  # what was removed there is served no longer, though its files are here
        resolve_ref(workspace, ref=pinned)


def test_the_policy_of_the_project_is_asked(workspace: ah.Workspace) -> None:
    push_adapter(workspace)
    strict = ah.Workspace(registry="registry", policy=Policy("p", licenses=("Apache-2.0",)), cache="cache")
    with pytest.raises(RefusedError, match="license"):
        resolve_ref(strict)


def test_a_ref_is_a_version_though_there_is_a_path_of_that_name(workspace: ah.Workspace) -> None:
    digest = push_adapter(workspace)
    adapter(Path("team"), pairs(1)).rename("sql")
    Path("team").mkdir()
    Path("sql").rename("team/sql")
    assert resolve_ref(workspace).digest == digest


@pytest.mark.parametrize(
    ("ref", "error", "says"),
    [
        ("team/none", NotFoundError, "no such adapter"),
        ("team/sql:v9", NotFoundError, "team/sql:v9"),
        ("./base", UsageError, "./base: a path, and only versions are served. Push it first"),
        ("sql", UsageError, "is not namespace/name"),
    ],
)
def test_what_is_no_version_is_an_error_in_one_line(
    workspace: ah.Workspace, ref: str, error: type[AdapterhubError], says: str
) -> None:
    push_adapter(workspace)
    with pytest.raises(error, match=says):
        resolve_ref(workspace, ref=ref)


def test_a_runtime_that_is_unknown_is_named_with_those_that_are_known(workspace: ah.Workspace) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'ollama'. Known runtimes: peft, transformers, vllm"):
        resolve_ref(workspace, "ollama")


def test_a_collection_spares_what_a_server_holds(workspace: ah.Workspace) -> None:
    push_adapter(workspace)
    served, folder = resolve_ref(workspace), served_folder(workspace)
    with folder.open_lease() as lease:
        lease.add(served)
        assert folder.sweep(unused=-1).in_use == 1
        assert served.path.is_dir()
    assert folder.sweep(unused=-1).folders == 1
    assert not served.path.exists()
