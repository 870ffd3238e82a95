"""What the models of transformers pass to their attention: each argument is computed with or refused, in every model file."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.training.layers import row_attention  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.support import tiny_families  # noqa: E402

MODEL_FILES = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
POSITIONAL = {"module", "query", "key", "value", "attention_mask"}
TOKENS = 40  # more than the indexers of tiny models choose


def passed_keywords(source: str) -> list[tuple[int, str]]:
    """Return each keyword, with its line, of each call of an attention that comes from transformers' registry."""
    calls: list[tuple[str, ast.Call]] = []
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls.append((node.func.id, node))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call | ast.Subscript):
            origin = node.value.func if isinstance(node.value, ast.Call) else node.value
            origin = origin.value if isinstance(origin, ast.Attribute | ast.Subscript) else origin
            if isinstance(origin, ast.Name) and origin.id == REGISTRY:
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                names.add(ast.unparse(target))
    return [(call.lineno, keyword.arg) for name, call in calls if name in names for keyword in call.keywords if keyword.arg]


def test_every_argument_that_a_model_of_transformers_passes_is_computed_with_or_refused_by_name() -> None:
    recognized = row_attention.KNOWN_ARGUMENTS | row_attention.REFUSED_ARGUMENTS | POSITIONAL
    sources = {path: source for path in MODEL_FILES if REGISTRY in (source := path.read_text())}
    calls = {path: passed_keywords(source) for path, source in sources.items()}
    assert sum(bool(keywords) for keywords in calls.values()) > 300
    unknown = [
        f"{path.parent.name}:{line}: {word}" for path, words in calls.items() for line, word in words if word not in recognized
    ]
    assert not unknown, f"teach row_attention these arguments, or refuse them: {unknown}"


def test_the_search_finds_arguments_under_any_name_of_the_function() -> None:
    source = (
        "fn: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)\n"
        "attend = ALL_ATTENTION_FUNCTIONS[name]\nfn(self, q, new=1, **kwargs)\nattend(self, scaling=2)\nother(old=3)\n"
    )
    assert passed_keywords(source) == [(3, "new"), (4, "scaling")]


@pytest.mark.parametrize("name", sorted({*row_attention.REFUSED_ARGUMENTS, "of_the_next_family"}))
def test_an_argument_that_would_be_ignored_is_refused_by_name(name: str) -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RefusedError, match=f"Linear: passes '{name}' to its attention, which is not supported"):
        row_attention.attention(torch.nn.Linear(1, 1), q, q, q, None, **{name: 1})
    row_attention.attention(torch.nn.Linear(1, 1), q, q, q, None, **{name: None})


def tiny(family: str, attention: str) -> Any:
    model = tiny_families.model(family).train()
    model.set_attn_implementation(attention)
    return model


def states_and_gradients(model: Any, positions: Any) -> tuple[Any, list[Any]]:
    ids = torch.randint(3, 250, positions.shape, generator=torch.Generator().manual_seed(1))
    parameters = [parameter for parameter in model.base_model.parameters() if parameter.is_floating_point()]
    states = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    return states, list(torch.autograd.grad(states, parameters, upstream, allow_unused=True))


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        *itertools.product(["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa"], [False, True]),
        ("minimax_m3_vl_text", False),  # its blocks are those of a row, so documents cannot share one
    ],
)
def test_a_model_with_an_indexer_attends_to_the_keys_that_it_chooses(family: str, packed: bool) -> None:
    row_attention.register()
    positions = torch.cat([torch.arange(TOKENS), torch.arange(17)])[None] if packed else torch.arange(TOKENS)[None]
    ours, eager = (tiny(family, attention) for attention in (row_attention.NAME, "eager"))
    states, gradients = states_and_gradients(ours, positions)
    expected, expected_gradients = states_and_gradients(eager, positions)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def test_a_model_whose_masks_are_numbers_to_add_keeps_its_eager_attention() -> None:
    """DeepSeek-V4 adds columns of 0 and -inf to its mask, which in a mask of bool would say the opposite."""
    assert not row_attention.suits(transformers.DeepseekV4ForCausalLM)
    assert not row_attention.suits(transformers.HYV4ForCausalLM)
    assert row_attention.suits(transformers.LlamaForCausalLM)


def test_negative_choices_choose_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    indices = torch.tensor([[[0, -1], [0, 1], [0, 2], [-1, 3]]])
    output, _ = row_attention.attention(torch.nn.Linear(1, 1), q, k, v, None, indices=indices)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))
