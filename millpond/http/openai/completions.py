"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from millpond.http.events import Delta
from millpond.http.openai.choices import Choice, ChoicesWriter, Json, described
from millpond.http.openai.errors import error_response
from millpond.http.openai.logprobs import CompletionLogprobs, PromptLogprobs
from millpond.http.openai.schemas import CompletionRequest, parse, unknown_fields
from millpond.http.rendering import Answering, Parsed, Rendering


class CompletionWriter(ChoicesWriter):
    """Text completions in the API's shape; with echo the prompt comes before the answer."""

    def __init__(self, answering: Answering, asked: CompletionRequest) -> None:
        self._answering = answering
        self._asked = asked
        head: Json = {"id": f"cmpl-{answering.id}", "object": "text_completion", **described(answering)}
        super().__init__(head, head, include_usage=asked.include_usage, silent=asked.max_tokens == 0)

    def choice(self) -> Choice:
        tokenizer, asked = self._answering.tokenizer, self._asked
        render = CompletionLogprobs(tokenizer, asked.logprobs).render if asked.logprobs is not None else None
        prompt = PromptLogprobs(tokenizer, asked.prompt_logprobs) if asked.prompt_logprobs is not None else None
        return Choice(render, prompt, echoed=asked.echo)

    def opening(self, index: int, choice: Choice) -> Json | None:
        if not self._asked.echo:
            return None
        return {"index": index, "text": self._echo(index), "logprobs": choice.logprobs, "finish_reason": None}

    def deltas(self, delta: Delta, choice: Choice) -> Iterator[Json]:
        logprobs = choice.render(delta.logprobs) if choice.render is not None else None
        yield {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice) -> Json:
        text = self._echo(index) + choice.text
        shown = {"index": index, "text": text, "logprobs": choice.logprobs, "finish_reason": choice.finish}
        scored = choice.prompt_logprobs
        return shown if scored is None else {**shown, "prompt_logprobs": scored}

    def _echo(self, choice: int) -> str:
        return self._answering.echoes[choice // self._answering.n]


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(CompletionRequest, fields)
    writer = partial(CompletionWriter, asked=asked.without_content())
    return Parsed(asked.generation(), writer, len(unknown_fields(CompletionRequest, fields)))


COMPLETIONS = Rendering(read, error_response)
