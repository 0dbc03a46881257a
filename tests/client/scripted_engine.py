"""A process that speaks the engine's side of the wire protocol without a model, to try the front end quickly.

The model path of the Start message selects the script, as words joined by commas:

- ``slow=S``: seconds between two tokens (default 0.002); ``load=S``: seconds before Ready;
- ``fatal``: refuse to start with a Fatal message; ``crash``: exit with status 3 before Ready;
- ``crash_after=N``: exit hard once N tokens have been produced in all;
- ``queue=S``: tell that a prompt is begun S seconds after its arrival (without the word: never told);
- ``prefill=S``: seconds between that and the first token; ``pause=N:S``: S seconds more before the N-th token;
- ``wait=S``: beats predict a wait of S seconds as long as anything runs; ``mute``: beats say that nothing runs;
- ``figures``: beats tell made-up numbers of the engine's own work, all of them so many times as requests have ended;
- ``rows=N``: report max_batch N; ``context=N``: report that context length; ``deaf``: ignore Stop and SIGTERM;
- ``spec=MODES``: guess ahead, in modes joined by + (none: the model cannot); without the word nothing is guessed;
- ``embeds=N``: makes vectors of N numbers, which are the prompt's tokens over and over; else none;
- ``tell``: the device is what Start says of guessing, as JSON;
- ``written``: what is answered stands in the file that SCRIPTED_ANSWERS names, a list of lists of token ids, one for
  each request in turn, ``step=N`` tokens at a time; each ends with ``stop``, unless max_tokens come first.

Where it guesses, a step confirms as many tokens as are asked for (by default 4), all of them right unless the request
has a prediction: then the guesses are the tokens of the prediction at the same places.

A request is answered by its prompt's tokens repeated from the start until max_tokens; ids from 900 on in the prompt are
commands: 900 fails the request with an engine error, 901 ends it with ``stop`` there, 902 refuses it as invalid, 903
never answers, 904 kills the process, 905 sends a frame of nonsense, 906 stops the process as SIGSTOP does, 908 refuses
it as invalid with what the request says of guessing, and its salt if it has one, as JSON, 910 with how it is sampled. A
prompt that begins with 907 is never begun, nor explained; one with 909 in it is explained by a number that its salt
alone decides. 911 and 912 are 900 and 902 with a message full of paths.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import zlib
from pathlib import Path

import msgspec

from millpond import wire
from millpond.prefix.disk.stats import SsdStats
from millpond.types import (
    Delta,
    Distribution,
    EngineCounters,
    ErrorKind,
    Finish,
    ModelInfo,
    PrefixCounters,
    PrefixLoad,
    PrefixReport,
    Request,
    SpecCounters,
    SpecSettings,
    TokenLogprob,
    Verdict,
)

COMMANDS = 900
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Token ids from here on are commands."""
PATHS = (
    "[Errno 2] No such file or directory: 'secret-place/model-x/config.json' and \"/secret place/it's/x\" in "
    '/secret/model, secret/model.gguf ~/secret (see /secret) file:///secret/x\n  File "/secret/y.py", line 3'
)
DEPTH = 4
"""Tokens guessed ahead in a step unless told otherwise."""


class Script:
    def __init__(self, path: str) -> None:
        words = path.rsplit("/", 1)[-1].split(",")
        self.words = {word.partition("=")[0]: word.partition("=")[2] for word in words}

    def number(self, word: str, otherwise: float) -> float:
        return float(self.words.get(word) or otherwise)


