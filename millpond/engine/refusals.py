"""What the engine says to requests that it does not, or cannot, answer."""

from __future__ import annotations

from collections.abc import Sequence

from millpond.model.load import LoadedModel
from millpond.types import ErrorKind, Request
from millpond.wire import Failed

NO_MEMORY = ("Unable to allocate", "bad_alloc", "out of memory", "Insufficient Memory")
"""How MLX says on its back ends that there is no more memory."""


def impossible(request: Request, model: LoadedModel) -> str:
    """Why this model can never answer a request; empty when it can."""
    most = request.params.max_tokens
    if not request.tokens or most < 1:
        return "a request needs at least one prompt token and max_tokens of at least 1"
    if len(request.tokens) + most > model.context_length:
        return f"prompt and max_tokens exceed the context of {model.context_length} tokens"
    return unknown(request.tokens, model)


def unknown(tokens: Sequence[int], model: LoadedModel) -> str:
    """Says that a prompt has tokens that this model has not; empty when it has none such."""
    if all(0 <= token < model.vocab_size for token in tokens):
        return ""
    return f"prompt has a token id outside 0..{model.vocab_size - 1}"


def failure(name: str, error: Exception) -> Failed:
    """What the client is told of an exception."""
    if isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY):
        return Failed(name, ErrorKind.UNAVAILABLE, "the machine is short of memory; try again later")
    return Failed(name, ErrorKind.ENGINE, f"the engine could not go on with this request: {error}")
