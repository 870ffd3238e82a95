"""Pipes and devices in the place of files: every command says which one it is, and none waits for a writer."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.registry.registry import Registry
from adapterhub_converters.containers import open_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, RefusedError

Run = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[..., Path]


def pipe(path: Path) -> Path:
    """Put a pipe in the place of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.fixture
def registry(tmp_path: Path, make: Make, run: Run) -> Path:
    """A registry with one version."""
    folder = tmp_path / "registry"
    Registry.init(folder).close()
    run("push", make(), "team/sql", cwd=folder)
    return folder


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter.json", "README.md", "adapter.toml"]
)
@pytest.mark.parametrize("command", ["validate", "push", "search --file", "verify", "convert"])
def test_no_command_waits_for_a_pipe_in_an_adapter(run: Run, make: Make, registry: Path, command: str, name: str) -> None:
    adapter = make("piped")
    pipe(adapter / name)
    extra_arguments = {"push": ("team/new",), "convert": (registry / "out", "--to", "mlx")}.get(command, ())
    result = run(*command.split(), adapter, *extra_arguments, cwd=registry, code=None)
    assert result.returncode in (0, 1, 3, 4, 6)
    if command == "push":
        assert result.returncode == 6


@pytest.mark.parametrize(
    "words", [("validate", "PIPE"), ("convert", "PIPE", "out", "--to", "peft"), ("search", "--file", "PIPE"), ("train", "PIPE")]
)
def test_no_command_waits_for_a_pipe_that_is_named(started: Run, registry: Path, words: tuple[str, ...]) -> None:
    path = pipe(registry / "x-lora.safetensors")
    result = started(*(path if word == "PIPE" else word for word in words), cwd=registry, code=None)
    assert result.returncode not in (0, 70)
    assert len(result.stderr.splitlines()) == 1 or words[0] == "validate"


@pytest.mark.parametrize(("name", "words"), [("adapters.lock", ("pull", "--locked")), ("adapterhub.toml", ("list",))])
def test_a_pipe_in_the_place_of_a_file_of_the_project_is_refused(
    run: Run, registry: Path, name: str, words: tuple[str, ...]
) -> None:
    pipe(registry / name)
    result = run(*words, cwd=registry, code=6)
    assert result.stderr.count("\n") == 1
    assert f"{name}: a pipe or a device" in result.stderr


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("registry.db", None),
        (".adapterhub/index.json", None),
        (".adapterhub/oci-layout", None),
        (".adapterhub/pending/x.json", None),
        (".adapterhub/leases/x.lease", None),
        (".adapterhub/tmp/x", None),
        (".adapterhub/refs/team/sql/00000001.json", None),
        (".adapterhub/refs/team/sql/00000002.json", None),
        (".adapterhub/blobs/sha256/" + "0" * 64, None),
        (".adapterhub/packs/sha256/" + "0" * 64, None),
        (".adapterhub/tensors/sha256/" + "0" * 64, None),
    ],
)
def test_no_command_waits_for_a_pipe_in_a_store(run: Run, make: Make, registry: Path, place: str, code: int | None) -> None:
    pipe(registry / place)
    for words in (("list",), ("fsck",), ("gc",), ("verify", "team/sql"), ("push", make("more", seed=1), "team/sql")):
        result = run(*words, cwd=registry, code=code)
        assert result.returncode in (0, 1, 3, 4, 6, 8), (words, result.stderr)


@pytest.mark.parametrize("kind", [SafetensorsFile, GGUFFile])
def test_a_folder_in_the_place_of_weights_is_named(tmp_path: Path, kind: type[open_file.OpenFile]) -> None:
    with pytest.raises(FormatError, match=r"a folder, not a file\. Name a file in it") as caught:
        kind(tmp_path)
    assert (caught.value.where, caught.value.code) == (str(tmp_path), "not-a-regular-file")


def test_a_pipe_of_the_shell_is_read_where_the_user_names_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(writing, b"[train]"), os.close(writing)))
    writer.start()
    assert open_file.read_bytes(Path(f"/dev/fd/{reading}"), pipe=True) == b"[train]"
    writer.join()
    os.close(reading)
    (tmp_path / "data.jsonl").symlink_to("/dev/stdin")
    if not Path("/dev/stdin").is_file():
        with pytest.raises(RefusedError):
            open_file.read_bytes(tmp_path / "data.jsonl", pipe=True)


@pytest.mark.parametrize("words", [("list",), ("log", "team/sql"), ("gc",), ("fsck",), ("tag", "team/sql:v1", "good")])
def test_a_folder_in_the_place_of_an_unfinished_move_stops_no_command(run: Run, registry: Path, words: tuple[str, ...]) -> None:
    (registry / ".adapterhub" / "pending" / "x.json").mkdir(parents=True)
    run(*words, cwd=registry)
