"""What clients may send to /v1/responses: fields, ranges, and what is refused because nothing implements it.

Values are strict. A field that is null counts as absent. Unknown fields are counted and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from millpond.http.errors import bad_value, unsupported
from millpond.http.fields import checked
from millpond.http.form_fields import ANY_OBJECT, schema_form
from millpond.http.generation_request import SAMPLING_FIELDS, AnswerForm, Conversation, GenerationRequest
from millpond.http.responses.items import ITEMS, Item, read_input
from millpond.http.responses.tools import CHOICE, TOOLS, Toolbox, read_choice, read_tools
from millpond.http.thinking import EFFORTS
from millpond.types import SamplingParams

LONGEST_USER = 1024
LONGEST_ID = 128
TEXT = "an object with a format, whose type is text, json_object or json_schema"
REASONING = "an object with effort and summary"


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: any(value == allowed and type(value) is type(allowed) for allowed in values)


def _never(_value: object) -> bool:
    return False


NOT_IMPLEMENTED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "background": (_one_of(False), "false"),
    "conversation": (_never, "absent"),
    "prompt": (_never, "absent"),
    "truncation": (_one_of("disabled"), '"disabled"'),
    "max_tool_calls": (_never, "absent"),
    "top_logprobs": (_one_of(0), "0"),
}
"""Parameter → does this value ask for nothing, and what is allowed."""


class ResponsesRequest(BaseModel):
    """Body of POST /v1/responses. Descriptions complete "must be …"."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    model: str = Field("", description="a string")
    input: object = Field(description=ITEMS)
    instructions: str | None = Field(None, description="a string")
    tools: Toolbox = Field(default_factory=Toolbox, description=TOOLS)
    tool_choice: object = Field(None, description=CHOICE)
    parallel_tool_calls: bool = Field(True, description="true or false")
    reasoning: Mapping[str, object] = Field(default_factory=dict, description=REASONING)
    text: Mapping[str, object] = Field(default_factory=dict, description=TEXT)
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="an integer of at least 1")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    stream: bool = Field(False, description="true or false")
    store: bool = Field(True, description="true or false")
    previous_response_id: str = Field(
        "", max_length=LONGEST_ID, description=f"the id of a response, at most {LONGEST_ID} characters long"
    )
    include: list[str] = Field(default_factory=list, description="a list of strings")
    metadata: dict[str, object] = Field(default_factory=dict, description="an object")
    user: str = Field("", max_length=LONGEST_USER, description=f"a string of at most {LONGEST_USER} characters")

    @field_validator("tools", mode="plain")
    @classmethod
    def _tools(cls, value: object) -> Toolbox:
        return read_tools(value)

    @field_validator("reasoning", mode="plain")
    @classmethod
    def _reasoning(cls, value: object) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise bad_value("reasoning", value, REASONING)
        if value.get("effort") is not None and value["effort"] not in EFFORTS:
            raise bad_value("reasoning.effort", value["effort"], f"one of {', '.join(EFFORTS)}")
        return value

    @field_validator("text", mode="plain")
    @classmethod
    def _text(cls, value: object) -> Mapping[str, object]:
        if not isinstance(value, dict) or not isinstance(value.get("format", {}), dict | None):
            raise bad_value("text", value, TEXT)
        return value

    def form(self) -> AnswerForm | None:
        """What is said has to look like this. Raises ApiError 400."""
        asked = self.text.get("format")
        if not isinstance(asked, dict):
            return None
        match asked.get("type"):
            case "text":
                return None
            case "json_object":
                return schema_form(ANY_OBJECT, "text.format", strict=False)
            case "json_schema":
                return schema_form(asked.get("schema"), "text.format.schema", strict=asked.get("strict") is True)
        raise bad_value("text.format.type", asked.get("type"), "text, json_object or json_schema")

    def generation(self, items: object, before: Sequence[Item]) -> GenerationRequest:
        """What it asks of the model: to answer these items, behind those of earlier responses. Raises ApiError 400."""
        choice, effort = read_choice(self.tool_choice, self.tools), self.reasoning.get("effort")
        messages = read_input(items, self.instructions, self.tools, before)
        conversation = Conversation(
            messages,
            tools=() if choice.none else self.tools.tools,
            must_call=choice.required,
            only=choice.only,
            one_call=choice.one or not self.parallel_tool_calls,
            effort=effort if isinstance(effort, str) else None,
            lenient=True,
        )
        sampling = SamplingParams(max_tokens=0, temperature=self.temperature, top_p=self.top_p)
        return GenerationRequest(
            model=self.model,
            prompt=conversation,
            prompt_field="input",
            sampling=sampling,
            unsaid=frozenset(SAMPLING_FIELDS) - self.model_fields_set,
            max_tokens=self.max_output_tokens,
            max_tokens_field="max_output_tokens",
            form=self.form(),
            stream=self.stream,
            user=self.user,
        )

    def told(self, fields: Mapping[str, object], *, kept: bool) -> Mapping[str, object]:
        """What the answer repeats of the request, and whether it is kept."""
        tools = [tool for tool in _listed(fields.get("tools")) if tool.get("type") not in self.tools.dropped]
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id or None,
            "reasoning": {"effort": self.reasoning.get("effort"), "summary": None},
            "store": kept,
            "temperature": self.temperature,
            "text": {"format": self.text.get("format") or {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": tools,
            "top_p": self.top_p,
            "truncation": "disabled",
        }


def _listed(value: object) -> list[dict[str, object]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


KNOWN = frozenset(
    {
        *ResponsesRequest.model_fields,
        *NOT_IMPLEMENTED,
        *("stream_options", "prompt_cache_key", "safety_identifier", "service_tier", "client_metadata"),
        *("prompt_cache_retention",),
    }
)
"""Fields that are not unknown: what only concerns the service behind the official API is taken and means nothing."""


def parse(fields: Mapping[str, object]) -> ResponsesRequest:
    """Check a body. Raises ApiError 400 naming the field, the value and what is allowed."""
    for name, (neutral, allowed) in NOT_IMPLEMENTED.items():
        value = fields.get(name)
        if value is not None and not neutral(value):
            raise unsupported(name, value, allowed)
    return checked(ResponsesRequest, fields)
