"""Documents of strangers, each in its place, and what reads them: one line and a documented exit code, in bounded memory.

Every command runs with 1.5 GB of address space and a limit of CPU time, so that a document that grows or hangs ends the test.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.folders import adapter, base, pairs

LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
"""
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}

VALUES = {
    "deep lists": "[" * 100_000,
    "deep lists that end": "[" * 900 + "]" * 900,
    "deep objects": '{"a":' * 100_000,
    "deep objects that end": '{"a":' * 400 + "1" + "}" * 400,
    "a number of 5,000 digits": "1" * 5_000,
    "a number of 400 digits": "1" * 400,
    "a float beyond all": "1e999",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "half a character": '"\\ud800"',
    "a duplicate key": '{"a": 1, "a": 2}',
    "many objects": f"[{'{},' * 4_000_000}{{}}]",
    "many lists": f"[{('[' * 50 + ']' * 50 + ',') * 120_000}1]",
    "a long text": f'"{"a" * 1_000_000}"',
    "a long key": f'{{"{"a" * 1_000_000}": 1}}',
    "a list": "[1]",
    "an object": "{}",
}
WHOLE = {
    **{f"as a whole, {name}": value.encode() for name, value in VALUES.items()},
    **{f"of another kind, {value}": value.encode() for value in ("[]", "null", "1", '""', "{}", "[1]", "true")},
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "zeros": bytes(1000),
    "no UTF-8": b'{"a": "\xff"}',
    "nothing": b"",
    "half": b'{"a": [1, 2',
}


def _writer_of(path: str) -> Callable[[Path, bytes], None]:
    def place(folder: Path, raw: bytes) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)

    return place


def _manifest(folder: Path, raw: bytes) -> None:
    digest = hashlib.sha256(raw).hexdigest()
    (folder / "layout/blobs/sha256" / digest).write_bytes(raw)
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"sha256:{digest}", "size": len(raw)}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
    (folder / "layout/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def _log_entry(folder: Path, raw: bytes) -> None:
    (folder / "registry.db").unlink()
    next(folder.glob(".adapterhub/refs/team/sql/*.json")).write_bytes(raw)


JSON = {
    "adapter_config.json": (_writer_of("a/adapter_config.json"), "validate a"),
    "adapter_config.json of mlx": (_writer_of("mlx/adapter_config.json"), "validate mlx"),
    "adapter.json": (_writer_of("a/adapter.json"), "show a"),
    "shards of an adapter": (_writer_of("sharded/adapter_model.safetensors.index.json"), "diff a sharded"),
    "config.json of a base": (_writer_of("base/config.json"), "validate a --base base"),
    "shards of a base": (_writer_of("base/model.safetensors.index.json"), "base show base"),
    "tokenizer_config.json": (_writer_of("base/tokenizer_config.json"), "base show base"),
    "tokenizer.json": (_writer_of("base/tokenizer.json"), "merge a --into base -o out.gguf"),
    "generation_config.json": (_writer_of("base/generation_config.json"), "merge a --into base -o out.gguf"),
    "adapters.lock": (_writer_of("adapters.lock"), "pull --locked"),
    "recipe": (_writer_of("recipe.json"), "rebuild recipe.json --base base -o out"),
    "index.json": (_writer_of("layout/index.json"), "list layout://layout"),
    "oci-layout": (_writer_of("layout/oci-layout"), "list layout://layout"),
    "manifest": (_manifest, "pull layout://layout:v1 -o out"),
    "log entry": (_log_entry, "fsck"),
    "config.json of docker": (_writer_of("docker/config.json"), "logout registry.example"),
}
TOML = {
    "adapter.toml": (_writer_of("a/adapter.toml"), "show a"),
    "adapterhub.toml": (_writer_of("adapterhub.toml"), "list"),
    "config.toml": (_writer_of("xdg-config/adapterhub/config.toml"), "remote list"),
    "a training": (_writer_of("training.toml"), "train training.toml"),
}
TABLES = {
    "deep lists": "a = " + "[" * 100_000,
    "lists that end": "a = " + "[" * 150 + "]" * 150,
    "deep tables": "a = " + "{a = " * 100_000,
    "a long key": f"{'a' * 1_000_000} = 1",
    "a header of many parts": f"[{'.'.join('a' * 200_000)}]",
    "a key of many parts": f"{'.'.join('a' * 200_000)} = 1",
    "a number of 5,000 digits": f"a = {'1' * 5_000}",
    "a number of many hexadecimal digits": f"a = 0x{'f' * 100_000}",
    "a declared number": f"license = 0x{'f' * 5_000}\nregistry = 0x{'f' * 5_000}\n[data]\ntrain = 0x{'f' * 5_000}",
    "no number": "a = nan",
    "a date": "license = 1979-05-27\nregistry = 1979-05-27\n[data]\ntrain = 1979-05-27\n[policy]\nmax_rank = 1979-05-27",
    "a list of tables": "[[policy]]\n[[remotes]]\n[[training]]\n[[base]]\n[[data]]",
    "a large file": "#" * 20_000_000,
    "a byte order mark": "\ufeffa = 1",
    "zeros": "\0" * 100,
    "half": "a = ",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    adapter(folder / "a", pairs(2))
    base(folder / "base")
    shutil.copytree(folder / "a", folder / "sharded")
    (folder / "sharded/adapter_model.safetensors").unlink()
    (folder / "mlx").mkdir()
    shutil.copy(folder / "a/adapter_model.safetensors", folder / "mlx/adapters.safetensors")
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, run: Run) -> Path:
    if not (world / "layout").exists():
        run("push", "a", "team/sql", "--registry", ".", cwd=world)
        run("push", "a", "oci:layout:v1", cwd=world)
        run("lock", "team/sql", "--registry", ".", cwd=world)
        shutil.copy(next(world.glob("layout/blobs/sha256/*")), world / "manifest.json")
    folder = tmp_path / "place"
    shutil.copytree(world, folder)
    return folder


def _tried(run: Run, place: Path, command: str) -> None:
    env = {"DOCKER_CONFIG": str(place / "docker"), "XDG_CONFIG_HOME": str(place / "xdg-config")}
    result = run(*command.split(), cwd=place, env=env, code=None, first=LIMITS)
    assert result.returncode in DOCUMENTED, result.stderr[-2000:]
    if result.returncode > 1:
        lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "note: "))]
        # A training config names all its errors at once, a line each.
        max_lines = 21 if command.startswith("train ") else 1
        assert 1 <= len(lines) <= max_lines, result.stderr[-2000:]
        assert all(line.startswith(("error: ", "hint: ", "  ")) for line in lines), result.stderr[-2000:]
    assert len(result.stderr) < 4_000


