"""What clients may send to /v1/messages: fields, ranges, and what is refused because nothing implements it.

Values are strict. A field that is null counts as absent. Unknown fields are counted and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from millpond.http.anthropic.blocks import marked, read_messages, read_system, referred
from millpond.http.errors import bad_value, missing, unsupported
from millpond.http.fields import checked
from millpond.http.form_fields import schema_form
from millpond.http.generation_request import (
    SAMPLING_FIELDS,
    AnswerForm,
    Call,
    Conversation,
    GenerationRequest,
    Message,
    Tool,
)
from millpond.http.thinking import EFFORTS
from millpond.http.tool_fields import MOST_TOOLS, check_names, checked_tool
from millpond.types import SamplingParams

MOST_STOPS = 16
MOST_NUMBER = 2**31
LONGEST_STOP = 1000
LONGEST_USER = 1024
CHOICE = "an object of type auto, any, none or tool, the last with the name of a tool"
THINKING = "an object of type enabled, with budget_tokens, or of type adaptive or disabled"
CONFIG = "an object with effort and format"


class MessagesRequest(BaseModel):
    """Body of POST /v1/messages. Descriptions complete "must be …"."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    model: str = Field("", description="a string")
    messages: list[object] = Field(description="a non-empty list of messages")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="an integer of at least 0")
    system: tuple[Message, ...] = Field((), description="a string or a list of text blocks")
    tools: tuple[tuple[Tool, bool], ...] = Field((), description=f"a list of at most {MOST_TOOLS} tools")
    tool_choice: Mapping[str, object] = Field(default_factory=dict, description=CHOICE)
    stop_sequences: tuple[str, ...] = Field(
        (), description=f"a list of at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters"
    )
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="an integer of at least 1, or 0 or -1 for no limit")
    stream: bool = Field(False, description="true or false")
    thinking: Mapping[str, object] = Field(default_factory=dict, description=THINKING)
    output_config: Mapping[str, object] = Field(default_factory=dict, description=CONFIG)
    metadata: Mapping[str, object] = Field(default_factory=dict, description="an object with user_id, a string")

    @field_validator("system", mode="plain")
    @classmethod
    def _system(cls, value: object) -> tuple[Message, ...]:
        return read_system(value)

    @field_validator("tools", mode="plain")
    @classmethod
    def _tools(cls, value: object) -> tuple[tuple[Tool, bool], ...]:
        return _read_tools(value)

    @field_validator("stop_sequences", mode="before")
    @classmethod
    def _stops(cls, value: object) -> object:
        if not isinstance(value, list) or len(value) > MOST_STOPS:
            raise ValueError
        if not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in value):
            raise ValueError
        return tuple(value)

    @field_validator("tool_choice", mode="plain")
    @classmethod
    def _choice(cls, value: object) -> Mapping[str, object]:
        if not isinstance(value, dict) or value.get("type") not in ("auto", "any", "none", "tool"):
            raise bad_value("tool_choice", value, CHOICE)
        if value["type"] == "tool" and not isinstance(value.get("name"), str):
            raise bad_value("tool_choice.name", value.get("name"), "the name of a tool")
        if value.get("disable_parallel_tool_use") not in (None, True, False):
            raise bad_value(
                "tool_choice.disable_parallel_tool_use", value["disable_parallel_tool_use"], "true or false"
            )
        return value

    @field_validator("thinking", mode="plain")
    @classmethod
    def _thinking(cls, value: object) -> Mapping[str, object]:
        if not isinstance(value, dict) or value.get("type") not in ("enabled", "adaptive", "disabled"):
            raise bad_value("thinking", value, THINKING)
        budget = value.get("budget_tokens")
        if value["type"] == "enabled" and (type(budget) is not int or not 1 <= budget < MOST_NUMBER):
            raise bad_value("thinking.budget_tokens", budget, f"an integer of at least 1, below {MOST_NUMBER}")
        return value

    @field_validator("output_config", mode="plain")
    @classmethod
    def _config(cls, value: object) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise bad_value("output_config", value, CONFIG)
        if value.get("effort") is not None and value["effort"] not in EFFORTS:
            raise bad_value("output_config.effort", value["effort"], f"one of {', '.join(EFFORTS)}")
        return value

    @field_validator("metadata", mode="plain")
    @classmethod
    def _metadata(cls, value: object) -> Mapping[str, object]:
        user = value.get("user_id") if isinstance(value, dict) else 0
        if not isinstance(value, dict) or not (user is None or isinstance(user, str)):
            raise bad_value("metadata", value, "an object with user_id, a string")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        known = {tool.name for tool, _ in self.tools}
        choice = self.tool_choice
        if choice.get("type") in ("any", "tool") and not known:
            raise bad_value("tool_choice", choice, "absent, auto or none where there are no tools")
        if choice.get("type") == "tool" and choice["name"] not in known:
            raise bad_value("tool_choice.name", choice["name"], f"one of the tools ({', '.join(sorted(known))})")
        return self

    def conversation(self) -> Conversation:
        """The prompt that it asks for. Raises ApiError 400."""
        by_name = {tool.name: tool for tool, _ in self.tools}
        messages = read_messages(self.messages, by_name)
        introduced = referred(self.messages)
        choice, thinking = self.tool_choice, self.thinking
        kind = choice.get("type", "auto")
        shown = () if kind == "none" else tuple(tool for tool, deferred in self.tools if not deferred)
        later = () if kind == "none" else tuple(t for t, deferred in self.tools if deferred and t.name in introduced)
        budget, effort = thinking.get("budget_tokens"), self.output_config.get("effort")
        last = messages[-1]
        continued = last.role == "assistant" and not any(isinstance(part, Call) for part in last.parts)
        if effort is None and thinking.get("type") in ("enabled", "adaptive"):
            effort = "medium"
        return Conversation(
            (*self.system, *messages),
            generation_prompt=not continued,
            continued=continued,
            tools=shown,
            introduced=later,
            must_call=kind in ("any", "tool"),
            only=frozenset((str(choice["name"]),)) if kind == "tool" else None,
            one_call=kind == "tool" or choice.get("disable_parallel_tool_use") is True,
            effort="none" if thinking.get("type") == "disabled" else effort if isinstance(effort, str) else None,
            lenient=True,
            most_thought=budget if thinking.get("type") == "enabled" and isinstance(budget, int) else None,
        )

    def form(self) -> AnswerForm | None:
        """What is said has to look like this. Raises ApiError 400."""
        asked, where = self.output_config.get("format"), "output_config.format"
        if asked is None:
            return None
        if not isinstance(asked, dict) or asked.get("type") != "json_schema":
            raise bad_value(where, asked, "an object of type json_schema with a schema")
        return schema_form(asked.get("schema"), f"{where}.schema", strict=False)

    def generation(self) -> GenerationRequest:
        """What it asks of the model. Raises ApiError 400."""
        if self.max_tokens is None:
            raise missing("max_tokens", "an integer of at least 0")
        sampling = SamplingParams(max_tokens=0, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        user = self.metadata.get("user_id")
        return GenerationRequest(
            model=self.model,
            prompt=self.conversation(),
            prompt_field="messages",
            sampling=sampling,
            unsaid=frozenset(SAMPLING_FIELDS) - self.model_fields_set,
            max_tokens=max(1, self.max_tokens),
            clamped=True,
            silent=self.max_tokens == 0,
            stop=self.stop_sequences,
            form=self.form(),
            stream=self.stream,
            user=user[:LONGEST_USER] if isinstance(user, str) else "",
        )


def _read_tools(value: object) -> tuple[tuple[Tool, bool], ...]:
    """Each tool, and whether it is only shown where a result introduces it. Raises ApiError 400."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise bad_value("tools", value, f"a list of at most {MOST_TOOLS} tools")
    found = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(value))
    check_names([tool.name for tool, _ in found], "tools[{}].name")
    return found


def _read_tool(value: object, where: str) -> tuple[Tool, bool]:
    if not isinstance(value, dict):
        raise bad_value(where, value, "an object with name and input_schema")
    if value.get("type") not in (None, "custom"):
        raise unsupported(f"{where}.type", value["type"], '"custom": tools that the client runs itself')
    schema, deferred = value.get("input_schema"), value.get("defer_loading")
    if schema is None:
        raise missing(f"{where}.input_schema", "a JSON schema")
    if deferred not in (None, True, False):
        raise bad_value(f"{where}.defer_loading", deferred, "true or false")
    if isinstance(schema, dict):
        schema = {key: part for key, part in schema.items() if key != "$schema"}
    tool = checked_tool({**value, "input_schema": schema}, where, "input_schema")
    return replace(tool, shared=marked([value])), bool(deferred)


def check_refused(fields: Mapping[str, object]) -> None:
    """Raises ApiError 400 for what has a meaning that nothing here implements."""
    if fields.get("mcp_servers"):
        raise unsupported("mcp_servers", fields["mcp_servers"], "none")
    if fields.get("container"):
        raise unsupported("container", fields["container"], "none")
    management = fields.get("context_management")
    edits = management.get("edits") if isinstance(management, dict) else None
    for index, edit in enumerate(edits if isinstance(edits, list) else ()):
        keeps = isinstance(edit, dict) and edit.get("keep") in ("all", {"type": "all"})
        if not keeps or not str(edit.get("type", "")).startswith("clear_thinking"):
            allowed = "clear_thinking that keeps all, which is what is done"
            raise unsupported(f"context_management.edits[{index}]", edit, allowed)


KNOWN = frozenset({*MessagesRequest.model_fields, "mcp_servers", "container", "context_management", "service_tier"})
"""Fields that are not unknown."""


def parse(fields: Mapping[str, object]) -> MessagesRequest:
    """Check a body. Raises ApiError 400 naming the field, the value and what is allowed."""
    check_refused(fields)
    return checked(MessagesRequest, fields)
