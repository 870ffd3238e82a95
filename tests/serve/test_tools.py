"""Tools and JSON schemas with the real openai client, through the gateway, on a base that was taught one call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.conftest import need_module
from tests.support import serving, tool_templates
from tests.support.serving import Models

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytest.importorskip("torch")

QUESTION = [{"role": "user", "content": "Is it warm in Rome?"}]
ARGUMENTS = '{"city": "Rome", "days": 3}'
ANSWERS = {
    tool_templates.HERMES: f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    tool_templates.LLAMA: f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


TOOLS = [
    tool("weather", city={"type": "string", "maxLength": 8}, days={"enum": [1, 2, 3]}),
    tool("alarm", loud={"type": "boolean"}),
]


BaseModel: Any = pydantic.BaseModel


class Verdict(BaseModel):
    warm: bool
    season: Literal["summer", "winter"]
    note: str = pydantic.Field(max_length=5)


def teach(base: Path, template: str, answer: str) -> None:
    """Train a base to answer the question with a call of a tool."""
    import torch
    import transformers

    config = base / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(QUESTION, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{answer}<|im_end|>"))
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(ids, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)


@pytest.fixture(scope="module", params=[*ANSWERS], ids=["hermes", "llama"])
def template(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def client(template: str, models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    for module in ("transformers", "peft", "llguidance"):
        need_module(module)
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(models.base, folder / "base")
    teach(folder / "base", template, ANSWERS[template])
    with serving.gateway(folder / "base", registry, folder, "--engine", "torch", "--dtype", "float32") as gateway:
        yield openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def create(client: Any, **fields: Any) -> Any:
    options = {"model": "base", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
    return client.chat.completions.create(**{**options, **fields})


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_a_call_of_a_tool(client: Any, template: str) -> None:
    [choice] = create(client).choices
    assert choice.finish_reason == "tool_calls"
    assert calls_of(choice.message) == [("weather", json.loads(ARGUMENTS))]
    assert choice.message.content == ("I look.\n" if template == tool_templates.HERMES else None)
    assert choice.message.tool_calls[0].id.startswith("call_")


def test_a_stream_has_the_call_in_one_delta(client: Any) -> None:
    right = create(client).choices[0]
    chunks = [chunk.choices[0] for chunk in create(client, stream=True)]
    [called] = [choice.delta.tool_calls for choice in chunks if choice.delta.tool_calls]
    assert [(call.index, call.function.name, call.function.arguments) for call in called] == [(0, "weather", ARGUMENTS)]
    assert "".join(choice.delta.content or "" for choice in chunks) == (right.message.content or "")
    assert [choice.finish_reason for choice in chunks if choice.finish_reason] == ["tool_calls"]
    with client.chat.completions.stream(model="base", messages=QUESTION, tools=TOOLS, temperature=0) as stream:
        final = stream.get_final_completion().choices[0].message
    assert calls_of(final) == calls_of(right.message)


def test_the_turns_after_a_call_reach_the_template(client: Any, template: str) -> None:
    message = create(client).choices[0].message.model_dump(exclude_none=True)
    turns = [
        *QUESTION,
        message,
        {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Yes, 30 degrees."},
    ]
    answer = create(client, messages=turns, max_tokens=1)
    first = create(client, max_tokens=1)
    assert answer.usage.prompt_tokens - first.usage.prompt_tokens > len(ANSWERS[template])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_required_and_named_tools_are_called_whatever_the_base_would_say(client: Any, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 3, "messages": [{"role": "user", "content": "zzz"}]}
    alarm = {"type": "function", "function": {"name": "alarm"}}
    [choice] = create(client, tool_choice=alarm, **options).choices
    assert choice.finish_reason == "tool_calls"
    [(name, arguments)] = calls_of(choice.message)
    assert name == "alarm"
    assert type(arguments["loud"]) is bool
    [choice] = create(client, tool_choice="required", parallel_tool_calls=False, **options).choices
    [(name, arguments)] = calls_of(choice.message)
    assert name in ("weather", "alarm")
    assert choice.finish_reason == "tool_calls"


def test_without_a_choice_of_tools_the_prompt_has_none(client: Any) -> None:
    plain = create(client, tools=None)
    answer_without_tools = create(client, tool_choice="none")
    assert answer_without_tools.choices[0].message.tool_calls is None
    assert answer_without_tools.choices[0].message.content == plain.choices[0].message.content
    assert answer_without_tools.usage == plain.usage


@pytest.mark.parametrize("seed", range(3))
def test_parse_with_a_model_of_pydantic(client: Any, seed: int) -> None:
    options = {"model": "base", "messages": [{"role": "user", "content": "zzz"}], "temperature": 1.5, "seed": seed}
    [choice] = client.chat.completions.parse(**options, response_format=Verdict).choices
    assert isinstance(choice.message.parsed, Verdict)
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**options, response_format=Verdict) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed


def test_parse_with_tools_of_pydantic(client: Any) -> None:
    choices = client.chat.completions.parse(
        model="base", messages=QUESTION, temperature=1.0, seed=1, tools=[openai.pydantic_function_tool(Verdict)],
        tool_choice="required", parallel_tool_calls=False,
    ).choices  # fmt: skip
    [call] = choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Verdict)


def test_an_answer_is_a_call_or_fits_the_schema_where_both_are_asked_for(client: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "v", "strict": True, "schema": Verdict.model_json_schema()}}
    for temperature, seed in ((0, 1), (1.5, 1), (1.5, 2)):
        [choice] = create(client, response_format=schema, temperature=temperature, seed=seed, parallel_tool_calls=False).choices
        if choice.message.tool_calls:
            assert choice.finish_reason == "tool_calls"
        else:
            Verdict.model_validate_json(choice.message.content)


def test_json_objects(client: Any) -> None:
    answer = create(
        client, tools=None, response_format={"type": "json_object"}, logit_bias={"95": 60, "4": -100}, max_tokens=60
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_call_that_is_cut_is_content(client: Any) -> None:
    [choice] = create(client, tool_choice="required", max_tokens=25).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert len(choice.message.content) > 20