class Engine:
    def __init__(self, writer: asyncio.StreamWriter, script: Script, spec: SpecSettings) -> None:
        self.writer = writer
        self.script = script
        self.spec = spec
        self.modes = [mode for mode in script.words.get("spec", "none").split("+") if mode != "none"]
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.produced = 0
        self.ended = 0
        self.asked = 0

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
            device=msgspec.json.encode(self.spec).decode() if "tell" in self.script.words else "cpu",
            blas="none",
            kv_bytes_per_token=64,
            max_batch=int(self.script.number("rows", 8)),
            kv_limit_bytes=4096,
            fingerprint="ab" * 32,
            speculation=self.modes,
            embedding_size=int(self.script.number("embeds", 0)),
            embedding_reason="" if "embeds" in self.script.words else "it is a script",
            speculation_reason="" if self.modes else "its caches cannot take a guess back",
        )

    async def beat(self) -> None:
        while True:
            running = 0 if "mute" in self.script.words else len(self.tasks)
            wait = self.script.number("wait", 0.0) if self.tasks else 0.0
            beat = wire.Beat(step=self.produced, running=running, waiting=0, kv_bytes=0, wait_seconds=wait)
            self.send(figures(beat, self.ended) if "figures" in self.script.words else beat)
            await asyncio.sleep(0.05)

    async def answer(self, request: Request) -> None:
        try:
            await self.produce(request)
        finally:
            self.tasks.pop(request.id, None)
            self.ended += 1

    async def produce(self, request: Request) -> None:
        params = request.params
        count = 0
        await self.begin(request)
        if request.pooled:
            await asyncio.sleep(self.script.number("slow", 0.002))
            command = next((token for token in request.tokens if token >= COMMANDS), None)
            if command is None:
                size = self.info().embedding_size
                numbers = (request.tokens[:-1] * size)[:size]
                vector = struct.pack(f"<{size}f", *numbers)
                self.send(wire.Deltas([Delta(request.id, [], Finish.STOP, embedding=vector)]))
                return
        if params.prompt_logprobs is not None and len(request.tokens) > 1:
            scored = [likeliest(token, params.prompt_logprobs) for token in request.tokens[1:]]
            scored = [msgspec.structs.replace(one, rank=1) for one in scored]
            self.send(wire.Deltas([Delta(request.id, [], prompt_logprobs=scored[:5])]))
            self.send(wire.Deltas([Delta(request.id, [], prompt_logprobs=scored[5:])]))
        if "written" in self.script.words:
            await self.recite(request)
            return
        pause_at, _, pause = self.script.words.get("pause", "0:0").partition(":")
        while True:
            await asyncio.sleep(self.script.number("slow", 0.002) + (float(pause) if count + 1 == int(pause_at) else 0))
            token = request.tokens[count % len(request.tokens)]
            if token >= COMMANDS and self.command(token, request):
                return
            if token == 903:
                await asyncio.sleep(3600)
            tokens, verdict = self.burst(request, count)
            count += len(tokens)
            before, self.produced = self.produced, self.produced + len(tokens)
            if before < int(self.script.number("crash_after", -1)) <= self.produced:
                os.kill(os.getpid(), signal.SIGKILL)
            last = count == params.max_tokens
            logprobs = None
            if params.logprobs is not None:
                logprobs = [likeliest(token, params.logprobs) for token in tokens]
            finish = Finish.LENGTH if last else None
            report = PrefixReport(min(3, len(request.tokens) - 1))
            self.send(wire.Deltas([Delta(request.id, tokens, finish, logprobs, report, verdict)]))
            if last:
                return

    async def recite(self, request: Request) -> None:
        answers = json.loads(Path(os.environ["SCRIPTED_ANSWERS"]).read_text())
        answer = answers[self.asked % len(answers)]
        self.asked += 1
        if "result" in self.script.words:  # a conversation has the last answer as soon as a tool has been heard
            heard = int(self.script.number("result", 0)) in request.tokens
            answer = answers[-1 if heard else 0]
        most, step = request.params.max_tokens, int(self.script.number("step", 1))
        tokens = answer[:most]
        report = PrefixReport(min(3, len(request.tokens) - 1))
        for start in range(0, len(tokens), step):
            self.send(wire.Deltas([Delta(request.id, tokens[start : start + step], None, None, report)]))
            await asyncio.sleep(0)
        finish = Finish.STOP if len(answer) < most else Finish.LENGTH
        self.send(wire.Deltas([Delta(request.id, [], finish, None, report)]))

    def depth(self, request: Request) -> int:
        """How many tokens to guess ahead for a request."""
        speculation = request.speculation or self.spec.default
        return (speculation.tokens or DEPTH) if speculation.mode.among(self.modes) in self.modes else 0

    def burst(self, request: Request, count: int) -> tuple[list[int], Verdict | None]:
        """The tokens of one step behind ``count`` others, and what became of its guesses."""
        depth = self.depth(request)
        coming = [request.tokens[place % len(request.tokens)] for place in range(count, count + depth + 1)]
        guesses = request.prediction[count : count + depth] if request.prediction else coming[:depth]
        right = next((n for n, guess in enumerate(guesses) if guess != coming[n]), len(guesses))
        tokens = coming[: min(right + 1, request.params.max_tokens - count)]
        ready = next((n for n, token in enumerate(tokens) if n and token >= COMMANDS), len(tokens))
        return tokens[:ready], Verdict(min(right, ready), len(guesses) - right) if guesses else None

    async def begin(self, request: Request) -> None:
        if request.tokens[0] == 907:
            await asyncio.sleep(3600)
        if "queue" in self.script.words:
            await asyncio.sleep(self.script.number("queue", 0.0))
            self.send(wire.Deltas([Delta(request.id, [], prefix=PrefixReport())]))
        await asyncio.sleep(self.script.number("prefill", 0.0))

    def command(self, token: int, request: Request) -> bool:
        match token:
            case 900:
                self.send(wire.Failed(request.id, ErrorKind.ENGINE, "the forward produced non-finite logits"))
            case 901:
                # Where it guesses, it has guessed the end.
                verdict = Verdict(1, 0) if self.depth(request) else None
                self.send(wire.Deltas([Delta(request.id, [], Finish.STOP, verdict=verdict)]))
            case 902:
                self.send(wire.Failed(request.id, ErrorKind.INVALID, "can never fit in memory"))
            case 911 | 912:
                kind = ErrorKind.ENGINE if token == 911 else ErrorKind.INVALID
                self.send(wire.Failed(request.id, kind, PATHS))
            case 904:
                os.kill(os.getpid(), signal.SIGKILL)
            case 905:
                self.writer.write(wire.HEADER.pack(3) + b"\xc1\xc1\xc1")
            case 906:
                os.kill(os.getpid(), signal.SIGSTOP)
            case 908:
                begin, length = request.prediction[:16], len(request.prediction)  # messages are cut short
                told = {"speculation": request.speculation, "prediction": begin, "predicted": length}
                told |= {"salt": short(request.cache_salt)} if request.cache_salt else {}
                self.send(wire.Failed(request.id, ErrorKind.INVALID, msgspec.json.encode(told).decode()))
            case 910:
                told = {name: getattr(request.params, name) for name in SAMPLED}
                self.send(wire.Failed(request.id, ErrorKind.INVALID, msgspec.json.encode(told).decode()))
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
                    case wire.Explain(_, [907, *_], _):
                        pass
                    case wire.Explain(name, tokens, salt):
                        known = zlib.crc32(short(salt).encode()) if 909 in tokens else 0
                        self.send(wire.Explained(name, PrefixReport(min(3, len(tokens) - 1), known=known)))
                    case wire.Stop() if "deaf" not in self.script.words:
                        return
        del tasks
        if "deaf" in self.script.words:
            await asyncio.sleep(3600)


