"""(M3, M11) Answers of a form over HTTP, by a real model: valid whatever its weights, refused in words where that
cannot be."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from tool_model import tool_model

from millpond.http.form_fields import MOST_CHARACTERS
from millpond.http.openai.forms import MOST_CHOICES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Launch, Server

pytestmark = pytest.mark.models

ASKED: list[dict[str, str]] = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["utc", "cet"]}}, "required": ["zone"]}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]


CHAINED = {
    "$ref": "#/$defs/0",
    "$defs": {str(n): {"prefixItems": [{"$ref": f"#/$defs/{n + 1}"}], "minItems": 1} for n in range(999)} | {"999": {}},
}
"""Following it by calls within calls would end the process."""


class City(BaseModel):
    name: Annotated[str, Field(max_length=12)]
    size: Literal["small", "large"]
    twins: Annotated[list[Annotated[int, Field(ge=0, le=99)]], Field(max_length=3)]
    mayor: Annotated[str, Field(max_length=12)] | None


@pytest.fixture(scope="module")
def real(demo_or_thin: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tool_model(demo_or_thin, tmp_path_factory.mktemp("models") / "tools")
    arguments = ["serve", str(folder), "--port", "0", "--model-name", "demo"]
    with launch([sys.executable, "-m", "millpond.cli.main", *arguments]) as server:
        yield server


@pytest.fixture
def ai(real: Server) -> Iterator[openai.OpenAI]:
    with real.client() as client:
        yield client


def said(ai: openai.OpenAI, seed: int = 0, **more: object) -> str:
    answer = ai.chat.completions.create(model="demo", messages=ASKED, seed=seed, extra_body=more)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def test_a_schema_of_the_clients_own_helper(ai: openai.OpenAI) -> None:
    for seed in range(3):
        parsed = ai.chat.completions.parse(
            model="demo",
            messages=[{"role": "user", "content": "Describe Paris."}],
            response_format=City,
            seed=seed,
            temperature=0.3,
            max_tokens=300,
        )
        assert parsed.choices[0].message.parsed is not None


def test_streamed_and_whole(ai: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    whole = said(ai, response_format=form)
    jsonschema.validate(json.loads(whole), WEATHER)
    stream = ai.chat.completions.create(
        model="demo",
        messages=ASKED,  # type: ignore[arg-type]
        seed=0,
        response_format=form,  # type: ignore[arg-type]
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


@pytest.mark.often("form0", "form3", "form4", "form5")
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"structured_outputs": {"json": WEATHER}}, r"\{.*\}"),
        ({"structured_outputs": {"json": json.dumps(WEATHER)}}, r"\{.*\}"),
        ({"structured_outputs": {"regex": r"\d{4}-\d\d/[a-f]{1,6}"}}, r"[0-9]{4}-[0-9]{2}/[a-f]{1,6}"),
        ({"structured_outputs": {"grammar": 'root ::= "ab" | [0-9]{2,4} mark?\nmark ::= "!"'}}, "ab|[0-9]{2,4}!?"),
        ({"structured_outputs": {"choice": ["yes", "no, never", 'so "so"\n']}}, r'yes|no, never|so "so"\n'),
        ({"response_format": {"type": "text"}, "structured_outputs": {"choice": ["b"], "json": None}}, "b"),
    ],
)
def test_forms(ai: openai.OpenAI, form: dict[str, object], pattern: str) -> None:
    for seed in range(3):
        assert re.fullmatch(pattern, said(ai, seed, **form, max_tokens=100, temperature=1.0), re.DOTALL)


def test_any_object(ai: openai.OpenAI) -> None:
    for form in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        answer = ai.chat.completions.create(
            model="demo",
            messages=ASKED,  # type: ignore[arg-type]
            seed=4,
            temperature=0.0,
            max_tokens=150,
            extra_body=form,
        )
        text = answer.choices[0].message.content or ""
        assert text.startswith("{")
        assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_plain_completions_have_forms_too(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(
        model="demo", prompt=["One:", "Two:"], n=2, extra_body={"structured_outputs": {"choice": ["1", "2"]}}
    )
    assert {choice.text for choice in answer.choices} <= {"1", "2"}
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 4


def test_as_many_tokens_as_there_must_be(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="demo",
        messages=ASKED,  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=60,
        extra_body={"min_tokens": 55},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 55


# --- calls --------------------------------------------------------------------------------------------------------


def calls(ai: openai.OpenAI, seed: int, **more: object) -> list[tuple[str, dict[str, object]]]:
    """Of an answer, streamed and whole; they are the same."""
    options: dict[str, object] = {
        "model": "demo",
        "messages": ASKED,
        "tools": TOOLS,
        "seed": seed,
        "temperature": 1.0,
        "max_tokens": 150,
        **more,
    }
    whole = ai.chat.completions.create(**options)  # type: ignore[call-overload]
    found = [(call.function.name, call.function.arguments) for call in whole.choices[0].message.tool_calls or []]
    with ai.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    again = [(call.function.name, call.function.arguments) for call in final.choices[0].message.tool_calls or []]
    if whole.choices[0].finish_reason == "tool_calls":
        assert again == found
    for name, arguments in found:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return [(name, json.loads(arguments)) for name, arguments in found]


@pytest.mark.often("-1]")
@pytest.mark.parametrize("seed", range(2))
def test_calls_that_must_be(ai: openai.OpenAI, seed: int) -> None:
    assert calls(ai, seed, tool_choice="required")


@pytest.mark.parametrize("seed", range(1))
def test_a_named_call(ai: openai.OpenAI, seed: int) -> None:
    for name in SCHEMAS:
        found = calls(ai, seed, tool_choice={"type": "function", "function": {"name": name}})
        assert [called for called, _ in found] == [name]


def test_calls_of_some_of_the_tools(ai: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    found = calls(ai, 1, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, parallel_tool_calls=False)
    assert [called for called, _ in found] == ["get_time"]


def test_the_choice_is_not_in_the_prompt(ai: openai.OpenAI) -> None:
    """Another choice is another grammar, and the same prefix."""
    counts = set()
    for choice in ("auto", "required", {"type": "function", "function": {"name": "get_time"}}):
        answer = ai.chat.completions.create(
            model="demo",
            messages=ASKED,  # type: ignore[arg-type]
            tools=TOOLS,  # type: ignore[arg-type]
            tool_choice=choice,  # type: ignore[arg-type]
            max_tokens=1,
        )
        assert answer.usage is not None
        counts.add(answer.usage.prompt_tokens)
    assert len(counts) == 1


def test_a_call_or_an_answer_of_a_form(ai: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["none", 1]}}}
    seen = set()
    for seed in range(20):
        if len(seen) == 2:
            break
        answer = ai.chat.completions.create(
            model="demo",
            messages=ASKED,  # type: ignore[arg-type]
            tools=TOOLS,  # type: ignore[arg-type]
            response_format=form,  # type: ignore[arg-type]
            seed=seed,
            temperature=1.6,
            max_tokens=120,
        )
        message = answer.choices[0].message
        assert (
            bool(message.tool_calls)
            or message.content in ('"none"', "1")
            or answer.choices[0].finish_reason == "length"
        )
        seen.add(bool(message.tool_calls))
    assert False in seen


@pytest.mark.slow
def test_neighbours_notice_nothing(ai: openai.OpenAI) -> None:
    """Their texts, with seeds, are what they are alone."""

    def free(seed: int) -> str:
        answer = ai.chat.completions.create(
            model="demo",
            messages=ASKED,  # type: ignore[arg-type]
            seed=seed,
            temperature=1.0,
            max_tokens=40,
        )
        return answer.choices[0].message.content or ""

    alone = [free(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        bound = [pool.submit(said, ai, seed, structured_outputs={"json": WEATHER}, max_tokens=100) for seed in range(4)]
        together = list(pool.map(free, range(4)))
        for one in bound:
            jsonschema.validate(json.loads(one.result()), WEATHER)
    assert together == alone


# --- what is refused ----------------------------------------------------------------------------------------------

DEEP: dict[str, object] = {"type": "string"}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP}


def named(schema: object, **more: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response_format", "json", "response_format: must be an object whose type is"),
        ("response_format", {"type": "xml"}, 'response_format.type: "xml" is not supported'),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema: must be an object"),
        ("response_format", named([]), "response_format.json_schema.schema: must be a JSON schema of at most"),
        ("response_format", named({}, strict="yes"), "response_format.json_schema.strict: must be true or false"),
        ("response_format", named({"type": "frob"}), "response_format.json_schema.schema: Invalid type: frob"),
        ("response_format", named({"not": {}, "type": "string"}, strict=True), 'Unimplemented keys: ["not"]'),
        ("response_format", named({"$ref": "http://example.org/x"}), "response_format.json_schema.schema: "),
        ("response_format", named(DEEP), "response_format.json_schema.schema: must be a JSON schema of at most"),
        ("response_format", named({"enum": ["x" * MOST_CHARACTERS]}), "must be at most 65536 characters long"),
        ("structured_outputs", [], "structured_outputs: must be an object with one of"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "structured_outputs: must be an object with one of"),
        ("structured_outputs", {"structural_tag": "x"}, "structured_outputs.structural_tag:"),
        ("structured_outputs", {"regex": 3}, "structured_outputs.regex: must be a string, not empty, got 3"),
        ("structured_outputs", {"regex": "a(?=b)"}, "structured_outputs.regex: "),
        ("structured_outputs", {"regex": "(" * 10}, "structured_outputs.regex: "),
        ("structured_outputs", {"choice": []}, f"structured_outputs.choice: must be a list of 1 to {MOST_CHOICES}"),
        ("structured_outputs", {"choice": ["a", ""]}, "structured_outputs.choice: must be a list"),
        ("structured_outputs", {"json": "{"}, "structured_outputs.json: must be a JSON schema"),
        (
            "structured_outputs",
            {"grammar": "start: x"},
            "structured_outputs.grammar: line 1, at 'start: x': ",
        ),
        ("structured_outputs", {"grammar": 'root ::= "a" root'}, "structured_outputs.grammar: rule root can never end"),
        ("structured_outputs", {"json": CHAINED}, "levels, with its references followed; allowed: 400"),
        ("response_format", named(CHAINED), "levels, with its references followed; allowed: 400"),
        ("structured_outputs", {"regex": "x" * (MOST_CHARACTERS + 1)}, "must be at most 65536 characters long"),
        ("response_format", named({"properties": {"a": {"multipleOf": 99991}}}), "multipleOf is 99991"),
        ("guided_json", {"type": "object"}, "guided_json: "),
        ("min_tokens", -1, "min_tokens: must be an integer of at least 0"),
        ("min_tokens", 51, "min_tokens: must be at most max_tokens (50), got 51"),
        ("thinking_token_budget", -1, "thinking_token_budget: must be an integer of at least 0"),
    ],
)
def test_what_is_wrong_is_named(ai: openai.OpenAI, field: str, value: object, message: str) -> None:
    body = {"model": "demo", "messages": ASKED, "max_tokens": 50, field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        ai.post("/chat/completions", body=body, cast_to=httpx.Response)
    assert message in caught.value.message
    assert str(caught.value.param).partition(".")[0] == field


@pytest.mark.slow  # where a text gets stuck depends on the text
@pytest.mark.parametrize("demo_or_thin", ["demo"], indirect=True)
def test_what_takes_too_much_is_an_error_of_its_own(ai: openai.OpenAI) -> None:
    """Nobody can tell before; a client that tries again would get no further."""
    with pytest.raises(openai.InternalServerError) as caught:
        said(ai, structured_outputs={"regex": "((a{1,999}){1,999}){1,999}"}, max_tokens=50)
    assert caught.value.code == "grammar_stuck"
    assert "the answer cannot become what it has to look like: " in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_what_is_left_out_is_named(ai: openai.OpenAI) -> None:
    schema = {**WEATHER, "not": {"required": ["x"]}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "(?=a)"}}}}}
    body = {"response_format": named(schema), "tools": [tool]}
    answer = ai.chat.completions.with_raw_response.create(
        model="demo",
        messages=ASKED,  # type: ignore[arg-type]
        extra_body=body,
        max_tokens=100,
    )
    ignored = answer.headers["x-millpond-ignored"]
    assert "response_format.json_schema.schema: not" in ignored
    assert "tools[0].function.parameters: all of it" in ignored
