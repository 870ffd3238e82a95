"""Write the test vectors of SPECIFICATION.md into schemas/vectors, or another folder: `python schemas/make_vectors.py [DIR]`.

Each vector in `versions` has a folder with an adapter, its OCI manifest and config, and the digest; each in `refused` has a
folder and the code of the reason. `bases` has models with their fingerprints. All numbers are drawn from one seed, so that the
script writes the same bytes again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.manifest import canonical_json, derive, oci_manifest
from adapterhub.manifest.document import (
    TRAINER,
    AdapterManifest,
    FileEntry,
    KeptCheckpoint,
    LossPoint,
    Parent,
    Recipe,
    Training,
    TrainingData,
)
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file

OUT = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "vectors"
R, SIZE = 2, 8
TARGET = "base_model.model.model.layers.0.self_attn.{}.{}"
DIGEST = "sha256:" + "ab" * 32
rng = np.random.default_rng(7)

Change = Callable[[AdapterManifest], AdapterManifest]


def write_adapter(
    folder: Path, *, dtype: str = "F32", config: dict[str, Any] | None = None, extra_tensors: dict[str, Any] | None = None
) -> None:
    """Write a tiny adapter of PEFT into a folder."""
    folder.mkdir(parents=True)
    types: dict[str, type] = {"F32": np.float32, "F16": np.float16, "mixed": np.float32}
    types_of_B: dict[str, type] = {"mixed": np.float16}
    pair: dict[str, Any] = {
        TARGET.format("q_proj", "lora_A.weight"): rng.standard_normal((R, SIZE)).astype(types[dtype]),
        TARGET.format("q_proj", "lora_B.weight"): rng.standard_normal((SIZE, R)).astype(types_of_B.get(dtype, types[dtype])),
    }
    safetensors_file.write(folder / "adapter_model.safetensors", pair | (extra_tensors or {}))
    settings = {
        "base_model_name_or_path": "org/base", "lora_alpha": 4, "peft_type": "LORA", "r": R, "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {}), indent=2, sort_keys=True) + "\n")


def second_module(r: int) -> dict[str, Any]:
    """Return the tensors of a second module, of another rank."""
    return {
        TARGET.format("v_proj", "lora_A.weight"): rng.standard_normal((r, SIZE)).astype(np.float32),
        TARGET.format("v_proj", "lora_B.weight"): rng.standard_normal((SIZE, r)).astype(np.float32),
    }


def write_bases() -> None:
    """Write models with their fingerprints: forms of one base, and the same weights in an unknown architecture."""
    names = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head"]
    weights = {f"{name}.weight": rng.standard_normal((SIZE, SIZE)).astype(np.float16) for name in names}
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": SIZE, "intermediate_size": SIZE, "model_type": "llama",
        "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "vocab_size": SIZE,
    }  # fmt: skip
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    tied = {"tie_word_embeddings": True}
    other_weights = {name.replace("layers", "blocks"): value for name, value in weights.items()}
    for name, tensors, changes in (
        ("plain", weights, {}), ("buffer", weights | buffer, {}), ("tied", weights, tied),
        ("tied-in-text", weights, {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": None}),
        ("unheard-of", other_weights, {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}),
    ):  # fmt: skip
        folder = OUT / "bases" / name
        folder.mkdir(parents=True)
        safetensors_file.write(folder / "model.safetensors", tensors)
        settings = {key: value for key, value in (config | changes).items() if value is not None}
        (folder / "config.json").write_bytes(canonical_json.indented(settings))
    folder = OUT / "bases" / "nf4"
    folder.mkdir()
    state = {"blocksize": 64, "dtype": "float16", "quant_type": "nf4", "shape": [SIZE, SIZE]}
    packed = {key: value for key, value in weights.items() if "q_proj" not in key}
    name = "model.layers.0.self_attn.q_proj.weight"
    packed |= {
        name: np.zeros((SIZE * SIZE // 2, 1), np.uint8), f"{name}.absmax": np.ones(1, np.float32),
        f"{name}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }  # fmt: skip
    safetensors_file.write(folder / "model.safetensors", packed)
    quantization = {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_bytes(canonical_json.indented({**config, "quantization_config": quantization}))
    fingerprints = {path.name: read_base(path).fingerprint for path in sorted((OUT / "bases").iterdir())}
    (OUT / "bases" / "expected.json").write_bytes(canonical_json.indented(fingerprints))


def write_version(
    name: str,
    *,
    base: str = "",
    toml: str = "",
    change: Change | None = None,
    edit: Callable[[dict[str, Any]], bytes] | None = None,
    texts: dict[str, str] | None = None,
    **options: Any,
) -> None:
    """Write one vector.

    Args:
        name: Its name.
        base: The model in `bases` to pin.
        toml: What its owner declares.
        change: Changes the manifest that was derived.
        edit: Returns the bytes of adapter.json, written by another program.
        texts: Further files.
        options: Those of `write_adapter`.
    """
    vector = OUT / "versions" / name
    folder = vector / "folder"
    write_adapter(folder, **options)
    for path, text in (texts or {}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    if toml:
        (folder / "adapter.toml").write_text(toml)
    manifest = derive.describe(folder, base=read_base(OUT / "bases" / base) if base else None)
    manifest = change(manifest) if change else manifest
    (folder / ADAPTER_JSON).write_bytes(edit(manifest.to_dict()) if edit else manifest.dump())
    oci = oci_manifest.build(folder)
    (vector / "manifest.json").write_bytes(oci.raw)
    (vector / "config.json").write_bytes(oci.config_bytes)
    expected = {"digest": oci.digest, **({"base": base, "fingerprint": manifest.base.fingerprint} if base else {})}
    (vector / "expected.json").write_bytes(canonical_json.indented(expected))


def write_versions() -> None:
    """Write all versions."""
    replace = dataclasses.replace
    write_version("minimal")
    write_version("named", toml='name = "text2sql"\ndescription = "Turns questions into SQLite."\nlicense = "Apache-2.0"\n')
    write_version("documents", texts={"README.md": "# SQL\n", "LICENSE": "free\n", "NOTICE.txt": "none\n", "vocab.txt": "a\n"})
    write_version("folders", texts={"a/b.json": "{}\n", "a.json": "{}\n", "notes/c.md": "c\n"})
    write_version("names-beyond-the-first-plane", texts={"\ufb33.md": "before\n", "\U0001f600.md": "after\n"})
    write_version("template", texts={"chat_template.jinja": "{{ messages }}", "tokenizer.json": "{}"})
    for base in ("plain", "tied", "tied-in-text", "nf4", "unheard-of"):
        write_version(f"base-{base}", base=base)
    write_version("revision", config={"revision": "c1899de289a04d12100db370d81485cdf75e47ca"})
    write_version("alpha-integral", config={"lora_alpha": 32.0})
    write_version("alpha-fraction", config={"lora_alpha": 0.1})
    write_version("rslora", config={"use_rslora": True})
    patterns = {"alpha_pattern": {"v_proj": 2}, "rank_pattern": {"v_proj": 1}, "target_modules": ["q_proj", "v_proj"]}
    write_version("two-ranks", config=patterns, extra_tensors=second_module(1))
    head = {"base_model.model.lm_head.weight": np.ones((SIZE, SIZE), np.float32)}
    write_version("replaced", config={"modules_to_save": ["lm_head"]}, extra_tensors=head)
    write_version("half", dtype="F16")
    write_version("mixed", dtype="mixed")
    parents = (Parent(DIGEST, "team/a:v1", 0.1, "linear"), Parent("sha256:" + "cd" * 32, None, 1e-7, "linear"))
    recipe = Recipe("merge", method="linear", parameters={"density": 1e21, "lambda": 1.0})
    write_version("merged", change=lambda manifest: replace(manifest, parents=parents, recipe=recipe))
    conversion = Recipe("convert", to="peft", dtype="source", allow_drop=(), loss={"exact": 2})
    write_version("converted", change=lambda manifest: replace(manifest, parents=parents[:1], recipe=conversion))
    training = Training(
        config={"learning_rate": 2e-05, "betas": [0.9, 0.999], "steps": 200.0},
        data=(TrainingData(path="train.jsonl", digest=DIGEST, size=1048576, documents=1200, tokens=480000),),
        weights=(FileEntry("model.safetensors", DIGEST, 269060552),),
        seed=2**53 - 1,
        metrics={"eval_loss": 0.71, "tiny": 5e-324},
        curve=(LossPoint(0, heldout_loss=2.9), LossPoint(1, loss=2.8)),
        checkpoints=(KeptCheckpoint(100, DIGEST, 55050240),),
        recorder=TRAINER,
    )
    write_version("trained", change=lambda manifest: replace(manifest, training=training))
    write_version("dated", toml='[training]\ncreated = "2026-01-31T12:00:00Z"\n')
    write_version(
        "released",
        toml='supplier = "Example"\ncontact = "mailto:models@example.org"\nreleased = "2026-01-31"\nexpires = "2027-01-31"\n'
        'download_location = "oci://registry.example.org/team/sql"\nintended_use = "Drafts."\nlimitations = "Large schemas."\n'
        'languages = ["en", "pt-BR"]\ntrigger_words = ["sks dog"]\nenergy_kwh = 1.50\n',
    )
    write_version(
        "evaluated",
        toml='[[evaluations]]\nmetric = "exact_match"\nvalue = 1.0\ndataset = "org/set"\nsplit = "test"\n'
        f'harness = "lm-eval 0.4.9"\nrecorder = "owner"\ndigest = "{DIGEST}"\n',
    )
    write_version(
        "sources",
        toml='[[data_sources]]\nkind = "crawled"\naddress = "https://example.org"\ncollected_from = "2025-01-01"\n'
        'collected_until = "2025-06-30"\nrights_reserved = "robots.txt was followed"\npersonal_data = false\n',
    )
    write_version("extended", toml='[extensions."org.example.review"]\nticket = 7\nnested = [{b = 1, a = 0.00001}]\n')
    write_version(
        "characters", toml='name = "\u20ac \U0001f600 \u2028 \\u0007 \\" \\\\ /"\ndescription = "\u00e9\u0065\u0301"\n'
    )
    write_version("by-another-program", edit=lambda document: json.dumps(dict(reversed(document.items()))).encode())
    write_version("later-minor-version", edit=later_minor_version)


def later_minor_version(document: dict[str, Any]) -> bytes:
    """Return a document of a later minor version, with fields that are not known here."""
    changes = {"$schema": "urn:adapterhub:schema:adapter:1.7", "schema_version": "1.7", "mood": {"good": True}}
    base = {**document["base"], "layers": 1}
    return json.dumps({**document, **changes, "base": base}).encode()


def write_refusal(name: str, code: str, edit: Callable[[Path, dict[str, Any]], str | None]) -> None:
    """Write one folder that is refused: `edit` returns the text of adapter.json, or changes the folder."""
    folder = OUT / "refused" / name / "folder"
    write_adapter(folder)
    manifest = derive.describe(folder)
    text = edit(folder, manifest.to_dict())
    (folder / ADAPTER_JSON).write_text(manifest.dump().decode() if text is None else text)
    (OUT / "refused" / name / "expected.json").write_bytes(canonical_json.indented({"code": code}))


def write_refusals() -> None:
    """Write the folders that every reader refuses."""
    dumps = json.dumps
    write_refusal("a-key-twice", "json", lambda _, document: dumps(document).replace("{", '{"license": "MIT", ', 1))
    write_refusal("not-a-number", "json", lambda _, document: dumps(document).replace('"alpha": 4', '"alpha": NaN', 1))
    write_refusal(
        "an-integer-that-others-round", "json", lambda _, document: dumps({**document, "training": {"seed": 2**53 + 1}})
    )
    write_refusal("a-later-major-version", "version", lambda _, document: dumps({**document, "schema_version": "2.0"}))
    write_refusal("a-field-that-is-unknown", "schema", lambda _, document: dumps({**document, "rank": 2}))
    write_refusal("null-for-absent", "schema", lambda _, document: dumps({**document, "recipe": None}))
    write_refusal(
        "a-field-that-is-missing", "schema", lambda _, document: dumps({k: v for k, v in document.items() if k != "parents"})
    )
    write_refusal("an-extension-of-nobody", "schema", lambda _, document: dumps({**document, "extensions": {"review": {}}}))
    write_refusal("a-digest-in-capitals", "schema", lambda _, document: dumps(document).replace("sha256:", "SHA256:", 1))
    write_refusal("two-versions", "schema", lambda _, document: dumps({**document, "schema_version": "1.7"}))
    write_refusal("other-weights", "files", lambda folder, _: edit_weights(folder))
    write_refusal("a-file-that-is-missing", "files", lambda folder, _: (folder / "adapter_model.safetensors").unlink())
    write_refusal("a-digest-with-a-line-feed", "schema", with_line_feed)
    write_refusal("a-level-too-many", "json", lambda _, document: with_levels(document, 63))
    write_refusal(
        "an-ignored-integer-that-others-round",
        "json",
        lambda _, document: later_minor_version({**document, "x": 2**53 + 1}).decode(),
    )


def with_line_feed(_: Path, document: dict[str, Any]) -> str:
    """Return a document whose base has a digest with a line feed after it, which `$` of some languages allows."""
    return json.dumps({**document, "base": {**document["base"], "fingerprint": f"sha256:{'a' * 64}\n"}})


def with_levels(document: dict[str, Any], count: int) -> str:
    """Return a document with so many lists inside each other in an object of an extension."""
    lists: Any = []
    for _ in range(count - 1):
        lists = [lists]
    return json.dumps({**document, "extensions": {"org.example.review": lists}})


def edit_weights(folder: Path) -> None:
    """Change the last byte of the weights."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    write_bases()
    write_versions()
    write_refusals()
