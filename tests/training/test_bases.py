"""Where a base comes from changes nothing: floats, the quantized base that was kept, bitsandbytes' own files, GGUF."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import digest_cache, training  # noqa: E402
from adapterhub.manifest.document import AdapterManifest  # noqa: E402
from adapterhub.training.layers import lora, nf4_matrix  # noqa: E402
from adapterhub.training.model import families, quantized_cache, transformers_api  # noqa: E402
from adapterhub.training.model.base_files import BaseFiles  # noqa: E402
from adapterhub.training.model.base_model import Base  # noqa: E402
from adapterhub.training.model.base_tensors import FolderWeights  # noqa: E402
from adapterhub.training.train_config import BaseConfig, LoRAConfig  # noqa: E402
from adapterhub_converters.architectures import architecture_lookup  # noqa: E402
from adapterhub_converters.bases import read_base  # noqa: E402
from adapterhub_converters.containers import gguf_file, safetensors_file  # noqa: E402
from adapterhub_converters.errors import FormatError, RefusedError, StoppedError  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402
from tests.training.test_gguf_model import tiny  # noqa: E402
from tests.training.test_trainer import contents, settings  # noqa: E402


def entry_of(folder: Path, cache: Path) -> quantized_cache.Entry:
    with BaseFiles(folder, cache) as files:
        entry = quantized_cache.entry_of(files, BaseConfig(str(folder)), LoRAConfig())
    assert entry
    return entry


def loaded(folder: Path, entry: quantized_cache.Entry | None = None, **options: Any) -> Base:
    chosen = replace(BaseConfig(str(folder)), **options)
    return load_base(folder, chosen, LoRAConfig(r=2, targets=("q_proj",)), location="c.toml", entry=entry)


def frozen(loaded: Base) -> dict[str, bytes]:
    """Return all numbers of the base, by name."""
    bytes_by_path = {}
    for path, module in loaded.model.named_modules():
        if isinstance(getattr(module, "base", None), nf4_matrix.NF4):
            matrix = module.base
            parts = [matrix.packed, matrix.absmax, matrix.nested, matrix.offset]
            bytes_by_path[path] = b"".join(part.numpy().tobytes() for part in parts if part is not None)
    for name, parameter in loaded.model.named_parameters():
        if "lora_" not in name:
            bytes_by_path[name] = parameter.detach().float().numpy().tobytes()
    return bytes_by_path


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> quantized_cache.Entry:
    """The tiny base in a cache."""
    entry = entry_of(tiny_base, tmp_path_factory.mktemp("cache"))
    assert loaded(tiny_base, entry).notes == ()
    assert entry.exists
    return entry


def test_a_start_from_the_cache_gives_the_same_bytes(tmp_path: Path, tiny_base: Path) -> None:
    config = training.read_config(settings(tmp_path, tiny_base, steps=2))
    notes: list[str] = []

    def run(out: str, **words: Any) -> dict[str, bytes]:
        chosen = replace(config, base=replace(config.base, **words))
        training.run(
            chosen, tmp_path / out, cache=tmp_path / "cache", on_event=lambda event: notes.extend(getattr(event, "notes", ()))
        )
        return contents(tmp_path / out)

    fresh = run("fresh", cache=False)
    assert not (tmp_path / "cache").exists()
    assert run("first") == fresh
    assert len(list((tmp_path / "cache" / "bases").iterdir())) == 1
    written = next((tmp_path / "cache" / "bases").glob("*/model.safetensors")).stat()
    assert run("second") == fresh
    assert next((tmp_path / "cache" / "bases").glob("*/model.safetensors")).stat().st_ino == written.st_ino
    assert not [note for note in notes if "quantized base" in note]


def test_what_is_cached_is_what_is_read(tiny_base: Path, entry: quantized_cache.Entry) -> None:
    assert frozen(loaded(tiny_base, entry)) == frozen(loaded(tiny_base))
    with quantized_cache.CachedWeights(entry) as weights:
        assert weights.stored_nf4("model.layers.0.mlp.up_proj.weight") is not None
        assert weights.stored_nf4("model.norm.weight") is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "header", "checksums", "nested"])
def test_a_damaged_entry_is_never_used(damage: str, tmp_path: Path, tiny_base: Path, entry: quantized_cache.Entry) -> None:
    copy = quantized_cache.Entry(tmp_path / entry.folder.name)
    shutil.copytree(entry.folder, copy.folder)
    path = copy.folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[-7] ^= 1
    elif damage == "cut":
        del raw[-64:]
    elif damage == "header":
        at = raw.index(b'"BF16"')
        raw[at : at + 6] = b'"F16" '
    elif damage == "nested":
        raw[len(raw) // 2] ^= 4
    else:
        (copy.folder / quantized_cache._CHECKSUMS).write_text("{}")
    path.write_bytes(raw)
    loaded_model = loaded(tiny_base, copy)
    assert [note.split(" (")[0] for note in loaded_model.notes] == ["the cached quantized base is damaged and is written again"]
    if damage == "checksums":
        assert f"is not in both {quantized_cache._CHECKSUMS} and the weights" in loaded_model.notes[0]
    assert frozen(loaded_model) == frozen(loaded(tiny_base))
    assert path.read_bytes() == (entry.folder / "model.safetensors").read_bytes()
    assert loaded(tiny_base, copy).notes == ()


def test_the_entry_of_another_base_is_never_used(tmp_path: Path, tiny_base: Path, entry: quantized_cache.Entry) -> None:
    copy = quantized_cache.Entry(tmp_path / ("nf4-" + "0" * 32))
    shutil.copytree(entry.folder, copy.folder)
    loaded_model = loaded(tiny_base, copy)
    assert [note.split(" (")[0] for note in loaded_model.notes] == ["the cached quantized base is damaged and is written again"]


def test_an_entry_unused_for_long_is_evicted(tmp_path: Path, tiny_base: Path, entry: quantized_cache.Entry) -> None:
    for name, seconds in (("old", 0), ("young", None)):
        shutil.copytree(entry.folder, tmp_path / "bases" / f"nf4-{name}")
        os.utime(tmp_path / "bases" / f"nf4-{name}", None if seconds is None else (seconds, seconds))
    copy = entry_of(tiny_base, tmp_path)
    loaded(tiny_base, copy)
    assert {path.name for path in (tmp_path / "bases").iterdir()} == {"nf4-young", copy.folder.name}


def test_other_weights_have_another_entry(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    before = entry_of(folder, tmp_path / "cache")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert entry_of(folder, tmp_path / "cache") != before


def test_a_cache_that_cannot_be_written_is_only_noted(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "bases").write_text("a file")
    loaded_model = loaded(tiny_base, entry_of(tiny_base, tmp_path))
    assert [note.split(":")[0] for note in loaded_model.notes] == ["the quantized base could not be cached"]


def test_a_digest_is_remembered_while_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache"
    file.write_bytes(b"one")
    first = digest_cache.digest(file, cache)
    assert not (cache / "digests").exists()  # it changed a moment ago, and might again within the clock's tick
    monkeypatch.setattr(digest_cache, "_CLOCK_TICK", -1)
    assert digest_cache.digest(file, cache) == first
    (remembered,) = (cache / "digests").iterdir()
    document = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({**document, "digest": "sha256:" + "0" * 64}))
    assert digest_cache.digest(file, cache) == "sha256:" + "0" * 64  # not hashed
    file.write_bytes(b"two")
    os.utime(file, ns=(document["state"]["modified"], document["state"]["modified"]))  # as before, but for the time of change
    assert digest_cache.digest(file, cache) == digest_cache.digest(file, None) != first


@pytest.mark.peer
def test_transformers_loads_what_is_kept(tiny_base: Path, entry: quantized_cache.Entry) -> None:
    need_module("bitsandbytes")
    agrees_with_transformers(loaded(tiny_base), entry.folder)


@pytest.mark.peer
@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_is_taken_as_it_is(double: bool, tmp_path: Path, tiny_base: Path) -> None:
    need_module("bitsandbytes")
    quantized(tiny_base, tmp_path / "bnb", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    loaded_model = loaded(tmp_path / "bnb")
    agrees_with_transformers(loaded_model, tmp_path / "bnb")
    if double:
        assert frozen(loaded_model) == frozen(loaded(tiny_base))
    assert read_base(tmp_path / "bnb").fingerprint == read_base(tiny_base).fingerprint


def agrees_with_transformers(loaded: Base, folder: Path) -> None:
    """Every matrix is what bitsandbytes has when transformers loads `folder`, and the logits are alike."""
    import transformers
    from bitsandbytes import functional

    # In evaluation bitsandbytes packs the codes anew for the CPU, which it cannot for a matrix of 96 columns.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").train()
    for path, module in list(theirs.named_modules()):
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            # Its kernel for CPUs is right only for rows of whole blocks, so it gets the same codes in such rows.
            shape, state.shape = state.shape, torch.Size((state.shape.numel() // 64, 64))
            expected = functional.dequantize_4bit(module.weight.data, state).view(shape)
            assert torch.equal(nf4_matrix.dequantize(loaded.model.get_submodule(path).base, torch.bfloat16), expected), path
            linear = torch.nn.Linear(shape[1], shape[0], bias=False)
            linear.weight = torch.nn.Parameter(expected, requires_grad=False)
            theirs.set_submodule(path, linear)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, rtol=0.05, atol=0.1)


def quantized(source: Path, out: Path, **words: object) -> None:
    """The model at `source` as transformers and bitsandbytes save it in four bits."""
    import transformers

    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **words)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, out / name)


@pytest.mark.peer
def test_other_quantizations_are_refused_by_name(tmp_path: Path, tiny_base: Path) -> None:
    need_module("bitsandbytes")
    quantized(tiny_base, tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    with pytest.raises(RefusedError, match="q_proj.weight: is stored in FP4; only NF4 is supported"):
        loaded(tmp_path / "fp4")
    config = json.loads((tiny_base / "config.json").read_text())
    shutil.copytree(tiny_base, tmp_path / "gptq")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RefusedError, match="quantized with gptq cannot be trained on"):
        loaded(tmp_path / "gptq")


def test_numbers_that_nf4_has_lost_are_refused(tiny_base: Path, entry: quantized_cache.Entry) -> None:
    with pytest.raises(RefusedError, match="stored in NF4 only"):
        load_base(entry.folder, BaseConfig(""), LoRAConfig(r=2, init="pissa"), location="c.toml")
    with pytest.raises(RefusedError, match="stored in NF4 only"):
        loaded(entry.folder, quantize="none")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocksize": 128}, "has block sizes 128 and 256"),
        ({"shape": [64, 65]}, "its parts do not fit a matrix of shape"),
        ({"nested_offset": None}, "is not the JSON that bitsandbytes writes"),
        ({"nested_offset": float("nan")}, "is not the JSON that bitsandbytes writes"),
        ({"shape": [float("inf")]}, "is not the JSON that bitsandbytes writes"),
        ({"shape": "x"}, "is not the JSON that bitsandbytes writes"),
    ],
)
def test_codes_that_mean_something_else_are_refused(
    change: dict[str, object], says: str, tmp_path: Path, entry: quantized_cache.Entry
) -> None:
    folder = tmp_path / "bnb"
    shutil.copytree(entry.folder, folder)
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    key = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(tensors[key].tobytes()), **change}
    tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    safetensors_file.write(folder / "model.safetensors", tensors)
    weights = FolderWeights(folder, [folder / "model.safetensors"])
    with weights, pytest.raises((RefusedError, FormatError), match=says):
        weights.stored_nf4("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises((RefusedError, FormatError)):
        loaded(folder)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_layer_must_equal_the_table_that_it_is_tied_to(same: bool, tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    with safetensors_file.SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if same else 2)
    safetensors_file.write(path, tensors, {"format": "pt"})
    if same:
        assert frozen(loaded(tmp_path / "base")) == frozen(loaded(tiny_base))
    else:
        with pytest.raises(RefusedError, match="lm_head.weight differs from the table that config.json ties it to") as refused:
            loaded(tmp_path / "base")
        assert refused.value.hint == "Set tie_word_embeddings to false, or remove the tensor"


def test_a_model_without_its_weights_is_refused_by_the_name_of_a_parameter(tiny_base: Path) -> None:
    with BaseFiles(tiny_base) as files:
        config, _ = transformers_api.config_and_tokenizer(files.folder, json.loads(files.config_text), location="base")
    model = transformers_api.empty_model(config, torch.float32, location="base")
    with pytest.raises(RefusedError, match=r"base: model.\S+ is not in its files, and transformers computes no value for it"):
        families.compute_buffers(model, "base")


def test_what_is_closed_while_it_is_hashed_ends_with_a_reason(tiny_base: Path) -> None:
    with BaseFiles(tiny_base) as files:
        files._closed = True
        with pytest.raises(StoppedError, match="closed while its digests were computed"):
            _ = files.digests


def test_a_gguf_base_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    source = tiny(tmp_path / "a.gguf")
    loaded_model = loaded(source, entry_of(source, tmp_path / "cache"))
    with gguf_file.GGUFFile(source) as file:
        q = architecture_lookup.unpermute_rows(file.tensor("blk.0.attn_q.weight"), 2)
        expected = nf4_matrix.quantize(torch.from_numpy(np.ascontiguousarray(q)))
    layer = loaded_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, lora.LoRALinear)
    assert torch.equal(layer.base.packed, expected.packed)
    assert torch.equal(layer.base.nested, expected.nested)
    assert frozen(loaded(source, entry_of(source, tmp_path / "cache"))) == frozen(loaded_model)
    assert len(list((tmp_path / "cache" / "bases").iterdir())) == 1


def test_training_on_a_gguf_base_names_it(tmp_path: Path) -> None:
    source = tiny(tmp_path / "a.gguf")
    path = settings(tmp_path, source, steps=2)
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "ab ab aab b a ba"}\n' * 8)
    training.run(training.read_config(path), tmp_path / "out")
    known_manifest = AdapterManifest.read(tmp_path / "out")
    assert known_manifest is not None
    assert known_manifest.base.fingerprint == read_base(source).fingerprint
    assert (known_manifest.base.quantization, known_manifest.base.architecture) == ("nf4", "LlamaForCausalLM")
    assert known_manifest.training is not None
    assert [item.path for item in known_manifest.training.weights or ()] == ["a.gguf"]