def short(salt: str) -> str:
    """A salt, or what stands for one that is too long for a message."""
    return salt if len(salt) < 100 else hashlib.sha256(salt.encode()).hexdigest()[:16]


def likeliest(token: int, count: int) -> TokenLogprob:
    top = [(token, -0.5), (0, -1.5), (1, -2.5), (2, -3.5), (3, float("-inf"))][:count]
    return TokenLogprob(token, -0.5, top)


def figures(beat: wire.Beat, n: int) -> wire.Beat:
    """Numbers that tell each other apart, n times."""
    return msgspec.structs.replace(
        beat,
        waiting=3 * n,
        kv_bytes=64 * n,
        wait_seconds=0.5 * n,
        counters=EngineCounters(
            prefill_tokens=7 * n,
            drawn_tokens=11 * n,
            preemptions=2 * n,
            failed_steps=3 * n,
            step_seconds=Distribution((0.01, 0.1), (5 * n, 3 * n, n), 0.75 * n),
            step_rows=Distribution((1, 8), (4 * n, 2 * n, 0), 20 * n),
            step_tokens=Distribution((16,), (6 * n, n), 130 * n),
            spec=SpecCounters(
                steps=4 * n,
                rows=6 * n,
                proposed=17 * n,
                accepted=12 * n,
                bonus=3 * n,
                drawn=18 * n,
                fallbacks=5 * n,
                proposed_at=(6 * n, 6 * n, 5 * n),
                accepted_at=(5 * n, 4 * n, 3 * n),
                depth=2.5 * n,
            ),
        ),
        prefix=PrefixLoad(
            ram_bytes=1000 * n,
            ram_blocks=10 * n,
            ram_limit=4096,
            saving_records=12 * n,
            saving_bytes=640 * n,
            counters=PrefixCounters(
                hits=9 * n,
                disk_hits=4 * n,
                misses=5 * n,
                memory_tokens=600 * n,
                disk_tokens=400 * n,
                computed_tokens=900 * n,
                evicted=13 * n,
                unsaved=6 * n,
                checked=8 * n,
                mismatches=n,
            ),
            ssd={name: number * n for number, name in enumerate(SsdStats.__struct_fields__, 1)},
        ),
    )


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
    await Engine(writer, script, start.spec).serve(reader)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    asyncio.run(run(parser.parse_args().fd))
    os._exit(0)
