"""A tokenizer whose template shows tools, calls and thoughts, in the manner of Qwen's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tiny_tokenizers import byte_level_backend, write_folder
from tokenizers import AddedToken

from millpond.text.tokenizer import Tokenizer

MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")
TEMPLATE = """
{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
{%- set shown %}{{ system }}
# Tools
{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}Call them so:
<tool_call>
{"name": <name>, "arguments": <object>}
</tool_call>{% endset %}
{{- turn('system', shown) }}
{%- elif system %}{{ turn('system', system) }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- turn(message.role, message.content) }}
{%- elif message.role == 'tool' %}
{{- turn('user', '<tool_response>\\n' + message.content + '\\n</tool_response>') }}
{%- elif message.role == 'assistant' %}
{%- set said %}
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endset %}
{{- turn('assistant', said) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def write_tool_tokenizer(folder: Path, template: str = TEMPLATE) -> Path:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    settings = {"chat_template": template, "eos_token": "<|im_end|>"}
    return write_folder(folder, backend, settings, {"model_type": "llama", "vocab_size": 1000})


def write_answers(folder: Path, answers: Sequence[str]) -> str:
    """What SCRIPTED_ANSWERS is to be for a model of this folder that answers so, in turn."""
    tokenizer, written = Tokenizer.load(folder), folder / "answers.json"
    written.write_text(json.dumps([tokenizer.text_tokens(answer, parse_special=True) for answer in answers]))
    return str(written)
