"""What a format cannot say: refused all at once, and approximated or dropped only when allowed, with the true error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import bases
from adapterhub_converters.adapter import Adapter, Loss, LossReport, LowRank, Meta, Rows, TensorLoss
from adapterhub_converters.containers import gguf_file, safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats import lossy, peft
from adapterhub_converters.formats.lossy import LossAllowance
from tests.conftest import Run

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
EMBED, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm.weight"
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A base of one layer with two modules, untied."""
    folder = tmp_path / "base"
    folder.mkdir()
    shapes = {Q: (32, 32), K: (16, 32), EMBED: (24, 32), HEAD: (24, 32)}
    tensors = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()} | {NORM: normal(32)}
    safetensors_file.write(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 24, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save(adapter: Adapter, path: Path) -> Path:
    path.mkdir()
    peft.write(adapter, path)
    return path


def plain(**fields: Any) -> LowRank:
    return LowRank(normal(4, 32), normal(32, 4), 8.0, **fields)


def convert(source: Path, model: Path | None, to: str = "gguf", **allowed: Any) -> tuple[Path, LossReport]:
    target = source.parent / f"out.{to}"
    spec = bases.read_base(model) if model else None
    return target, formats.convert(source, target, to=to, base=spec, allowed=LossAllowance(**allowed))


def weight(model: Path, name: str) -> np.ndarray:
    with safetensors_file.SafetensorsFile(model / "model.safetensors") as file:
        return file.tensor(f"{name}.weight").astype(np.float64)


def dense(path: Path, target: str) -> np.ndarray:
    delta = formats.read(path).deltas[target]
    product = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64)
    return product.T if target == EMBED else product


EVERYTHING = Adapter(
    {Q: plain(magnitude=np.ones(32, np.float32), bias=normal(32))},
    replaced={NORM: normal(32), "lm_head.weight": normal(24, 32)},
    rows={EMBED: Rows((3,), normal(1, 32))},
)


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_every_reason_is_in_the_one_error(tmp_path: Path, model: Path, to: str) -> None:
    source = save(EVERYTHING, tmp_path / "a")
    with pytest.raises(RefusedError) as caught:
        convert(source, model, to)
    named = {item.partition(": ")[0] for item in caught.value.items}
    assert named >= {Q, NORM, "lm_head.weight"}
    assert "\n" not in str(caught.value)
    assert f"(and {len(caught.value.items) - 1} more like it)" in str(caught.value)
    assert set(caught.value.fields["options"]) == {"approx", "drop norms", "drop biases"}
    assert caught.value.hint == "Approximation, dropping norms and dropping biases would help"
    assert not (tmp_path / f"out.{to}").exists()


def test_what_is_allowed_is_done_and_reported(tmp_path: Path, model: Path) -> None:
    source = save(EVERYTHING, tmp_path / "a")
    target, report = convert(source, model, approx=True, drop=["norms", "biases"])
    lost = {line.name: line.loss for line in report.losses}
    assert lost[NORM] == lost[f"{Q}.lora_B.bias"] == Loss.DROPPED
    assert lost["lm_head.weight"] == lost[f"{Q}.lora_A"] == lost[f"{Q}.magnitude"] == Loss.APPROXIMATED
    assert lost[f"{EMBED}.rows"] == Loss.ROUNDED
    assert report.worst == Loss.DROPPED
    assert report.summary == {"exact": 4, "rewritten": 0, "rounded": 1, "approximated": 4, "dropped": 2, "refused": 0}
    assert set(formats.read(target).deltas) == {Q, EMBED, HEAD}


def test_the_error_of_an_approximated_dora_is_the_true_one(tmp_path: Path, model: Path) -> None:
    norms = np.linalg.norm(weight(model, Q), axis=1)
    delta = plain(magnitude=(norms * RNG.uniform(0.9, 1.3, 32)).astype(np.float32))
    source = save(Adapter({Q: delta}), tmp_path / "a")
    summed = weight(model, Q) + delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A
    expected = delta.magnitude[:, None] / np.linalg.norm(summed, axis=1)[:, None] * summed - weight(model, Q)  # type: ignore[index]
    errors = []
    for rank in (2, None, 32):
        target, report = convert(source, model, approx=True, rank=rank)
        approximated = dense(target, Q)
        error = np.linalg.norm(expected - approximated) / np.linalg.norm(expected)
        best = np.sqrt((np.linalg.svd(expected)[1][rank or 4 :] ** 2).sum()) / np.linalg.norm(expected)
        assert error == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert {line.error for line in report.losses} == {report.losses[0].error}
        assert report.losses[0].error == pytest.approx(error, rel=1e-4, abs=1e-5)
        errors.append(error)
        target.unlink()
    assert errors[0] > errors[1] > 100 * errors[2]


