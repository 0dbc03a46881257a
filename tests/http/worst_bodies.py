"""The worst that a client may send in each field of each endpoint, within the default limits on bytes and on values.

``WORST`` has every field of every request schema: a new field is to be given its worst, too. Bodies are made when they
are asked for. Where a limit of its own refuses the worst there is the worst that it lets pass beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

CHAT, PLAIN, EXPLAIN = "/v1/chat/completions", "/v1/completions", "/v1/cache/explain"
CLAUDE, COUNT = "/v1/messages", "/v1/messages/count_tokens"
RESPONSES, INPUT = "/v1/responses", "/v1/responses/input_tokens"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
EMBED = "/v1/embeddings"
BYTES = 8 * 1024 * 1024 - 1000
VALUES = 299_000
CONTEXT = 131_072
"""Of the server that is asked."""
HELLO = '[{"role":"user","content":"hi"}]'

Json = Callable[[], str]


def many(unit: str, count: int = BYTES, size: int = BYTES, ends: str = "[]") -> Json:
    """A list, or with other ``ends`` an object, of as many ``unit`` as fit. A {} in it stands for a number."""

    def make() -> str:
        numbered = "{}" in unit and ends == "{}"
        longest = len(unit.format(count) if numbered else unit) + 1
        fit = min(count, size // longest)
        units = (unit.format(number) for number in range(fit)) if numbered else (unit for _ in range(fit))
        return ends[0] + ",".join(units) + ends[1]

    return make


def text(unit: str = "word, ", size: int = BYTES) -> Json:
    """A string, of as many ``unit`` as fit."""
    return lambda: '"' + unit * (size // len(unit.encode())) + '"'


def inside(before: str, value: Json, after: str) -> Json:
    return lambda: before + value() + after


def message(value: Json, name: str = "content") -> Json:
    """One message with this in one of its fields."""
    rest = '"role":"user",' if name == "content" else '"role":"user","content":"hi",'
    return inside(f'[{{{rest}"{name}":', value, "}]")


def assistant(value: Json, name: str) -> Json:
    """One answer with this in one of its fields."""
    return inside(f'[{{"role":"assistant","content":"hi","{name}":', value, "}]")


def tools(rest: str) -> Json:
    """As many as there may be."""
    one = '{{"type":"function","function":{{"name":"f{}",' + rest.replace("{", "{{").replace("}", "}}") + "}}}}"
    return lambda: "[" + ",".join(one.format(number) for number in range(1024)) + "]"


LISTS, OBJECTS = many("[]", VALUES // 2), many('{"a":[]}', VALUES // 4)
NUMBERS = inside('{"a":', many("0"), "}")
"""As many values as a text of that size can have: as a string they are one value of the body."""
MOST = many('"k{}":0', 9_990, ends="{}")
"""As many as the arguments of a call may have."""
PAIRS = many('"k{}":0', VALUES // 2, ends="{}")
TEXT = text()
ANYTHING: tuple[Json, ...] = (LISTS, TEXT)
"""For a field that is refused unless it is something small."""
OF_SCHEMA = '{"type":"json_schema","json_schema":{"schema":'
SMALL = '{"role":"user","content":""}'

SHARED: dict[str, tuple[Json, ...]] = {
    **dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n"), ANYTHING),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), ANYTHING),
    **dict.fromkeys(("stream", "ignore_eos", "priority", "model", "user", "cache_salt", "logprobs"), ANYTHING),
    "prompt_logprobs": ANYTHING,
    "seed": (lambda: "9" * 1_000_000, *ANYTHING),
    "stop": (
        text("a"),
        many('"' + "a" * 1000 + '"', 16),
        lambda: json.dumps([chr(0x4E00 + number) * 1000 for number in range(16)]),
        LISTS,
    ),
    "logit_bias": (many('"{}":100', VALUES // 2, ends="{}"), many('"{}":100', 1000, ends="{}"), TEXT),
    "stream_options": (PAIRS, TEXT),
    "min_tokens": ANYTHING,
    "response_format": (
        inside(OF_SCHEMA + '{"enum":', many('"{}"', 4000), "}}}"),
        inside(OF_SCHEMA + '{"enum":', LISTS, "}}}"),
        inside(OF_SCHEMA, PAIRS, "}}"),
        inside(OF_SCHEMA + '{"properties":', many('"k{}":true', 3000, ends="{}"), "}}}"),
        inside(OF_SCHEMA + '{"pattern":', text("a{1,999}", 60_000), "}}}"),
        *ANYTHING,
    ),
    "structured_outputs": (
        inside('{"regex":', text("(a|b)*c{1,999}", 60_000), "}"),
        inside('{"choice":', many('"' + "a" * 60 + '{}"', 900), "}"),
        inside('{"json":', text(), "}"),
        inside('{"choice":', LISTS, "}"),
        inside('{"json":', PAIRS, "}"),
        inside('{"grammar":', lambda: json.dumps("root ::= " + "[a-z] root? | " * 4500 + '"a"'), "}"),
        *ANYTHING,
    ),
    "speculative": (PAIRS, TEXT),
    "prediction": (
        inside('{"type":"content","content":', TEXT, "}"),
        inside('{"type":"content","content":', many('{"type":"text","text":""}', VALUES // 5), "}"),
        PAIRS,
    ),
}

MESSAGES: tuple[Json, ...] = (
    message(TEXT),
    message(text("\\u4e2d\\n")),
    message(text("🎉")),
    message(text("a b ", CONTEXT - 1000)),
    message(many('{"type":"text","text":""}', VALUES // 5)),
    message(many('{"type":"text","text":"a"}')),
    message(TEXT, "name"),
    message(TEXT, "tool_call_id"),
    message(LISTS, "tool_calls"),
    message(LISTS, "name"),
    many(SMALL, VALUES // 5),
    many(SMALL),
    many('{"role":"user","content":"a"}', 8_000),
    many('{"role":"user","content":"a"}', VALUES // 5),
    LISTS,
    TEXT,
    assistant(many('{"function":{"name":"f","arguments":"{}"}}', VALUES // 9), "tool_calls"),
    assistant(inside('[{"function":{"name":"f","arguments":', TEXT, "}}]"), "tool_calls"),
    assistant(lambda: json.dumps([{"function": {"name": "f", "arguments": PAIRS()}}]), "tool_calls"),
    assistant(TEXT, "reasoning_content"),
    assistant(lambda: json.dumps([{"function": {"name": "f", "arguments": NUMBERS()}}]), "tool_calls"),
    assistant(lambda: json.dumps([{"function": {"name": "f", "arguments": MOST()}}] * 50), "tool_calls"),
)
"""Called by number: new ones go to the end."""
PROMPTS: tuple[Json, ...] = (
    TEXT,
    text("a b ", CONTEXT - 1000),
    many("5"),
    many("5", VALUES),
    many("5", CONTEXT - 1000),
    many("123456", VALUES),
    many("[1]"),
    many("[1]", VALUES // 3),
    many('"a"', VALUES // 2),
    many('"' + "a b " * 4_000 + '"', 500),
    OBJECTS,
)

WORST: dict[str, dict[str, tuple[Json, ...]]] = {
    CHAT: {
        **SHARED,
        "messages": MESSAGES,
        "max_completion_tokens": ANYTHING,
        "top_logprobs": ANYTHING,
        "continue_final_message": ANYTHING,
        "add_generation_prompt": ANYTHING,
        "tools": (
            LISTS,
            OBJECTS,
            TEXT,
            tools('"parameters":{"type":"object","properties":{"a":{"type":"string"}}}'),
            tools('"description":"' + "a b " * 1900 + '"'),
            inside('[{"type":"function","function":{"name":"f","parameters":', PAIRS, "}}]"),
            inside('[{"type":"function","function":{"name":"f","parameters":{"a":', LISTS, "}}}]"),
            inside('[{"type":"function","function":{"name":"f","description":', TEXT, "}}]"),
        ),
        "chat_template_kwargs": (PAIRS, TEXT),
        "tool_choice": (
            inside('{"type":"allowed_tools","allowed_tools":{"mode":"auto","tools":', LISTS, "}}"),
            *ANYTHING,
        ),
        **dict.fromkeys(
            ("parallel_tool_calls", "reasoning_effort", "thinking_token_budget", "include_reasoning"), ANYTHING
        ),
        "no_such_field": (LISTS, OBJECTS, PAIRS, TEXT, many("[]"), many('{"a":{"a":{}}}'), text("\\n"), text('\\"')),
    },
    PLAIN: {
        **SHARED,
        "prompt": PROMPTS,
        "echo": ANYTHING,
        "parse_special": ANYTHING,
        "suffix": (LISTS, TEXT),
        "no_such_field": (LISTS, OBJECTS),
    },
    CLAUDE: {
        "messages": (
            message(TEXT),
            message(many('{"type":"text","text":""}', VALUES // 5)),
            message(
                many('{"type":"tool_result","tool_use_id":"a","content":[{"type":"text","text":"b"}]}', VALUES // 9)
            ),
            assistant(many('{"type":"thinking","thinking":"a"}', VALUES // 5), "x"),
            inside('[{"role":"assistant","content":', many('{"type":"thinking","thinking":"a"}', VALUES // 5), "}]"),
            inside('[{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f","input":', PAIRS, "}]}]"),
            many(SMALL, VALUES // 5),
            many('{"role":"user","content":"a"}', VALUES // 5),
            LISTS,
            TEXT,
            inside('[{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f","input":', MOST, "}]}]"),
        ),
        "system": (TEXT, many('{"type":"text","text":"a"}', VALUES // 5), LISTS),
        "tools": (
            inside('[{"name":"f","input_schema":{"a":', LISTS, "}}]"),
            inside('[{"name":"f","input_schema":', PAIRS, "}]"),
            inside('[{"name":"f","input_schema":{},"description":', TEXT, "}]"),
            LISTS,
            TEXT,
        ),
        "output_config": (inside('{"format":{"type":"json_schema","schema":', PAIRS, "}}"), PAIRS, TEXT),
        "context_management": (inside('{"edits":', LISTS, "}"), PAIRS, TEXT),
        **dict.fromkeys(("metadata", "thinking", "tool_choice"), (PAIRS, TEXT)),
        **dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "stream", "model"), ANYTHING),
        "stop_sequences": (text("a"), many('"' + "a" * 1000 + '"', 16), LISTS),
        "no_such_field": (LISTS, OBJECTS),
    },
    RESPONSES: {
        "input": (
            TEXT,
            many(SMALL, VALUES // 5),
            many('{"role":"user","content":"a"}', VALUES // 5),
            many('{"type":"reasoning","summary":[{"text":"a"}]}', VALUES // 6),
            many('{"type":"function_call","call_id":"a","name":"f","arguments":"{}"}', VALUES // 6),
            inside('[{"role":"user","content":', many('{"type":"input_text","text":""}', VALUES // 5), "}]"),
            inside('[{"type":"reasoning","encrypted_content":', TEXT, "}]"),
            inside('[{"type":"function_call_output","call_id":"a","output":', TEXT, "}]"),
            LISTS,
            lambda: json.dumps([{"type": "function_call", "call_id": "a", "name": "f", "arguments": NUMBERS()}]),
            lambda: json.dumps([{"type": "function_call", "call_id": "a", "name": "f", "arguments": MOST()}] * 50),
        ),
        "instructions": (TEXT, LISTS),
        "tools": (
            inside('[{"type":"namespace","name":"n","tools":', many('{"type":"function","name":"f"}', 1000), "}]"),
            inside('[{"type":"function","name":"f","parameters":', PAIRS, "}]"),
            inside('[{"type":"function","name":"f","description":', TEXT, "}]"),
            LISTS,
            TEXT,
        ),
        "tool_choice": (inside('{"type":"allowed_tools","mode":"auto","tools":', LISTS, "}"), *ANYTHING),
        "text": (inside('{"format":{"type":"json_schema","schema":', PAIRS, "}}"), PAIRS, TEXT),
        "metadata": (PAIRS, TEXT),
        "include": (LISTS, many('"a"', VALUES // 2)),
        "max_tokens": (LISTS,),
        **dict.fromkeys(("max_output_tokens", "temperature", "top_p", "stream", "model", "user"), ANYTHING),
        **dict.fromkeys(("parallel_tool_calls", "reasoning", "store", "previous_response_id"), ANYTHING),
        "no_such_field": (LISTS, OBJECTS),
    },
    EMBED: {
        "input": (*PROMPTS, many('"a"', 2048), many("[5]", 2048)),
        **dict.fromkeys(("model", "encoding_format", "dimensions", "user"), ANYTHING),
        "no_such_field": (LISTS, OBJECTS),
    },
    TOKENIZE: {
        "prompt": (TEXT, text("a b ", 1_000_000), text("\\u4e2d\\n", 6_000_000), LISTS),
        "content": (LISTS,),
        "messages": (LISTS,),
        **dict.fromkeys(("model", "add_special_tokens", "parse_special", "return_token_strs"), ANYTHING),
    },
    DETOKENIZE: {"tokens": (many("5", VALUES), many("[]", VALUES // 2), TEXT), "model": ANYTHING},
}
"""Endpoint → field → values."""

COMBINED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "prompts of 16 answers": ((PLAIN, f'{{"max_tokens":2,"n":16,"prompt":[{",".join(["5"] * (CONTEXT - 1000))}]}}'),),
    "an echo of 16 answers": (
        (PLAIN, f'{{"max_tokens":2,"n":16,"echo":true,"prompt":"{"a" * (CONTEXT - 1000)}"}}'),
        (PLAIN, f'{{"max_tokens":2,"n":16,"echo":true,"stream":true,"prompt":"{"a" * (CONTEXT - 1000)}"}}'),
    ),
    "control tokens as text": tuple(
        (path, '{"max_tokens":2,' + asked % ("<end>" * (CONTEXT // 5 - 100)) + "}")
        for path, asked in ((CHAT, '"messages":[{"role":"user","content":"%s"}]'), (PLAIN, '"prompt":"%s"'))
    ),
    "names without end": ((CHAT, '{"messages":' + HELLO + ',"max_tokens":2,' + PAIRS()[1:]),),
    "log-probabilities": (
        (CHAT, f'{{"messages":{HELLO},"max_tokens":400,"n":8,"logprobs":true,"top_logprobs":20}}'),
        (PLAIN, '{"prompt":"hi","max_tokens":400,"n":8,"logprobs":5}'),
    ),
    "no JSON": ((CHAT, "[" * BYTES), (CHAT, '"' * BYTES), (CHAT, '{"a":' * (BYTES // 5)), (CHAT, "\\" * BYTES)),
}
"""What is worst in several fields together, or in none."""


CLOSE = b"host: localhost\r\nconnection: close\r\n"


def chunked(head: str, content: bytes) -> bytes:
    """A request whose body comes a byte a chunk."""
    sent = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    return head.encode() + CLOSE + b"transfer-encoding: chunked\r\n\r\n" + sent + b"0\r\n\r\n"


RAW: Mapping[str, bytes] = {
    "chunks of a byte": chunked(
        f"POST {PLAIN} HTTP/1.1\r\n", b'{"prompt":"hi","max_tokens":2,"pad":"%s"}' % (b"x" * 200_000)
    ),
    "chunks that nobody reads": chunked("POST /livez HTTP/1.1\r\n", b"x" * 200_000),
    "many headers": b"GET /v1/models HTTP/1.1\r\n" + CLOSE + b"a:\r\n" * 15_000 + b"\r\n",
    "a long path": b"GET " + b"//a" * 20_000 + b" HTTP/1.1\r\n" + CLOSE + b"\r\n",
    "many requests at once": b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 200
    + b"GET /livez HTTP/1.1\r\n"
    + CLOSE
    + b"\r\n",
}
"""Whole requests."""


def body(endpoint: str, field: str, value: Json) -> bytes:
    """A whole body that is good but for this field."""
    needed = {"messages": HELLO} if endpoint in (CHAT, CLAUDE, COUNT) else {"prompt": '"hi"'}
    if endpoint == DETOKENIZE:
        needed = {"tokens": "[5]"}
    if endpoint == EMBED:
        needed = {"input": '"hi"'}
    if endpoint in (RESPONSES, INPUT):
        needed = {"input": '"hi"', "max_output_tokens": "2"}
    fields = {"max_tokens": "2", **needed, field: value()}
    if field == "max_completion_tokens":
        del fields["max_tokens"]
    if field == "top_logprobs":
        fields["logprobs"] = "true"
    if field == "stream_options":
        fields["stream"] = "true"
    return ("{" + ",".join(f'"{name}":{given}' for name, given in fields.items()) + "}").encode()


def worst(endpoint: str) -> Iterator[tuple[str, bytes]]:
    """Each of an endpoint's worst bodies, with a name."""
    for field, values in WORST[{EXPLAIN: PLAIN, COUNT: CLAUDE, INPUT: RESPONSES}.get(endpoint, endpoint)].items():
        for number, value in enumerate(values):
            yield f"{field}[{number}]", body(endpoint, field, value)
    if endpoint == EXPLAIN:
        for number, value in enumerate(MESSAGES):
            yield f"messages[{number}]", ('{"messages":' + value() + "}").encode()
