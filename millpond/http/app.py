"""The ASGI application: routes, error handlers, and the layers around them: access log, CORS, gate."""

from __future__ import annotations

from collections.abc import Collection

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millpond.http.access import AccessLayer
from millpond.http.anthropic.messages import MESSAGES, count_tokens, hello
from millpond.http.cache import explain
from millpond.http.context import context_of
from millpond.http.errors import ApiError, shown
from millpond.http.front_end import FrontEnd
from millpond.http.gate import Gate
from millpond.http.metrics import metrics
from millpond.http.models import get_model, list_models
from millpond.http.openai.chat import CHAT
from millpond.http.openai.completions import COMPLETIONS
from millpond.http.openai.embeddings import embeddings
from millpond.http.openai.errors import error_response
from millpond.http.openapi import openapi
from millpond.http.probes import health, livez, readyz
from millpond.http.respond import endpoint
from millpond.http.responses import routes as responses
from millpond.http.tokens import detokenize, tokenize, tokenizer_info

RENDERINGS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/messages": MESSAGES,
}
"""APIs that generate, by their paths, which need nothing but the request."""
COUNTING = "/v1/messages/count_tokens"
ASKED = {**RENDERINGS, COUNTING: MESSAGES}
"""Whose refusals an API's clients read, by path."""
ROUTES = [
    *(Route(path, endpoint(rendering), methods=["POST"]) for path, rendering in RENDERINGS.items()),
    Route(COUNTING, count_tokens, methods=["POST"]),
    Route("/v1/responses", responses.create, methods=["POST"]),
    Route("/v1/responses/input_tokens", responses.input_tokens, methods=["POST"]),
    Route("/v1/responses/resp_{response}", responses.retrieve),
    Route("/v1/responses/resp_{response}", responses.delete, methods=["DELETE"]),
    Route("/v1/responses/resp_{response}/input_items", responses.input_items),
    Route("/v1/responses/resp_{response}/cancel", responses.cancel, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/api/hello", hello),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokenizer_info),
    Route("/v1/cache/explain", explain, methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", get_model),
    Route("/health", health),
    Route("/livez", livez),
    Route("/readyz", readyz),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]


def create_app(front: FrontEnd, hosts: Collection[str]) -> Starlette:
    """The application; ``hosts`` are those served. The caller starts the engine and awaits ``FrontEnd.load``."""
    config = front.config
    gate = Middleware(
        Gate,
        keys=front.keys,
        hosts=hosts,
        origins=config.cors_origins,
        most_bytes=int(config.max_body),
        apart=config.share_prefixes == "off",
    )
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(AccessLayer, renderings=ASKED),
            *_cors(config.cors_origins),
            gate,
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error},
    )
    app.router.redirect_slashes = False
    app.state.front_end = front
    return app


class Cors(CORSMiddleware):
    """Starlette's, with refusals in our error shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = f"origin: {shown(request_headers['origin'])} may not do this; --cors-origins says who may call"
        return error_response(ApiError(403, message, param="origin", code="origin_not_allowed"))


def _cors(origins: Collection[str]) -> list[Middleware]:
    """Outside of the gate: a browser asks what is allowed without showing a key.

    Any header may come, as official clients have many of their own; none is a credential that a browser adds by itself.
    """
    if not origins:
        return []
    exposed = ("x-request-id", "x-millpond-prefix-cache", "x-millpond-ignored", "retry-after")
    return [
        Middleware(
            Cors,
            allow_origins=list(origins),
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=exposed,
        )
    ]


async def _on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for ApiError."""
    assert isinstance(error, ApiError)
    return context_of(request.scope).refuse(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for its own errors: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    return await _on_api_error(request, _from_starlette(request, error))


def _from_starlette(request: Request, error: HTTPException) -> ApiError:
    path = shown(request.scope["path"])
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {path}", code="not_found")
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        message = f"{shown(request.method)} is not allowed at {path}; allowed is {allow}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