def test_a_large_matrix_is_approximated_as_well_as_it_can_be() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(700, 900)).astype(np.float32) * 0.01
    matrix += (rng.normal(size=(700, 8)) @ rng.normal(size=(8, 900))).astype(np.float32)
    values = np.linalg.svd(matrix, compute_uv=False)
    _, _, error = lossy.nearest(matrix, 8, np.dtype(np.float32))
    assert error == pytest.approx(np.sqrt((values[8:] ** 2).sum() / (values**2).sum()), rel=1e-3)
    again = lossy.nearest(matrix, 8, np.dtype(np.float32))
    assert again[0].tobytes() == lossy.nearest(matrix, 8, np.dtype(np.float32))[0].tobytes()


def test_factors_too_large_for_their_type_become_float32() -> None:
    lora_A, lora_B, error = lossy.nearest(np.full((4, 4), 1e12, np.float32), 1, np.dtype(np.float16))
    assert lora_A.dtype == lora_B.dtype == np.float32
    assert error < 1e-6


def test_replaced_rows_need_no_permission_but_the_base(tmp_path: Path, model: Path) -> None:
    values = normal(2, 32)
    source = save(Adapter({Q: plain()}, rows={EMBED: Rows((3, 20), values)}), tmp_path / "a")
    with pytest.raises(RefusedError, match="replaced rows"):
        convert(source, None, "mlx")
    target, report = convert(source, model)
    changed = weight(model, EMBED) + dense(target, EMBED)
    np.testing.assert_allclose(changed[[3, 20]], values, rtol=1e-6, atol=1e-6)
    other_rows = np.delete(np.arange(24), [3, 20])
    assert not dense(target, EMBED)[other_rows].any()
    assert report.worst == Loss.ROUNDED


def test_approximating_without_weights_names_what_is_missing(tmp_path: Path, model: Path) -> None:
    source = save(Adapter({Q: plain(magnitude=np.ones(32, np.float32))}), tmp_path / "a")
    (model / "model.safetensors").unlink()
    with pytest.raises(RefusedError) as caught:
        convert(source, model, approx=True)
    assert any("the base's own weight is needed" in item for item in caught.value.items)
    assert caught.value.hint == "The base's weights, in a Hugging Face folder, would help"


@pytest.mark.parametrize(
    ("drop", "dropped_name"),
    [(["lm_head*"], "lm_head.weight"), (["weights"], "lm_head.weight"), (["lm_head.weight"], "lm_head.weight")],
)
def test_a_name_a_pattern_or_a_kind_is_dropped(tmp_path: Path, model: Path, drop: list[str], dropped_name: str) -> None:
    source = save(Adapter({Q: plain()}, replaced={"lm_head.weight": normal(24, 32)}), tmp_path / "a")
    _, report = convert(source, model, drop=drop)
    assert [line.name for line in report.losses if line.loss == Loss.DROPPED] == [dropped_name]


def test_what_the_format_can_express_is_never_dropped_or_approximated(tmp_path: Path, model: Path) -> None:
    source = save(Adapter({Q: plain(), K: LowRank(normal(4, 32), normal(16, 4), 8.0)}), tmp_path / "a")
    _, report = convert(source, model, approx=True, drop=["norms", "biases", "weights", "rows", "*"])
    assert report.worst == Loss.EXACT
    assert len(report.losses) == 4


def test_a_module_the_base_lacks_can_be_dropped_by_name(tmp_path: Path, model: Path) -> None:
    deep = Q.replace("0", "1")
    source = save(Adapter({Q: plain(), deep: plain()}), tmp_path / "a")
    with pytest.raises(RefusedError, match="only 1 layers"):
        convert(source, model, drop=["norms"])
    target, report = convert(source, model, drop=[deep])
    with gguf_file.GGUFFile(target) as file:
        assert len(file.tensors) == 2
    assert report.summary["dropped"] == 2


