"""The ASGI application: routes, error handlers and the access layer around them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from kvarn.client import EngineClient
from kvarn.config import ServeConfig
from kvarn.http.access import AccessLayer
from kvarn.http.cache import explain
from kvarn.http.chat import chat
from kvarn.http.completions import completions
from kvarn.http.errors import ApiError, on_api_error, on_http_error
from kvarn.http.models import get_model, list_models
from kvarn.http.probes import health, livez, readyz
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
]


def create_app(
    config: ServeConfig, names: ModelNames, load_tokenizer: Callable[[], Tokenizer], client: EngineClient
) -> tuple[Starlette, Service]:
    """The application and its state. The caller starts ``client`` and awaits ``Service.load``."""
    service = Service(config, names, load_tokenizer, client)
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(AccessLayer)],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app, service
