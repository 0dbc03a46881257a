"""The ASGI application: routes, error handlers, and the layers around them: access log, CORS, gate."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route

from kvarn.client import EngineClient
from kvarn.config import ServeConfig
from kvarn.http.access import AccessLayer
from kvarn.http.cache import explain
from kvarn.http.chat import chat
from kvarn.http.completions import completions
from kvarn.http.errors import ApiError, on_api_error, on_http_error, shown
from kvarn.http.gate import Gate
from kvarn.http.keys import Keys
from kvarn.http.metrics import metrics
from kvarn.http.models import get_model, list_models
from kvarn.http.openapi import openapi
from kvarn.http.probes import health, livez, readyz
from kvarn.http.schemas import NO_DEFAULTS, SamplingDefaults
from kvarn.http.service import ModelNames, Service
from kvarn.text.tokenizer import Tokenizer

ROUTES = [
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/cache/explain", explain, methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{model:path}", get_model),
    Route("/health", health),
    Route("/livez", livez),
    Route("/readyz", readyz),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]


def create_app(
    config: ServeConfig,
    names: ModelNames,
    load_tokenizer: Callable[[], Tokenizer],
    client: EngineClient,
    keys: Keys,
    hosts: Collection[str],
    sampling: SamplingDefaults = NO_DEFAULTS,
) -> tuple[Starlette, Service]:
    """The application and its state. The caller starts ``client`` and awaits ``Service.load``."""
    service = Service(config, names, load_tokenizer, client, sampling)
    gate = Middleware(
        Gate,
        keys=keys,
        hosts=hosts,
        origins=config.cors_origins,
        most_bytes=int(config.max_body),
        apart=config.share_prefixes == "off",
    )
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(AccessLayer), *_cors(config.cors_origins), gate],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app, service


class Cors(CORSMiddleware):
    """Starlette's, with refusals in our error shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = f"origin: {shown(request_headers['origin'])} may not do this; --cors-origins says who may call"
        return ApiError(403, message, param="origin", code="origin_not_allowed").response()


def _cors(origins: Collection[str]) -> list[Middleware]:
    """Outside of the gate: a browser asks what is allowed without showing a key.

    Any header may come, as official clients have many of their own; none is a credential that a browser adds by itself.
    """
    if not origins:
        return []
    exposed = ("x-request-id", "x-kvarn-prefix-cache", "retry-after")
    return [
        Middleware(
            Cors,
            allow_origins=list(origins),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=exposed,
        )
    ]
