"""What clients may send: fields, ranges, and the parameters that are refused because nothing implements them.

Values are strict (no "5" for 5). A field that is null counts as absent. Unknown fields are counted and dropped; known
ones with a meaning that is not implemented get a 400 unless their value asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Self, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from millpond.http.errors import ApiError, bad_value, unsupported
from millpond.http.fields import checked
from millpond.http.generation_request import (
    LONGEST_SALT,
    SAMPLING_FIELDS,
    AnswerForm,
    Conversation,
    GenerationRequest,
    Message,
    PlainPrompts,
    Tool,
)
from millpond.http.openai.forms import FORMAT, OUTPUTS, read_response_format, read_structured_outputs
from millpond.http.openai.messages import PREDICTION, read_messages, read_prediction
from millpond.http.openai.tools import AUTO, CHOICE, TOOLS, ToolChoice, check_choice, read_choice, read_tools
from millpond.http.speculation_fields import SPECULATIVE, SpeculativeOptions, read_speculative
from millpond.http.thinking import EFFORTS
from millpond.types import SamplingParams

MOST_STOPS = 16
LONGEST_STOP = 1000
"""Characters."""
MOST_BIASES = 1024
LONGEST_USER = 1024
"""Characters."""
_STOPS = f"a string of 1 to {LONGEST_STOP} characters, or a list of at most {MOST_STOPS} of them"

_EFFORTS = f"one of {', '.join(EFFORTS)}"
_SETTINGS = "an object of true, false, numbers and words, by names that the model's chat template reads"
SETTING_PATTERN = r"^[A-Za-z0-9_.\-]{0,64}$"

Neutral = Callable[[object], bool]
R = TypeVar("R", bound="OpenAIRequest")


def _one_of(*values: object) -> Neutral:
    return lambda value: any(value == allowed and type(value) is type(allowed) for allowed in values)


def _never(_value: object) -> bool:
    return False


def _empty(value: object) -> bool:
    return value in ([], {}, "")


NOT_IMPLEMENTED: dict[str, tuple[Neutral, str]] = {
    "tools": (_empty, "no tools"),
    "tool_choice": (_one_of("none", "auto"), '"none" or "auto"'),
    "thinking_token_budget": (_never, "absent"),
    "functions": (_empty, "no functions"),
    "function_call": (_one_of("none", "auto"), '"none" or "auto"'),
    "audio": (_empty, "no audio"),
    "modalities": (lambda value: value == ["text"], '["text"]'),
    "web_search_options": (_never, "no web search"),
    "reasoning_effort": (_one_of("none"), '"none"'),
    "verbosity": (_one_of("medium"), '"medium"'),
    "store": (_one_of(False), "false"),
    "best_of": (_one_of(1), "1"),
    "suffix": (_empty, "no suffix"),
    "stop_token_ids": (_empty, "none"),
    "include_stop_str_in_output": (_one_of(False), "false"),
    "bad_words": (_empty, "none"),
    "typical_p": (_one_of(1, 1.0), "1"),
    "length_penalty": (_one_of(1, 1.0), "1"),
    "use_beam_search": (_one_of(False), "false"),
    "mirostat": (_one_of(0), "0"),
    "xtc_probability": (_one_of(0, 0.0), "0"),
    "dry_multiplier": (_one_of(0, 0.0), "0"),
    "truncate_prompt_tokens": (_never, "none"),
    "chat_template": (_never, "the model's own template"),
    "chat_template_kwargs": (_empty, "none"),
    "add_generation_prompt": (_one_of(True), "true"),
    "continue_final_message": (_one_of(False), "false"),
    "documents": (_empty, "none"),
    "parse_special": (_one_of(False), "false: what messages say is text"),
    "grammar": (_empty, "no grammar"),
    "json_schema": (_empty, "no schema"),
    "guided_json": (_empty, "none: structured_outputs has it"),
    "guided_regex": (_empty, "none: structured_outputs has it"),
    "guided_choice": (_empty, "none: structured_outputs has it"),
    "guided_grammar": (_empty, "none: structured_outputs has it"),
}
"""Parameter → does this value ask for nothing, and what is allowed."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool = False


