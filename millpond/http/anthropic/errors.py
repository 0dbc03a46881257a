"""The shape in which Anthropic's API says what is wrong: ``{"type": "error", "error": {"type", "message"}}``."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from millpond.http.errors import ApiError, PromptTooLong

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_STATUSES = {503: 529}
"""Where its clients know another one."""


def error_type(error: ApiError) -> str:
    """The word for a kind of error."""
    return _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")


def error_value(error: ApiError) -> dict[str, object]:
    message = error.message
    if isinstance(error, PromptTooLong):  # in the words that Claude Code looks for, to make the prompt shorter
        message = f"prompt is too long: {error.least_tokens} tokens > {error.most_tokens} maximum"
    return {"type": "error", "error": {"type": error_type(error), "message": message}}


def error_response(error: ApiError) -> Response:
    status = _STATUSES.get(error.status, error.status)
    return Response(msgspec.json.encode(error_value(error)), status, error.headers, "application/json")
