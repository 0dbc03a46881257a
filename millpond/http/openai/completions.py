"""POST /v1/completions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import msgspec

from millpond.http.events import Delta, TextDelta
from millpond.http.openai.choices import ChoicesWriter, Collected, Json
from millpond.http.openai.errors import error_response
from millpond.http.openai.logprobs import CompletionLogprobs, GrowingCompletionLogprobs, NoLogprobs
from millpond.http.openai.schemas import CompletionRequest, parse, unknown_fields
from millpond.http.rendering import Answering, Parsed, Rendering


class CompletionWriter(ChoicesWriter):
    """Text completions in the API's shape; with echo the prompt comes before the answer."""

    def __init__(self, answering: Answering, *, include_usage: bool, logprobs: bool, echo: bool) -> None:
        self._answering = answering
        self._echoed = echo
        self._logprobs = logprobs
        self._running: defaultdict[int, CompletionLogprobs] = defaultdict(
            partial(CompletionLogprobs, answering.tokenizer)
        )
        """Of each choice of a stream."""
        head: Json = {
            "id": f"cmpl-{answering.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": answering.model,
            "system_fingerprint": f"millpond-{answering.fingerprint[:12]}",
        }
        super().__init__(head, head, include_usage)

    def opening(self, choice: int) -> Json | None:
        return self.delta(TextDelta(choice, self._echo(choice), [], None)) if self._echoed else None

    def delta(self, delta: Delta) -> Json:
        logprobs = self._running[delta.choice].render(delta.logprobs) if self._logprobs else None
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def collected(self) -> Collected:
        return Collected(GrowingCompletionLogprobs(self._answering.tokenizer) if self._logprobs else NoLogprobs())

    def whole(self, index: int, choice: Collected) -> Json:
        return {
            "index": index,
            "text": self._echo(index) + "".join(choice.texts),
            "logprobs": msgspec.Raw(choice.logprobs.json()),
            "finish_reason": choice.finish,
        }

    def _echo(self, choice: int) -> str:
        return self._answering.echoes[choice // self._answering.n]


def read(fields: Mapping[str, object]) -> Parsed:
    """Raises ApiError."""
    asked = parse(CompletionRequest, fields)
    logprobs = asked.logprobs is not None
    writer = partial(CompletionWriter, include_usage=asked.include_usage, logprobs=logprobs, echo=asked.echo)
    return Parsed(asked.generation(), writer, len(unknown_fields(CompletionRequest, fields)))


COMPLETIONS = Rendering(read, error_response)
