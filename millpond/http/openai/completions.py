"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from millpond.http.events import Delta
from millpond.http.openai.choices import Choice, ChoicesWriter, Json, described
from millpond.http.openai.errors import error_response
from millpond.http.openai.logprobs import CompletionLogprobs
from millpond.http.openai.schemas import CompletionRequest, parse, unknown_fields
from millpond.http.rendering import Answering, Parsed, Rendering


class CompletionWriter(ChoicesWriter):
    """Text completions in the API's shape; with echo the prompt comes before the answer."""

    def __init__(self, answering: Answering, *, include_usage: bool, logprobs: bool, echo: bool) -> None:
        self._answering = answering
        self._logprobs = logprobs
        self._echoed = echo
        head: Json = {"id": f"cmpl-{answering.id}", "object": "text_completion", **described(answering)}
        super().__init__(head, head, include_usage=include_usage)

    def choice(self) -> Choice:
        return Choice(CompletionLogprobs(self._answering.tokenizer).render if self._logprobs else None)

    def opening(self, choice: int) -> Json | None:
        if not self._echoed:
            return None
        return {"index": choice, "text": self._echo(choice), "logprobs": None, "finish_reason": None}

    def deltas(self, delta: Delta, choice: Choice) -> Iterator[Json]:
        logprobs = choice.render(delta.logprobs) if choice.render is not None else None
        yield {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice) -> Json:
        text = self._echo(index) + choice.text
        return {"index": index, "text": text, "logprobs": choice.logprobs, "finish_reason": choice.finish}

    def _echo(self, choice: int) -> str:
        return self._answering.echoes[choice // self._answering.n]


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(CompletionRequest, fields)
    logprobs = asked.logprobs is not None
    writer = partial(CompletionWriter, include_usage=asked.include_usage, logprobs=logprobs, echo=asked.echo)
    return Parsed(asked.generation(), writer, len(unknown_fields(CompletionRequest, fields)))


COMPLETIONS = Rendering(read, error_response)