def _thirds(kinds: Iterable[Any], names: Iterable[str]) -> list[tuple[Any, str]]:
    """A third of all pairs, in which each kind has a third of the names: the reader is one, and each command takes its time."""
    return [(kind, name) for i, kind in enumerate(kinds) for j, name in enumerate(names) if (i + j) % 3 == 0]


@pytest.mark.parametrize(("kind", "name"), _thirds(JSON, WHOLE))
def test_json_as_a_whole(run: Run, place: Path, kind: str, name: str) -> None:
    write_document, command = JSON[kind]
    write_document(place, WHOLE[name])
    _tried(run, place, command)


WITH_MEMBERS = {
    "adapter_config.json": ("r", "target_modules", "rank_pattern", "base_model_name_or_path", "layers_pattern", "x"),
    "adapter.json": ("base", "training", "license", "x"),
    "config.json of a base": ("architectures", "model_type", "num_hidden_layers", "rope_theta", "quantization_config", "x"),
    "adapters.lock": ("version", "adapters"),
    "manifest": ("config", "layers", "annotations", "mediaType"),
    "index.json": ("manifests",),
    "log entry": ("version", "op", "digest", "seq", "tags", "x"),
}


AS_MEMBERS = ["deep objects that end", "a number of 400 digits", "a long text", "a long key", "a list", "an object"]


MEMBERS = [(kind, member) for kind, members in WITH_MEMBERS.items() for member in members]


@pytest.mark.parametrize(("kind_and_member", "value"), _thirds(MEMBERS, AS_MEMBERS))
def test_json_as_a_member(run: Run, place: Path, kind_and_member: tuple[str, str], value: str) -> None:
    kind, member = kind_and_member
    write_document, command = JSON[kind]
    sources = {"manifest": "manifest.json", "index.json": "layout/index.json", "adapters.lock": "adapters.lock"}
    sources |= {"adapter_config.json": "a/adapter_config.json", "config.json of a base": "base/config.json"}
    sources |= {"log entry": ".adapterhub/refs/team/sql/00000001.json"}
    path = place / sources.get(kind, "")
    document = json.loads(path.read_text()) if path.is_file() else {}
    document[member] = "PLACE"
    write_document(place, json.dumps(document).replace('"PLACE"', VALUES[value]).encode())
    _tried(run, place, command)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", [*TOML])
def test_toml(run: Run, started: Run, place: Path, kind: str, name: str) -> None:
    write_document, command = TOML[kind]
    write_document(place, TABLES[name].encode())
    _tried(started if command.startswith("train") else run, place, command)  # it fails before it imports torch
