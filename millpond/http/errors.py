"""Refusals and failures, each with a real HTTP status; every API has its own shape for them.

Messages about a field name it, its value and what is allowed; none contains a file path or a stack trace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from millpond.client import EngineError
from millpond.client.public import public
from millpond.types import ErrorKind

RETRY_AFTER = {"Retry-After": "1"}
IN_VAIN = {"x-should-retry": "false"}
"""For clients that would try again: the same would take as long again, and end in the same way."""
LONGEST_SHOWN = 80
_JSON = json.JSONEncoder(ensure_ascii=False)


class ApiError(Exception):
    """A request that gets an error status. ``param`` is the field at fault, ``code`` a stable word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # Who failed a request need not think of what a message from inside may show.
        self.message = public(message) if status >= 500 else message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class PromptTooLong(ApiError):  # noqa: N818 - reads as the fact it states
    """A prompt that the model's context has no room for."""

    def __init__(self, message: str, param: str, least_tokens: int, most_tokens: int) -> None:
        """``least_tokens``: it has these, if not more."""
        super().__init__(400, message, param=param, code="context_length_exceeded")
        self.least_tokens = least_tokens
        self.most_tokens = most_tokens


def shown(value: object) -> str:
    """A value as it may stand in a message: JSON, short."""
    if isinstance(value, str):
        value = value[: LONGEST_SHOWN + 1]
    text = ""
    try:
        for part in _JSON.iterencode(value):  # no more of it than is shown
            text += part
            if len(text) > LONGEST_SHOWN:
                break
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"


def bad_value(param: str, value: object, allowed: str, *, code: str = "invalid_value") -> ApiError:
    """400 for a value outside of what is allowed."""
    return ApiError(400, f"{param}: must be {allowed}, got {shown(value)}", param=param, code=code)


def missing(param: str, allowed: str) -> ApiError:
    """400 for a required field that is absent."""
    return ApiError(400, f"{param}: is required and must be {allowed}", param=param, code="missing_parameter")


def unsupported(param: str, value: object, allowed: str) -> ApiError:
    """400 for something with a meaning that this server does not implement."""
    message = f"{param}: {shown(value)} is not supported by this server; allowed is {allowed}"
    return ApiError(400, message, param=param, code="unsupported_parameter")


def unavailable(reason: str) -> ApiError:
    """503: try again later."""
    return ApiError(503, reason, code="unavailable", headers=RETRY_AFTER)


def too_many(message: str, code: str, wait_seconds: float) -> ApiError:
    """429: later, when about so much of the work has been done."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, min(60, round(wait_seconds))))})


def from_engine(error: EngineError) -> ApiError:
    """The status for a request that the engine did not answer."""
    match error.kind:
        case ErrorKind.INVALID:
            return ApiError(400, error.message, code=error.kind.value)
        case ErrorKind.UNAVAILABLE:
            return unavailable(error.message)
        case ErrorKind.QUEUE_TIMEOUT:
            return ApiError(504, error.message, code=error.kind.value)
        case ErrorKind.FIRST_TOKEN_TIMEOUT | ErrorKind.TOKEN_TIMEOUT | ErrorKind.REQUEST_TIMEOUT:
            return ApiError(504, error.message, code=error.kind.value, headers=IN_VAIN)
        case ErrorKind.OVERRUN:
            return ApiError(429, error.message, code=error.kind.value)
        case ErrorKind.GRAMMAR:
            return ApiError(500, error.message, code=error.kind.value, headers=IN_VAIN)
        case ErrorKind.ENGINE | ErrorKind.DIED:
            return ApiError(500, error.message, code=error.kind.value)
