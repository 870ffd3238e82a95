"""Chat templates of the families that call tools, shortened to what decides the form of a call."""

from __future__ import annotations

_TURN = (
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ CALL }}{% endfor %}{{ '<|im_end|>\n' }}"
)
_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def _template(system: str, call: str) -> str:
    turns = "{% for message in messages %}" + _TURN.replace("CALL", call) + "{% endfor %}"
    return "{% if tools %}{{ '<|im_start|>system\n' }}" + system + "{{ '<|im_end|>\n' }}{% endif %}" + turns + _END


_LIST = "{% for tool in tools %}{{ '\n' + tool|tojson }}{% endfor %}"
HERMES = _template(
    "{{ 'Tools:' }}" + _LIST + '{{ \'\nReturn <tool_call>\n{"name": <function-name>, "arguments": <args>}\n</tool_call>\' }}',
    '\'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments|tojson'
    " + '}\n</tool_call>'",
)
"""Qwen 2.5's and Hermes'."""
LLAMA = _template(
    '{{ \'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\' }}' + _LIST,
    "'{\"name\": \"' + call.function.name + '\", \"parameters\": ' + call.function.arguments|tojson + '}'",
)
"""Llama 3.1's."""
CODER = _template("{{ '<tool_call>\n<function=name>\n<parameter=arguments>' }}" + _LIST, "''")
"""Qwen3-Coder's form, which is not known."""
