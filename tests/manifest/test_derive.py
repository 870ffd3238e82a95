"""adapter.json: derived from the files, merged with what is declared, and refused when it is untrue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import derive
from adapterhub.manifest.document import AdapterManifest, ModuleShape, Training, TrainingData
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from adapterhub_converters.formats import convert

Make = Callable[..., Path]


def test_the_manifest_of_a_peft_folder(make: Make) -> None:
    manifest = derive.describe(make(alpha_pattern={"layers.1.self_attn.v_proj": 8}))
    fields = ("method", "r", "alpha", "targets", "dtype", "parameters", "format", "task")
    assert {key: getattr(manifest, key) for key in fields} == {
        "method": "lora", "r": 2, "alpha": 4, "targets": ("q_proj", "v_proj"), "dtype": "F32", "parameters": 128,
        "format": "peft", "task": "CAUSAL_LM",
    }  # fmt: skip
    assert manifest.modules == {"model.layers.1.self_attn.v_proj": ModuleShape(r=2, alpha=8)}
    assert manifest.base.repo == "org/base"
    assert [entry.path for entry in manifest.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_the_manifest_is_a_pure_function_of_the_files(make: Make) -> None:
    assert derive.describe(make("a")).dump() == derive.describe(make("b")).dump()


def test_the_document_is_sorted_indented_and_ends_in_one_newline(make: Make) -> None:
    raw = derive.describe(make()).dump()
    assert raw == (json.dumps(json.loads(raw), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def test_a_path_of_one_machine_is_not_a_repo(make: Make) -> None:
    assert derive.describe(make(base_model_name_or_path="/home/me/models/base")).base.repo is None


def test_a_base_at_hand_is_described(make: Make) -> None:
    tensors = {"model.embed_tokens.weight": BaseTensor((4, 8), "F32")}
    spec = BaseSpec("x", "hf", "LlamaForCausalLM", "llama", {"hidden_size": 8}, tensors)
    base = derive.describe(make(), base=spec).base
    assert (base.architecture, base.config, base.fingerprint) == (
        "LlamaForCausalLM", {"hidden_size": 8}, spec.fingerprint,
    )  # fmt: skip


def test_a_true_document_is_kept_byte_for_byte(make: Make) -> None:
    folder = make()
    text = json.dumps(derive.describe(folder, training=Training(seed=1)).to_dict())  # compact: not our own spelling
    (folder / ADAPTER_JSON).write_text(text)
    assert derive.finalize(folder)[1] == text.encode()


def test_a_readme_and_a_declaration_added_later_keep_the_training_record(make: Make) -> None:
    folder = make()
    derive.describe(folder, training=Training(seed=1)).write(folder)
    (folder / "MORE.md").write_text("more")
    (folder / "adapter.toml").write_text('license = "MIT"')
    manifest, raw = derive.finalize(folder)
    assert (manifest.training, manifest.license) == (Training(seed=1), "MIT")
    assert json.loads(raw)["files"][0]["path"] == "MORE.md"


def test_changed_weights_make_the_document_untrue(make: Make) -> None:
    folder = make()
    derive.describe(folder).write(folder)
    make(seed=1)
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors has other bytes than it records. Delete adapter.json"):
        derive.finalize(folder)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"schema_version": "2.0"}, RefusedError, "schema_version 2.0 is newer than the 1.0 known here. Upgrade adapterhub"),
        ({"schema_version": 3}, RefusedError, "schema_version 3 is newer than the 1.0 known here. Upgrade adapterhub"),
        ({"schema_version": "1"}, FormatError, "schema_version: '1.0' was expected"),
        ({"schema_version": "1.01"}, FormatError, "schema_version: '1.0' was expected"),
        ({"schema_version": "1.1"}, FormatError, "$schema: 'urn:adapterhub:schema:adapter:1.1' was expected"),
        ({"recipe": None}, FormatError, "recipe: None is not of type 'object'"),
        ({"released": "soon"}, FormatError, "released: 'soon' does not match"),
        ({"extensions": {"ours": {}}}, FormatError, "extensions: 'ours' does not match"),
        ({"r": "two"}, FormatError, "r: 'two' is not of type"),
        ({"extra": 1}, FormatError, "'extra' was unexpected"),
        ({"parents": [{"digest": "sha256:12"}]}, FormatError, "parents.0.digest: 'sha256:12' does not match"),
    ],
)
def test_refused_documents(make: Make, change: dict[str, Any], error: type[Exception], says: str) -> None:
    folder = make()
    (folder / ADAPTER_JSON).write_text(json.dumps({**derive.describe(folder).to_dict(), **change}))
    with pytest.raises(error) as caught:
        AdapterManifest.read(folder)
    assert says in str(caught.value)


def test_no_adapter_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        derive.describe(tmp_path)


def test_manifests_of_other_formats(make: Make, tmp_path: Path) -> None:
    config = {
        "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 2,
        "intermediate_size": 16, "vocab_size": 4,
    }  # fmt: skip
    (tmp_path / "gguf").mkdir()
    source, spec = make(), BaseSpec("x", "hf", "LlamaForCausalLM", "llama", config)
    convert.convert(source, tmp_path / "gguf" / "sql.gguf", to="gguf", base=spec)
    convert.convert(source, tmp_path / "mlx", to="mlx")
    first = derive.describe(source)
    for name in ("gguf", "mlx"):
        manifest = derive.describe(tmp_path / name)
        assert manifest.format == name
        for key in ("method", "r", "alpha", "targets", "modules", "dtype", "parameters"):
            assert getattr(manifest, key) == getattr(first, key), key
    (tmp_path / "gguf" / "again.gguf").write_bytes((tmp_path / "gguf" / "sql.gguf").read_bytes())
    with pytest.raises(RefusedError, match="again.gguf and sql.gguf are two adapters"):
        derive.describe(tmp_path / "gguf")


def test_a_document_of_schema_1_is_read_and_its_bytes_are_kept(make: Make) -> None:
    """Schema 1 spelled `licence` and `quantisation`; what was stored under it keeps its digest."""  # codespell:ignore
    folder = make()
    (folder / "adapter.toml").write_text(
        'license = "MIT"\n[base]\nquantization = "nf4"\n[training]\ndata = [{license = "CC0"}]\n'
    )
    text = derive.describe(folder).dump().decode()
    for now, before in (("license", "licence"), ("quantization", "quantisation")):  # codespell:ignore
        text = text.replace(now, before)
    old = text.replace("schema:adapter:1.0", "schema:adapter:1").replace('"schema_version": "1.0"', '"schema_version": 1')
    (folder / "adapter.toml").unlink()
    files = [entry for entry in json.loads(old)["files"] if entry["path"] != "adapter.toml"]
    (folder / "adapter.json").write_text(json.dumps({**json.loads(old), "files": files}))
    manifest, raw = derive.finalize(folder)
    assert manifest.training is not None
    assert (manifest.license, manifest.base.quantization, manifest.training.data) == (
        "MIT",
        "nf4",
        (TrainingData(license="CC0"),),
    )
    assert raw == (folder / "adapter.json").read_bytes()


def test_the_card_declares_what_nothing_else_does(make: Make) -> None:
    folder = make()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ndescription: Writes SQL.\n---\n# SQL\n")
    manifest = derive.finalize(folder)[0]
    assert (manifest.license, manifest.description) == ("apache-2.0", "Writes SQL.")
    (folder / "adapter.toml").write_text('license = "MIT"\n')
    manifest, raw = derive.finalize(folder)
    assert (manifest.license, manifest.description) == ("MIT", "Writes SQL.")
    (folder / "adapter.toml").unlink()
    (folder / "adapter.json").write_bytes(raw)
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    assert derive.finalize(folder)[0].license == "MIT"  # what adapter.json has takes precedence
