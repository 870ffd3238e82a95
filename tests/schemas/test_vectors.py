"""The vectors of the specification, by this implementation, and by the one in JavaScript that shares no code with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import derive, oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, NotFoundError, RefusedError
from tests.conftest import need_program

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "schemas" / "vectors"
SCRIPT = ROOT / "examples" / "adapter_version.mjs"
ERRORS: dict[str, tuple[type[AdapterhubError], ...]] = {
    "json": (FormatError,), "version": (RefusedError,), "schema": (FormatError,), "files": (IntegrityError, NotFoundError),
}  # fmt: skip
# Print what the other implementation answers for each folder, in one process. It is no command here: its name is not first.
ASK = """
import { pathToFileURL } from "node:url";
const [schema, script, ...folders] = process.argv.slice(1);
const { command } = await import(pathToFileURL(script));
for (const folder of folders) {
  const words = folder.includes("/bases/") ? ["--fingerprint", folder] : [schema, folder];
  console.log(JSON.stringify(await command(words).catch((error) => error.message)));
}
"""


def vectors(kind: str) -> list[str]:
    return sorted(path.name for path in (VECTORS / kind).iterdir() if path.is_dir())


def expected(*parts: str) -> Any:
    return json.loads(VECTORS.joinpath(*parts, "expected.json").read_text())


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What the implementation in JavaScript says of each vector, by `kind/name`."""
    need_program("node")
    names = [f"{kind}/{name}" for kind in ("versions", "refused", "bases") for name in vectors(kind)]
    folders = [VECTORS / name if name.startswith("bases") else VECTORS / name / "folder" for name in names]
    schema = ROOT / "schemas" / "adapterhub_schemas" / "adapter.schema.json"
    words = ["node", "--input-type=module", "--eval", ASK, "--", schema, SCRIPT, *folders]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return dict(zip(names, map(json.loads, result.stdout.strip().split("\n")), strict=True))


def test_there_are_thirty_versions_and_over_ten_refusals() -> None:
    assert (len(vectors("versions")), len(vectors("refused")) > 10) == (30, True)


@pytest.mark.parametrize("name", vectors("versions"))
def test_a_folder_has_the_digest_and_the_documents_of_its_vector(name: str) -> None:
    vector = VECTORS / "versions" / name
    built = oci_manifest.build(vector / "folder")
    assert built.digest == expected("versions", name)["digest"]
    assert (built.raw, built.config_bytes) == ((vector / "manifest.json").read_bytes(), (vector / "config.json").read_bytes())
    assert derive.finalize(vector / "folder")[1] == (vector / "folder" / ADAPTER_JSON).read_bytes()


@pytest.mark.parametrize("name", vectors("refused"))
def test_a_refused_folder_is_refused_for_its_reason(name: str) -> None:
    with pytest.raises(ERRORS[expected("refused", name)["code"]]):
        oci_manifest.build(VECTORS / "refused" / name / "folder")


@pytest.mark.parametrize("name", vectors("bases"))
def test_a_base_has_its_fingerprint(name: str) -> None:
    assert read_base(VECTORS / "bases" / name).fingerprint == expected("bases")[name]


@pytest.mark.parametrize("name", [name for name in vectors("versions") if name.startswith("base-")])
def test_a_version_pins_the_fingerprint_of_its_base(name: str) -> None:
    manifest, vector = AdapterManifest.read(VECTORS / "versions" / name / "folder"), expected("versions", name)
    assert manifest is not None
    assert manifest.base.fingerprint == vector["fingerprint"] == expected("bases")[vector["base"]]


def test_the_vectors_are_those_that_their_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "schemas" / "make_vectors.py", tmp_path / "out"], check=True)
    written, stored = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "out", VECTORS)
    )
    assert written == stored


@pytest.mark.peer
@pytest.mark.parametrize("name", vectors("versions"))
def test_the_other_implementation_derives_the_same_digest_and_manifest(name: str, answers: dict[str, str]) -> None:
    digest, manifest = answers[f"versions/{name}"].split("\n")
    assert digest == expected("versions", name)["digest"]
    assert manifest.encode() == (VECTORS / "versions" / name / "manifest.json").read_bytes()


@pytest.mark.peer
@pytest.mark.parametrize("name", vectors("refused"))
def test_the_other_implementation_refuses_for_the_same_reason(name: str, answers: dict[str, str]) -> None:
    assert answers[f"refused/{name}"].startswith(f"refused: {expected('refused', name)['code']}: ")


@pytest.mark.peer
@pytest.mark.parametrize("name", vectors("bases"))
def test_the_other_implementation_computes_the_same_fingerprint(name: str, answers: dict[str, str]) -> None:
    assert answers[f"bases/{name}"] == expected("bases")[name]


def test_the_other_implementation_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 400
