"""The adapter in a folder is one answer, whichever way it comes in; so is what a pickle is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub import checks
from adapterhub.analysis import diff
from adapterhub.manifest import derive, package_files, weight_facts
from adapterhub.merging.into_base import side_files
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters import adapter_files
from adapterhub_converters.adapter_files import resolve_adapter
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError
from adapterhub_converters.formats import convert, peft, pickle_conversion
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs

# Files of a folder, by the names of the sources below, to its format, or to the words that refuse it.
FOLDERS: list[tuple[dict[str, str], str]] = [
    ({"adapter_config.json": "config", "adapter_model.safetensors": "peft"}, "peft"),
    ({"adapter_config.json": "config", "adapter_model.safetensors": "peft", "x.gguf": "gguf"}, "peft"),
    ({"adapter_config.json": "mlx_config", "adapters.safetensors": "mlx"}, "mlx"),
    ({"x.gguf": "gguf"}, "gguf"),
    ({"X.GGUF": "gguf", ".hidden.safetensors": "raw"}, "gguf"),
    ({"w.safetensors": "raw", "README.md": "text"}, "raw"),
    ({"x.gguf": "gguf", "w.safetensors": "raw"}, "w.safetensors and x.gguf are two adapters"),
    ({"x.gguf": "gguf", "y.gguf": "gguf"}, "x.gguf and y.gguf are two adapters"),
    ({"x.gguf": "gguf", "y.gguf": "gguf", "w.safetensors": "raw"}, r"w.safetensors and x.gguf are two adapters \(of 3 files"),
    ({"adapter_model.safetensors": "peft", "w.safetensors": "raw"}, "adapter_model.safetensors and w.safetensors are two"),
    ({"README.md": "text"}, "none"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one adapter's files in several formats."""
    folder = tmp_path_factory.mktemp("sources")
    spec = base(folder / "base", 2)
    source = adapter(folder / "peft", pairs(2))
    for to, name in (("gguf", "x.gguf"), ("raw", "w.safetensors"), ("mlx", "mlx")):
        convert.convert(source, folder / name, to=to, base=spec)
    return {
        "config": (source / peft.CONFIG).read_bytes(),
        "peft": (source / peft.WEIGHTS).read_bytes(),
        "gguf": (folder / "x.gguf").read_bytes(),
        "raw": (folder / "w.safetensors").read_bytes(),
        "mlx_config": (folder / "mlx" / "adapter_config.json").read_bytes(),
        "mlx": (folder / "mlx" / "adapters.safetensors").read_bytes(),
        "text": b"words",
    }


def make_folder(folder: Path, files: dict[str, str], sources: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, source in files.items():
        (folder / name).write_bytes(sources[source])
    return folder


def by_check(folder: Path) -> str:
    report = checks.check(folder)
    assert report.ok, report.problems
    return report.format


def by_conversion(folder: Path) -> str:
    convert.convert(folder, folder.parent / "converted", to="peft")
    return convert.sniff(resolve_adapter(folder))


def by_push(folder: Path) -> str:
    with Registry.init(folder.parent / "registry") as registry:
        version = registry.push(folder, Ref.parse("team/x"))
        manifest = registry.adapter_manifest(version.digest)
    assert manifest is not None
    return manifest.format


def by_comparison(folder: Path) -> str:
    assert not diff.diff(folder, folder).tensors
    return convert.sniff(resolve_adapter(folder))


WAYS: dict[str, Callable[[Path], str]] = {
    "check": by_check,
    "describe": lambda folder: derive.describe(folder).format,
    "load": lambda folder: (convert.read(folder), convert.sniff(resolve_adapter(folder)))[1],
    "convert": by_conversion,
    "push": by_push,
    "diff": by_comparison,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("files", "answer"), FOLDERS, ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_the_adapter_in_a_folder_is_the_same_for_all(
    tmp_path: Path, sources: dict[str, bytes], files: dict[str, str], answer: str, way: str
) -> None:
    folder = make_folder(tmp_path / "folder", files, sources)
    if answer == "none":
        with pytest.raises(AdapterhubError, match="no.* adapter"):
            WAYS[way](folder)
    elif "two" in answer:
        with pytest.raises(RefusedError, match=answer):
            WAYS[way](folder)
    else:
        assert WAYS[way](folder) == answer


@pytest.mark.parametrize(
    "command",
    [("validate", "f"), ("show", "f"), ("push", "f", "team/x"), ("convert", "f", "out", "--to", "peft"), ("diff", "f", "f")],
)
def test_commands_refuse_two_adapters_in_the_same_words(
    tmp_path: Path, sources: dict[str, bytes], run: Run, command: tuple[str, ...]
) -> None:
    make_folder(tmp_path / "f", {"x.gguf": "gguf", "w.safetensors": "raw"}, sources)
    assert "error: f: w.safetensors and x.gguf are two adapters" in run(*command, cwd=tmp_path, code=6).stderr


def test_a_file_stands_for_itself(tmp_path: Path, sources: dict[str, bytes]) -> None:
    folder = make_folder(tmp_path / "f", {"x.gguf": "gguf", "w.safetensors": "raw"}, sources)
    assert resolve_adapter(folder / "x.gguf") == folder / "x.gguf"
    assert resolve_adapter(tmp_path / "missing") == tmp_path / "missing"


# ---- pickles


@pytest.mark.parametrize(
    "name", [*(f"x{suffix}" for suffix in sorted(adapter_files.PICKLE_SUFFIXES)), "X.PT", "lit_model.pth.lora"]
)
def test_a_pickle_by_name_is_one_everywhere(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    (folder / name).write_bytes(b"anything")
    with pytest.raises(RefusedError, match="a pickle can run code"):
        package_files.listing(folder, strict=True)
    if name == adapter_files.LITGPT_WEIGHTS:
        with pytest.raises(RefusedError, match="a pickle can run code"):
            package_files.listing(folder)
    else:  # next to weights that are none it is an optimizer's state, or arguments
        assert package_files.listing(folder).skipped == (name,)
    with pytest.raises(RefusedError, match="a pickle can run code"):
        package_files.check_names([name], "elsewhere")
    assert pickle_conversion.pickle_in(folder / name) == folder / name
    assert side_files.side_files(folder, set())[1][name] == "a pickle can run code when it is loaded"


@pytest.mark.parametrize("suffix", sorted(adapter_files.PICKLE_SUFFIXES))
def test_weights_in_a_pickle_are_reported_by_every_suffix(tmp_path: Path, suffix: str) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    (folder / peft.WEIGHTS).rename(folder / f"adapter_model{suffix}")
    assert pickle_conversion.pickle_in(folder) == folder / f"adapter_model{suffix}"
    assert "pickle" in {problem.code for problem in checks.check(folder).problems}
    shutil.copy(folder / f"adapter_model{suffix}", folder / peft.WEIGHTS)
    assert "stray-pickle" in {problem.code for problem in checks.check(folder).problems}


def test_first_bytes_of_pickles() -> None:
    for head in (b"\x80\x02}q", b"\x80\x05\x95", b"PK\x03\x04"):
        assert adapter_files.starts_like_pickle(head)
    assert not adapter_files.starts_like_pickle(b"GGUF")
    assert adapter_files.starts_like_safetensors((0x280).to_bytes(8, "little") + b"{")


def test_no_adapter_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no adapter in this folder: PEFT and MLX adapters have an adapter_config.json"):
        weight_facts.inspect_adapter(tmp_path)
