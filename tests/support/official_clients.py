"""Official clients of model APIs on a gateway, each a program of its own: what of their features works.

A script has `features`, functions by what a user would call them; each returns something that is true if it works. A request
that the gateway or the engine refuses by its status is `refused`; anything else that is raised is an error of the test.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping

from tests.support.environments import environment

WORKS, REFUSED = "yes", "refused"
_MODEL = "team/a1:prod"
_HEAD = f"""
import json, sys
URL, MODEL = sys.argv[1], {_MODEL!r}
TURNS = [{{"role": "user", "content": "hi"}}]
SCHEMA = {{"type": "object", "properties": {{"a": {{"type": "boolean"}}}}, "required": ["a"], "additionalProperties": False}}
TOOL = {{"type": "function", "function": {{"name": "weather", "description": "", "parameters": SCHEMA}}}}
"""
_TAIL = """
def outcome(feature):
    try:
        return "yes" if feature() else "nothing came back"
    except Exception as error:
        status = getattr(error, "status_code", None)
        return "refused" if status in (400, 404) else f"{type(error).__name__}: {error}"


print(json.dumps({name: outcome(feature) for name, feature in features.items()}))
"""
_OPENAI = """
import openai

client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
short = {"model": MODEL, "max_tokens": 8, "temperature": 0}
prompt, chat = {**short, "prompt": "the quick "}, {**short, "messages": TURNS}
answer = {"model": MODEL, "input": "hi", "max_output_tokens": 8, "temperature": 0}
schema = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}


def streamed(create, options):
    chunks = [*create(stream=True, stream_options={"include_usage": True}, **options)]
    return chunks[-1].usage.completion_tokens and "".join(
        choice.delta.content or "" if hasattr(choice, "delta") else choice.text for chunk in chunks for choice in chunk.choices
    )


features = {
    "completion": lambda: client.completions.create(**prompt).choices[0].text,
    "streamed, with its usage": lambda: streamed(client.completions.create, prompt),
    "`n=2`": lambda: len(client.completions.create(n=2, **{**prompt, "temperature": 1}).choices) == 2,
    "`logprobs`": lambda: client.completions.create(logprobs=2, **prompt).choices[0].logprobs.top_logprobs,
    "`echo` with `logprobs`": lambda: client.completions.create(
        **{**prompt, "max_tokens": 1}, echo=True, logprobs=1
    ).choices[0].logprobs.token_logprobs[1:],
    "chat": lambda: client.chat.completions.create(**chat).choices[0].message.content,
    "chat, streamed, with its usage": lambda: streamed(client.chat.completions.create, chat),
    "chat with `logprobs`": lambda: client.chat.completions.create(
        logprobs=True, top_logprobs=2, **chat
    ).choices[0].logprobs.content,
    "chat with a JSON schema": lambda: json.loads(
        client.chat.completions.create(**{**chat, "max_tokens": 60}, response_format=schema).choices[0].message.content
    )["a"] in (True, False),
    "chat with tools": lambda: client.chat.completions.create(tools=[TOOL], **chat).choices[0],
    "penalties, `seed`, `stop`, `logit_bias`": lambda: client.chat.completions.create(
        presence_penalty=0.5, frequency_penalty=0.5, seed=1, stop=["zzz"], logit_bias={"5": 1}, **chat
    ).choices[0].message.content,
    "a response": lambda: client.responses.create(**answer).output_text,
    "a response, streamed": lambda: [*client.responses.create(stream=True, **answer)][-1].response.model,
    "embeddings": lambda: client.embeddings.create(model=MODEL, input="hi").data,
}
"""
_LANGCHAIN = """
from langchain_openai import ChatOpenAI

model = ChatOpenAI(base_url=URL + "/v1", api_key="none", model=MODEL, max_tokens=60, temperature=0, max_retries=0)
schema = {"title": "verdict", "description": "", **SCHEMA}
features = {
    "`invoke`": lambda: model.invoke("hi").content,
    "`stream`": lambda: "".join(chunk.content for chunk in model.stream("hi")),
    "`with_structured_output`": lambda: "a" in model.with_structured_output(schema, method="json_schema").invoke("hi"),
    "`bind_tools`": lambda: model.bind_tools([TOOL]).invoke("hi"),
}
"""
_LITELLM = """
import litellm

options = {"model": "openai/" + MODEL, "api_base": URL + "/v1", "api_key": "none", "max_tokens": 8, "temperature": 0}
features = {
    "`completion`": lambda: litellm.completion(messages=TURNS, **options).choices[0].message.content,
    "`completion`, streamed": lambda: "".join(
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=TURNS, stream=True, **options)
    ),
    "`text_completion`": lambda: litellm.text_completion(
        **{**options, "model": "text-completion-openai/" + MODEL}, prompt="the quick "
    ).choices[0].text,
}
"""
_ANTHROPIC = """
import anthropic

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
short = {"model": MODEL, "max_tokens": 8, "messages": TURNS, "extra_body": {"temperature": 0}}


def streamed():
    with client.messages.stream(**short) as events:
        return "".join(events.text_stream)


features = {
    "a message": lambda: client.messages.create(**short).content[0].text,
    "a message, streamed": streamed,
    "`count_tokens`": lambda: client.messages.count_tokens(model=MODEL, messages=TURNS).input_tokens,
}
"""
_OLLAMA = """
import ollama

client = ollama.Client(host=URL)
short = {"model": MODEL, "options": {"num_predict": 60, "temperature": 0}}
features = {
    "`chat`": lambda: client.chat(messages=TURNS, **short).message.content,
    "`chat`, streamed": lambda: "".join(part.message.content for part in client.chat(messages=TURNS, stream=True, **short)),
    "`chat` with a JSON schema": lambda: "a" in json.loads(client.chat(messages=TURNS, format=SCHEMA, **short).message.content),
    "`generate`": lambda: client.generate(prompt="hi", **short).response,
    "`list`, `show`": lambda: client.list().models and client.show(MODEL).modelinfo,
}
"""
CLIENTS: Mapping[str, tuple[str, str]] = {
    "openai 3.57": ("openai==3.57.0", _OPENAI),
    "langchain-openai 1.7": ("langchain-openai==1.7.4", _LANGCHAIN),
    "litellm 1.110": ("litellm==1.110.2", _LITELLM),
    "anthropic 2.14": ("anthropic==2.14.0", _ANTHROPIC),
    "ollama 0.6": ("ollama==0.6.3", _OLLAMA),
}


def outcomes(client: str, url: str) -> dict[str, str]:
    """Return what came of each feature of a client: WORKS, REFUSED, or an error."""
    requirement, script = CLIENTS[client]
    words = [str(environment(requirement)), "-c", _HEAD + script + _TAIL, url]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    features: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return features


def table(results: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """Return a table in Markdown: the outcomes of each client by engine, a row for the features that have the same."""
    lines = [f"| client | features | {' | '.join(results)} |", f"| --- | --- |{' --- |' * len(results)}"]
    for client in CLIENTS:
        features: dict[str, list[str]] = {}
        for feature in next(iter(results.values()))[client]:
            features.setdefault(" | ".join(results[engine][client][feature] for engine in results), []).append(feature)
        lines += [f"| {client} | {'; '.join(names)} | {cells} |" for cells, names in features.items()]
    return "\n".join(lines) + "\n"


def is_problem(line: str) -> bool:
    """Return whether a line of the table has anything but what works or is refused."""
    _, _, _, *cells, _ = (cell.strip() for cell in line.split("|"))
    return not set(cells) <= {WORKS, REFUSED}
