"""A process that speaks the engine's side of the wire protocol without a model, to try the front end quickly.

The model path of the Start message selects the script, as words joined by commas:

- ``slow=S``: seconds between two tokens (default 0.002); ``load=S``: seconds before Ready;
- ``fatal``: refuse to start with a Fatal message; ``crash``: exit with status 3 before Ready;
- ``crash_after=N``: exit hard once N tokens have been produced in all;
- ``rows=N``: report max_rows N; ``context=N``: report that context length; ``deaf``: ignore Stop and SIGTERM.

A request is answered by its prompt's tokens repeated from the start until max_tokens; ids from 900 on in the prompt are
commands: 900 fails the request with an engine error, 901 ends it with ``stop`` there, 902 refuses it as invalid, 903
never answers, 904 kills the process, 905 sends a frame of nonsense.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket

from kvarn import wire
from kvarn.types import Delta, ErrorKind, Finish, ModelInfo, PrefixReport, Request, TokenLogprob


class Script:
    def __init__(self, path: str) -> None:
        words = path.rsplit("/", 1)[-1].split(",")
        self.words = {word.partition("=")[0]: word.partition("=")[2] for word in words}

    def number(self, word: str, otherwise: float) -> float:
        return float(self.words.get(word) or otherwise)


class Engine:
    def __init__(self, writer: asyncio.StreamWriter, script: Script) -> None:
        self.writer = writer
        self.script = script
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.produced = 0

    def send(self, message: wire.FromEngine) -> None:
        self.writer.write(wire.encode(message))

    async def load(self) -> None:
        self.send(wire.Loading("weights", 0.5))
        if "fatal" in self.script.words:
            self.send(wire.Fatal("config.json: model_type 'nonsense' is not supported"))
            await self.writer.drain()
            os._exit(1)
        if "crash" in self.script.words:
            os._exit(3)
        await asyncio.sleep(self.script.number("load", 0.0))
        self.send(wire.Ready(self.info()))

    def info(self) -> ModelInfo:
        return ModelInfo(
            context_length=int(self.script.number("context", 512)),
            vocab_size=1000,
            lane="slots",
            lane_reason="",
            cache_kinds=["kv"],
            dtype="float32",
            device="cpu",
            blas="none",
            kv_bytes_per_token=64,
            max_rows=int(self.script.number("rows", 8)),
            fingerprint="ab" * 32,
        )

    async def beat(self) -> None:
        while True:
            self.send(wire.Beat(step=self.produced, running=len(self.tasks), waiting=0, kv_bytes=0))
            await asyncio.sleep(0.05)

    async def answer(self, request: Request) -> None:
        try:
            await self.produce(request)
        finally:
            self.tasks.pop(request.id, None)

    async def produce(self, request: Request) -> None:
        params = request.params
        count = 0
        while True:
            await asyncio.sleep(self.script.number("slow", 0.002))
            token = request.tokens[count % len(request.tokens)]
            if token >= 900 and self.command(token, request):
                return
            if token == 903:
                await asyncio.sleep(3600)
            count += 1
            self.produced += 1
            if self.produced == int(self.script.number("crash_after", -1)):
                os.kill(os.getpid(), signal.SIGKILL)
            last = count == params.max_tokens
            logprobs = None
            if params.logprobs is not None:
                top = [(token, -0.5), (0, -1.5), (1, -2.5), (2, -3.5), (3, float("-inf"))][: params.logprobs]
                logprobs = [TokenLogprob(token, -0.5, top)]
            finish = Finish.LENGTH if last else None
            self.send(
                wire.Deltas(
                    [Delta(request.id, [token], finish, logprobs, PrefixReport(min(3, len(request.tokens) - 1)))]
                )
            )
            if last:
                return

    def command(self, token: int, request: Request) -> bool:
        match token:
            case 900:
                self.send(wire.Failed(request.id, ErrorKind.ENGINE, "the forward produced non-finite logits"))
            case 901:
                self.send(wire.Deltas([Delta(request.id, [], Finish.STOP)]))
            case 902:
                self.send(wire.Failed(request.id, ErrorKind.INVALID, "can never fit in memory"))
            case 904:
                os.kill(os.getpid(), signal.SIGKILL)
            case 905:
                self.writer.write(wire.HEADER.pack(3) + b"\xc1\xc1\xc1")
            case _:
                return False
        return True

    async def serve(self, reader: asyncio.StreamReader) -> None:
        tasks = [asyncio.create_task(self.load()), asyncio.create_task(self.beat())]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                match await receive(reader):
                    case wire.Submit(request):
                        self.tasks[request.id] = asyncio.create_task(self.answer(request))
                    case wire.Cancel(request_id):
                        if task := self.tasks.get(request_id):
                            task.cancel()
                            self.send(wire.Deltas([Delta(request_id, [], Finish.CANCELLED)]))
                    case wire.Stop() if "deaf" not in self.script.words:
                        return
        del tasks
        if "deaf" in self.script.words:
            await asyncio.sleep(3600)


async def receive(reader: asyncio.StreamReader) -> wire.ToEngine:
    header = await reader.readexactly(wire.HEADER.size)
    return wire.decode_to_engine(await reader.readexactly(wire.frame_length(header)))


async def run(fd: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    start = await receive(reader)
    assert isinstance(start, wire.Start)
    script = Script(start.model_path)
    if "deaf" in script.words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    await Engine(writer, script).serve(reader)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    asyncio.run(run(parser.parse_args().fd))
    os._exit(0)