class OpenAIRequest(BaseModel):
    """The fields that chat and plain completions share. Descriptions complete "must be …"."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    model: str = Field("", description="a string")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="an integer of at least 1")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="an integer of at least 0, at most max_tokens")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="an integer of at least 1, or 0 or -1 for no limit")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    stop: tuple[str, ...] = Field((), description=_STOPS)
    seed: int | None = Field(None, description="an integer")
    n: int = Field(1, ge=1, le=16, description="an integer from 1 to 16")
    logit_bias: dict[int, float] = Field(
        default_factory=dict,
        description=f"an object of at most {MOST_BIASES} token ids, as strings, to numbers from -100 to 100",
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="a number above 0, at most 100")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object with include_usage, true or false")
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="an integer from 0 to 20")
    user: str = Field("", max_length=LONGEST_USER, description=f"a string of at most {LONGEST_USER} characters")
    ignore_eos: bool = Field(False, description="true or false")
    priority: int = Field(0, ge=-100, le=100, description="an integer from -100 to 100; the lowest goes first")
    cache_salt: str = Field("", max_length=LONGEST_SALT, description=f"a string of at most {LONGEST_SALT} characters")
    speculative: SpeculativeOptions | None = Field(None, description=SPECULATIVE)
    prediction: str | None = Field(None, description=PREDICTION)
    response_format: AnswerForm | None = Field(None, description=FORMAT)
    structured_outputs: AnswerForm | None = Field(None, description=OUTPUTS)

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: object) -> object:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MOST_STOPS:
            raise ValueError
        for stop in stops:
            if isinstance(stop, str) and len(stop) > LONGEST_STOP:
                message = f"stop: must be {_STOPS}, got one of {len(stop)} characters"
                raise ApiError(400, message, param="stop", code="invalid_value")
            if not isinstance(stop, str) or not stop:
                raise ValueError
        return tuple(stops)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError
        if len(value) > MOST_BIASES:
            message = f"logit_bias: must be an object of at most {MOST_BIASES} token ids, got {len(value)}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        biases: dict[int, float] = {}
        for key, bias in value.items():
            if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 9):
                raise bad_value("logit_bias", key, "an object whose keys are token ids as strings")
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise bad_value(f"logit_bias.{key}", bias, "a number from -100 to 100")
            biases[int(key)] = float(bias)
        return biases

    @field_validator("speculative", mode="plain")
    @classmethod
    def _speculative(cls, value: object) -> SpeculativeOptions:
        return read_speculative(value)

    @field_validator("prediction", mode="plain")
    @classmethod
    def _prediction(cls, value: object) -> str:
        return read_prediction(value)

    @field_validator("response_format", mode="plain")
    @classmethod
    def _format(cls, value: object) -> AnswerForm | None:
        return read_response_format(value)

    @field_validator("structured_outputs", mode="plain")
    @classmethod
    def _outputs(cls, value: object) -> AnswerForm | None:
        return read_structured_outputs(value)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.response_format is not None and self.structured_outputs is not None:
            raise bad_value(
                "structured_outputs", self.structured_outputs.param, "absent where response_format is given"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise bad_value("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_value("prompt_logprobs", self.prompt_logprobs, "absent where stream is true")
        if self.stream_options is not None and not self.stream:
            raise bad_value("stream_options", self.stream_options.model_dump(), "absent unless stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _asking(self, prompt: Conversation | PlainPrompts, field: str, logprobs: int | None) -> GenerationRequest:
        """What these fields ask for."""
        sampling = SamplingParams(
            max_tokens=0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            min_tokens=self.min_tokens,
        )
        return GenerationRequest(
            model=self.model,
            prompt=prompt,
            prompt_field=field,
            sampling=sampling,
            unsaid=frozenset(SAMPLING_FIELDS) - self.model_fields_set,
            max_tokens=self.max_tokens,
            n=self.n,
            stop=self.stop,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            form=self.response_format or self.structured_outputs,
            stream=self.stream,
            user=self.user,
            priority=self.priority,
            cache_salt=self.cache_salt,
            speculative=self.speculative,
            prediction=self.prediction,
        )


class ChatRequest(OpenAIRequest):
    """Body of POST /v1/chat/completions."""

    messages: tuple[Message, ...] = Field(description="a non-empty list of messages")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="an integer of at least 1")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="an integer from 0 to 20")
    add_generation_prompt: bool | None = Field(None, description="true or false")
    continue_final_message: bool = Field(False, description="true or false")
    tools: tuple[Tool, ...] = Field((), description=TOOLS)
    tool_choice: ToolChoice | None = Field(None, description=CHOICE)
    parallel_tool_calls: bool = Field(True, description="true or false")
    reasoning_effort: str | None = Field(None, description=_EFFORTS)
    thinking_token_budget: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="an integer of at least 0"
    )
    include_reasoning: bool = Field(True, description="true or false")
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict, description=_SETTINGS)

    @field_validator("messages", mode="plain")
    @classmethod
    def _messages(cls, value: object) -> tuple[Message, ...]:
        return read_messages(value)

    @field_validator("reasoning_effort")
    @classmethod
    def _known_effort(cls, value: str | None) -> str | None:
        if value is not None and value not in EFFORTS:
            raise ValueError
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _plain_settings(cls, value: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        for name, given in value.items():
            if isinstance(given, str) and not re.fullmatch(SETTING_PATTERN[1:-1], given):
                raise bad_value(f"chat_template_kwargs.{name}", given, "up to 64 letters, digits, hyphens and dots")
        return value

    @field_validator("tools", mode="plain")
    @classmethod
    def _tools(cls, value: object) -> tuple[Tool, ...]:
        return read_tools(value)

    @field_validator("tool_choice", mode="plain")
    @classmethod
    def _choice(cls, value: object) -> ToolChoice:
        return read_choice(value)

    @model_validator(mode="after")
    def _chat_together(self) -> Self:
        check_choice(self.tool_choice or AUTO, self.tools)
        if self.top_logprobs and not self.logprobs:
            raise bad_value("top_logprobs", self.top_logprobs, "0 or absent unless logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            allowed = f"equal to max_completion_tokens ({self.max_completion_tokens}) when both are given"
            raise bad_value("max_tokens", self.max_tokens, allowed)
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_value("continue_final_message", True, "false where add_generation_prompt is true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise bad_value("continue_final_message", True, "false unless the last message's role is assistant")
        return self

    def generation(self) -> GenerationRequest:
        """What it asks of the model."""
        opens = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        choice = self.tool_choice or AUTO
        conversation = Conversation(
            self.messages,
            opens,
            self.continue_final_message,
            () if choice.none else self.tools,
            must_call=choice.required,
            only=choice.only,
            one_call=choice.one or not self.parallel_tool_calls,
            most_thought=self.thinking_token_budget,
            settings=self.chat_template_kwargs,
            effort=self.reasoning_effort,
        )
        asked = self._asking(conversation, "messages", (self.top_logprobs or 0) if self.logprobs else None)
        if self.max_completion_tokens is None:
            return asked
        return replace(asked, max_tokens=self.max_completion_tokens, max_tokens_field="max_completion_tokens")


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="an integer of at least 0")
    prompt: tuple[str | tuple[int, ...], ...] = Field(
        description="a string, a list of strings, a list of token ids, or a list of such lists"
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(None, description="an integer from 0 to 5")
    echo: bool = Field(False, description="true or false")
    parse_special: bool = Field(False, description="true or false")

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: object) -> tuple[str | tuple[int, ...], ...]:
        return _read_prompts(value)

    def generation(self) -> GenerationRequest:
        """What it asks of the model; an answer without tokens is one that nobody is shown."""
        asked = self._asking(PlainPrompts(self.prompt, self.echo), "prompt", self.logprobs)
        scored = [top for top in (self.prompt_logprobs, self.logprobs if self.echo else None) if top is not None]
        sampling = msgspec.structs.replace(asked.sampling, prompt_logprobs=max(scored, default=None))
        most = None if self.max_tokens is None else max(1, self.max_tokens)
        return replace(
            asked,
            sampling=sampling,
            max_tokens=most,
            silent=self.max_tokens == 0,
            default_tokens=16,
            parse_special=self.parse_special,
        )

    def without_content(self) -> Self:
        """What of it an answer's writer may need; its prompts are not."""
        nothing: dict[str, object] = {"prompt": (), "prediction": None, "stop": (), "logit_bias": {}}
        return self.model_copy(update={**nothing, "response_format": None, "structured_outputs": None})