def test_copies_of_the_base_can_be_dropped(tmp_path: Path, model: Path) -> None:
    copies = {"model.embed_tokens.weight": normal(24, 32), "lm_head.weight": normal(24, 32)}
    source = save(Adapter({Q: plain()}, copies=copies), tmp_path / "a")
    with pytest.raises(RefusedError, match="a copy of the base's weight"):
        convert(source, model, "mlx")
    _, report = convert(source, model, "mlx", drop=["copies"])
    assert {line.name for line in report.losses if line.loss == Loss.DROPPED} == set(copies)


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_a_copy_that_the_base_has_needs_no_permission(tmp_path: Path, model: Path, to: str) -> None:
    copies = {"model.embed_tokens.weight": weight(model, EMBED).astype(np.float32)}
    source = save(Adapter({Q: plain()}, copies=copies), tmp_path / "a")
    target, report = convert(source, model, to)
    assert set(formats.read(target).deltas) == {Q}
    assert any("left out, as they equal the base's" in note for note in report.notes)


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_pissa_becomes_plain_lora_by_the_weights_of_the_base(tmp_path: Path, model: Path, to: str) -> None:
    delta = plain()
    source = save(Adapter({Q: delta}, meta=Meta(init="pissa")), tmp_path / "a")
    (model / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(RefusedError, match="initialized with pissa"):
        convert(source, model, to)
    (tmp_path / "weights").rename(model / "model.safetensors")
    target, report = convert(source, model, to)
    assert report.worst == Loss.ROUNDED
    U, S, Vt = np.linalg.svd(weight(model, Q))
    expected = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A - (U[:, :4] * S[:4]) @ Vt[:4]
    np.testing.assert_allclose(dense(target, Q), expected, atol=1e-4)


def test_a_product_of_two_is_the_pair_it_equals(tmp_path: Path, model: Path) -> None:
    tensors = {f"hada_w{n}_{half}": normal(*shape) for n in (1, 2) for half, shape in (("a", (32, 2)), ("b", (2, 32)))}
    folder = tmp_path / "a"
    folder.mkdir()
    keys = {f"base_model.model.{Q}.{name}": array for name, array in tensors.items()}
    safetensors_file.write(folder / peft.WEIGHTS, keys, {"format": "pt"})
    (folder / peft.CONFIG).write_text(json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 3, "target_modules": ["q_proj"]}))
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    expected = 1.5 * (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])
    target, report = convert(folder, model, "mlx")
    np.testing.assert_allclose(dense(target, Q), expected, atol=1e-5)
    assert report.worst == Loss.ROUNDED


def test_the_command_reports_in_text_and_json(run: Run, tmp_path: Path, model: Path) -> None:
    source = save(EVERYTHING, tmp_path / "a")
    words = ["convert", source, "out.gguf", "--to", "gguf", "--base", model]
    assert "lora_bias=True is not supported for DoRA" in run(*words, code=6).stderr
    words += ["--force"]
    result = run(*words, code=6)
    assert len(result.stderr.splitlines()) == 1
    assert "more like it" in result.stderr
    refused = json.loads(run(*words, "--json", code=6).stdout)["error"]["refused"]
    assert {
        "name": NORM,
        "reason": "a replaced parameter (modules_to_save, bias) cannot be expressed in a GGUF adapter",
    } in refused
    words += ["--allow-approx", "--allow-drop", "norms,biases"]
    text = run(*words).stdout.splitlines()
    assert text[0] == "out.gguf: 11 tensors: 4 exact, 1 rounded, 4 approximated, 2 dropped"
    assert any("relative error" in line for line in text)
    (tmp_path / "out.gguf").unlink()
    assert len(run(*words, "--verbose").stdout.splitlines()) == 14  # more than tensors: the first line and two notes
    (tmp_path / "out.gguf").unlink()
    document = json.loads(run(*words, "--json").stdout)
    assert document["worst"] == "dropped"
    assert document["summary"]["approximated"] == 4
    assert {"name", "loss", "note", "error"} == set(document["tensors"][0])


def test_the_repr_of_a_report_and_of_an_adapter_is_a_line_of_counts() -> None:
    lines = [
        TensorLoss("a", Loss.EXACT), TensorLoss("b", Loss.APPROXIMATED, "why", 0.2), TensorLoss("c", Loss.DROPPED, "asked"),
        TensorLoss("d", Loss.APPROXIMATED, "why", 0.1), TensorLoss("e", Loss.EXACT),
    ]  # fmt: skip
    report = LossReport(tuple(lines), ("a note",))
    assert repr(report) == "<LossReport: 2 exact, 2 approximated, 1 dropped; 1 note>"
    adapter = Adapter({Q: LowRank(np.ones((2, 8)), np.ones((4, 2)), 2.0)}, {"lm_head.weight": np.ones((2, 2))})
    assert repr(adapter) == "Adapter(1 deltas, 1 replaced, 28 parameters)"
