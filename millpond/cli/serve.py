"""``millpond serve MODEL``: the front end process from its command line to its exit code.

The engine is started before anything slow is imported here; tokenizer, HTTP server and engine then load side by side,
and /livez answers meanwhile. The first SIGINT or SIGTERM drains and stops with exit code 0, the second ends everything
at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from millpond.cli.agents import NO_KEY, lines
from millpond.cli.certificate import BadCertificate, Certificate
from millpond.cli.given import StartError, find_draft, find_model, read_certificate, read_keys
from millpond.cli.group import group_plan, keep, layout_of
from millpond.cli.interpreter import settle
from millpond.cli.listen import allow_files, bind, loopback, url_of
from millpond.client import EngineClient, EngineUnavailable
from millpond.client.start import engine_client, start_message
from millpond.config import ConfigError, ServeConfig, add_flags, read_config
from millpond.http.keys import BadKeys, Keys
from millpond.http.names import ModelNames
from millpond.hub.cache import problem as cache_problem
from millpond.launch.keeper import input_ended
from millpond.observe.log import configure, fields, last_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starlette.applications import Starlette
    from uvicorn import Server

    from millpond.http.front_end import FrontEnd

log = logging.getLogger("millpond.serve")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE_SECONDS = 2
"""How long connections may take to close once nothing is running."""


SPARE_FILES = 256
"""Open files beyond the connections."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP, with the OpenAI API. Every flag can also be given as MILLPOND_<FLAG>.",
    )
    parser.add_argument("model", metavar="MODEL", help="hub name, local folder, GGUF file, or demo")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit code."""
    begun = time.monotonic()
    # Until it is caught, it waits: by default it would end the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        config = read_config({name: getattr(args, name) for name in ServeConfig.model_fields}, file=args.config)
        configure(config.log_level, config.log_format)
        layout = layout_of(config)
        if layout is not None and layout.launch is not None and layout.launch.rank:
            return keep(layout, config, args.model)
        keys = read_keys(config)
        certificate = read_certificate(config)
        listeners = bind(config)
        allow_files(config.max_connections + SPARE_FILES)
        if wrong := cache_problem():
            log.warning("this start finds out everything anew, and keeps nothing of it", extra=fields(reason=wrong))
        model = find_model(args.model)
        names = ModelNames.of(config.model_name, args.model, model.name, model.path)
        start = start_message(config, str(model.path), find_draft(config), names.served)
        group = group_plan(layout, config, args.model, model.path) if layout is not None else None
        client = engine_client(config, start, group)
        launched = layout is not None and layout.launch is not None
        serving = ServeRun(config, keys, names, model.path, client, certificate, begun, launched=launched)
        asyncio.run(serving.serve(listeners))
    except (ConfigError, StartError) as error:
        print(f"millpond serve: {error}", file=sys.stderr)
        return 1
    return 0


class ServeRun:
    """One run of the front end."""

    def __init__(
        self,
        config: ServeConfig,
        keys: Keys,
        names: ModelNames,
        path: Path,
        client: EngineClient,
        certificate: Certificate | None,
        begun: float,
        *,
        launched: bool = False,
    ) -> None:
        """``path`` is the model's folder, ``begun`` when the command was (monotonic). ``launched``: by mlx.launch or
        mpirun."""
        self._config = config
        self._keys = keys
        self._names = names
        self._path = path
        self._client = client
        """Of the engine that is started before there is a front end, which then owns it."""
        self._front: FrontEnd | None = None
        self._certificate = certificate
        self._begun = begun
        self._launched = launched
        self._stop = asyncio.Event()
        self._signalled = False

    async def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Serve until a stop signal. Raises StartError when the engine or the tokenizer cannot be had."""
        self._catch_signals()
        try:
            await self._client.start()
        except OSError as error:
            raise StartError(f"the engine process cannot be started: {error.strerror}") from error
        try:
            await self._serve_http(listeners)
        finally:
            await (self._front or self._client).stop()

    async def _serve_http(self, listeners: Sequence[socket.socket]) -> None:
        front = self._front = self._front_end()
        app = self._application(front, listeners)
        server = _server(app, self._config, self._certificate)
        serving = asyncio.create_task(server.serve(sockets=list(listeners)), name="http")
        url = url_of(listeners, self._config.host, "https" if self._certificate else "http")
        log.info("listening", extra=fields(url=url, model=self._names.served))
        loading = asyncio.create_task(self._load(front, url), name="load")
        try:
            await self._until_stopped(front, loading, serving)
            log.info("stopping", extra=fields(running=front.held, drain_seconds=self._config.drain_seconds))
            await front.drain(self._config.drain_seconds)
        finally:
            loading.cancel()
            # The engine goes first: whatever is still open gets its error while there is a connection to send it on.
            await front.stop()
            server.should_exit = True
            await asyncio.wait({serving, loading})
            front.close()
        log.info("stopped")

    async def _until_stopped(self, front: FrontEnd, loading: asyncio.Task[None], serving: asyncio.Task[None]) -> None:
        """Wait for the stop signal. Raises StartError when the engine or the tokenizer is lost for good."""
        stop = asyncio.create_task(self._asked_to_stop())
        lost = asyncio.create_task(front.lost())
        waiting: set[asyncio.Task[None] | asyncio.Task[str]] = {stop, lost, loading, serving}
        try:
            while not stop.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if loading in done:
                    loading.result()
                if lost in done:
                    raise StartError(lost.result())
                if serving in done:
                    serving.result()
                    raise StartError("the HTTP server ended by itself")
        finally:
            stop.cancel()
            lost.cancel()

    async def _asked_to_stop(self) -> None:
        stop = asyncio.create_task(self._stop.wait())
        ended = asyncio.create_task(input_ended()) if self._launched else None
        try:
            await asyncio.wait({stop, ended} if ended else {stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if ended:
                ended.cancel()
        self._stop.set()

    def _front_end(self) -> FrontEnd:
        from millpond.http.front_end import FrontEnd
        from millpond.http.generation_request import NO_DEFAULTS
        from millpond.http.sampling import read_sampling_defaults
        from millpond.http.served_model import ServedModel
        from millpond.text.tokenizer import Tokenizer

        def read_tokenizer() -> Tokenizer:
            tokenizer = Tokenizer.load(self._path, self._config.tool_format)
            settle()
            family = tokenizer.family
            if family.dialect.calls_tools:
                log.info("answers are read", extra=fields(family=family.dialect.name, by=family.how))
                if not family.read:
                    log.warning("the chat template writes calls in another way than they are read; see --tool-format")
            return tokenizer

        config = self._config
        sampling = read_sampling_defaults(self._path) if config.sampling_defaults == "model" else NO_DEFAULTS
        model = ServedModel(self._names, read_tokenizer, self._client, sampling, config.speculation)
        return FrontEnd(config, self._keys, model)

    def _application(self, front: FrontEnd, listeners: Sequence[socket.socket]) -> Starlette:
        from millpond.http.app import create_app
        from millpond.http.gate import served_hosts

        return create_app(front, served_hosts(self._config.allowed_hosts, self._config.host, loopback(listeners)))

    async def _load(self, front: FrontEnd, url: str) -> None:
        from millpond.text.tokenizer import TokenizerError

        try:
            await front.load()
        except TokenizerError as error:
            raise StartError(str(error)) from error
        except EngineUnavailable as error:
            raise StartError(error.whole) from error
        seconds = round(time.monotonic() - self._begun, 2)
        log.info("ready", extra=fields(api=f"{url}/v1", model=self._names.served, seconds=seconds))
        info = self._client.info
        if info is not None and self._config.log_format == "text" and log.isEnabledFor(logging.INFO):
            key = "KEY" if self._keys else NO_KEY
            for name, line in lines(url, self._names.served, info.context_length, key).items():
                print(f"{name}: {line}", flush=True)  # to be pasted: on standard output, for the log is elsewhere

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled:
            log.warning("second signal, ending at once", extra=fields(signal=number.name))
            (self._front or self._client).kill()
            last_words()
            os._exit(128 + number)
        self._signalled = True
        self._stop.set()

    def _reload(self) -> None:
        """SIGHUP: read keys and certificate again. If either cannot be used, both stay as they were."""
        if (
            self._launched
        ):  # over ssh and a terminal, as mlx.launch does it, this is all that tells of the launcher's end
            self._stop.set()
            return
        try:
            context = self._certificate.read() if self._certificate is not None else None
            count = self._keys.reload()
        except (BadCertificate, BadKeys) as error:
            log.error("nothing was read again", extra=fields(reason=error))
            return
        if self._certificate is not None and context is not None:
            self._certificate.use(context)
        log.info("read again", extra=fields(keys=count, certificate=context is not None))


def _server(app: Starlette, config: ServeConfig, certificate: Certificate | None) -> Server:
    """uvicorn without its own signal handling, logging and extras."""
    import uvicorn

    from millpond.http.connection import protocol

    class QuietServer(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    settings = uvicorn.Config(
        app,
        ssl_context_factory=(lambda _config, _default: certificate.context) if certificate is not None else None,
        http=protocol(config.max_connections, config.body_timeout, config.write_timeout),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return QuietServer(settings)