def _read_prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        prompts: list[object] = [value]
    elif isinstance(value, list) and value and type(value[0]) is int:
        prompts = [value]
    elif isinstance(value, list) and value:
        prompts = value
    else:
        raise _bad_prompt(value)
    return tuple(_read_prompt(prompt, value) for prompt in prompts)


def _read_prompt(prompt: object, whole: object) -> str | tuple[int, ...]:
    if not prompt:
        raise bad_value("prompt", whole, "not empty")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise _bad_prompt(whole)


def _bad_prompt(value: object) -> ApiError:
    return bad_value("prompt", value, str(CompletionRequest.model_fields["prompt"].description))


def parse(kind: type[R], fields: Mapping[str, object]) -> R:
    """Check a JSON object against ``kind``. Raises ApiError 400 naming the field, the value and what is allowed."""
    for name, (neutral, allowed) in NOT_IMPLEMENTED.items():
        value = fields.get(name)
        if value is not None and name not in kind.model_fields and not neutral(value):
            raise unsupported(name, value, allowed)
    return checked(kind, fields)


def unknown_fields(kind: type[OpenAIRequest], fields: Mapping[str, object]) -> list[str]:
    """Names that are ignored because nothing here knows them; one that is null is not there."""
    known = kind.model_fields.keys() | NOT_IMPLEMENTED.keys()
    return [name for name, value in fields.items() if value is not None and name not in known]
