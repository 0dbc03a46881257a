"""One architecture on one kind of device, served by an engine in this process: alone, beside others, from the prefix
cache, guessed for, packed. Whoever asks is told after every stage, because some of mlx-lm's models end the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest
from engine_driver import Driver, Outcome, assert_right, prefix_cache, request
from gpu_lane import as_on_a_gpu
from mlx.utils import tree_map
from mlx_lm.utils import load_model

from architectures import folders
from architectures.found import NEXT_TURN, Answers, Report
from architectures.judge import Expected, compared, expected
from millpond.model.blocks import BlockFormat
from millpond.model.load import LoadedModel, ModelError, load
from millpond.model.probe import Capabilities, probe
from millpond.model.shard import CannotShard, shard
from millpond.types import GROUP_SIZES, KvPacking, SpecMode, SpecSettings, Speculation

PROMPTS = (5, 70, 200)
PATTERN = 50
REPEATS = 8
"""A last prompt says the same again and again."""
ANSWER = 24
MORE = 20
"""What a user says behind an answer."""
NEXT = 12
"""Tokens of the next answer."""
LATE = {4: 0, 7: 2, 11: 1}
"""By the turn in which they come; the last prompt is there from the beginning."""
MISSES = (5, 11, 17)
"""Places at which a client's prediction is wrong."""
RANKS = 2


class Attempt:
    """The model, mlx-lm's answers, and what is known so far."""

    def __init__(self, name: str, folder: Path, *, gpu: bool, tell: Callable[[Report], None]) -> None:
        self.report = Report(name, gpu, rereads=folders.rereads(name))
        self._folder = folder
        self._tell = tell
        chooser = random.Random(11)
        self._prompts = [[chooser.randrange(folders.VOCAB) for _ in range(length)] for length in PROMPTS]
        self._prompts.append([chooser.randrange(folders.VOCAB) for _ in range(PATTERN)] * REPEATS)
        self._more = [chooser.randrange(folders.VOCAB) for _ in range(MORE)]

    def run(self) -> None:
        """All of it, as far as it goes."""
        try:
            self._begin("build")
            folders.save(self.report.name, self._folder)
            self._begin("mlx-lm")
            self._theirs = _upstream(self._folder)
            self._wanted = [expected(self._theirs, prompt, ANSWER) for prompt in self._prompts]
        except SystemExit:
            self.report.alien = "it needs a package that is not installed"
        except Exception as error:  # noqa: BLE001 - whatever mlx-lm's files raise
            self.report.alien = f"{type(error).__name__}: {error}"
        else:
            self._ours()
        self.report.stage = "done"
        self._tell(self.report)

    def _begin(self, stage: str) -> None:
        self.report.stage = stage
        self._tell(self.report)

    def _ours(self) -> None:
        if self.report.gpu:
            as_on_a_gpu(pytest.MonkeyPatch(), metal=True)
        self._begin("load")
        try:
            self._model = load(self._folder, 0, lambda _done: None)
        except ModelError as error:
            self.report.refused = str(error)
            return
        self._begin("probe")
        found = self._capabilities = probe(self._model)
        self.report.kinds = sorted(set(self._model.kinds))
        self.report.solo, self.report.uncached = found.reason, found.uncached
        self.report.forward_only, self.report.native = found.forward_only, found.native
        self.report.pipelined = found.pipelined
        self._cached()
        for asked, ask in (("late", self._late), ("alone", self._alone), ("guessed", self._guessed)):
            self._ask(asked, ask)
        self._begin("packed")
        self.report.unpacked = self._packed()
        self.report.undivided = _undivided(self._theirs, folders.config_of(self.report.name))

    def _ask(self, asked: str, ask: Callable[[], Answers | None]) -> None:
        self._begin(asked)
        try:
            answers = ask()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is what is found
            answers = Answers(f"{type(error).__name__}: {error}")
        if answers is not None:
            self.report.answers[asked] = answers

    def _served(
        self, driver: Driver, tag: str, which: Sequence[int], **fields: Sequence[Sequence[int]]
    ) -> list[Outcome]:
        """Ask for answers to some of the prompts at once."""
        for number in which:
            own = {name: list(of_each[number]) for name, of_each in fields.items()}
            ask = request(f"{tag}{number}", self._prompts[number], ANSWER, logprobs=0)
            driver.submit(msgspec.structs.replace(ask, **own))
        driver.run()
        return [driver.outcomes[f"{tag}{number}"] for number in which]

    def _cached(self) -> None:
        every = range(len(self._prompts))
        cache = None
        if isinstance(self._model.blocks, BlockFormat) and not self.report.uncached:
            cache = prefix_cache(self._model)
        driver = Driver(self._model, capabilities=self._capabilities, cache=cache)
        self._ask("batched", lambda: compared(self._served(driver, "batched", every), self._wanted))
        if cache is None:
            return

        def hit() -> Answers:
            outcomes = self._served(driver, "hit", every)
            if any(not outcome.prefix or not outcome.prefix.cached for outcome in outcomes):
                return Answers("nothing was restored")
            return compared(outcomes, self._wanted)

        self._ask("hit", hit)
        self._ask(NEXT_TURN, lambda: self._next_turn(driver))

    def _next_turn(self, driver: Driver) -> Answers:
        turns = [[*prompt, *want.tokens, *self._more] for prompt, want in zip(self._prompts, self._wanted, strict=True)]
        for number, prompt in enumerate(turns):
            driver.submit(request(f"next{number}", prompt, NEXT, logprobs=0))
        driver.run()
        outcomes = [driver.outcomes[f"next{number}"] for number in range(len(turns))]
        return compared(outcomes, [expected(self._theirs, prompt, NEXT) for prompt in turns])

    def _late(self) -> Answers:
        driver = Driver(self._model, capabilities=self._capabilities)
        asks = [request(f"late{n}", prompt, ANSWER, logprobs=0) for n, prompt in enumerate(self._prompts)]
        driver.submit(asks[-1])
        driver.run(arrivals={turn: asks[number] for turn, number in LATE.items()})
        return compared([driver.outcomes[ask.id] for ask in asks], self._wanted)

    def _alone(self) -> Answers:
        driver = Driver(self._model, capabilities=self._capabilities, max_batch=1)
        outcomes = [self._served(driver, "alone", [number])[0] for number in range(len(self._prompts))]
        return compared(outcomes, self._wanted)

    def _guessed(self) -> Answers | None:
        if self.report.forward_only:
            return None
        spec = SpecSettings(default=Speculation(mode=SpecMode.NGRAM, tokens=4, adaptive=False))
        driver = Driver(self._model, capabilities=self._capabilities, spec=spec)
        predictions = [_nearly(want) for want in self._wanted]
        outcomes = self._served(driver, "guessed", range(len(predictions)), prediction=predictions)
        self.report.accepted = sum(outcome.accepted for outcome in outcomes)
        self.report.rejected = sum(outcome.rejected for outcome in outcomes)
        return compared(outcomes, self._wanted)

    def _packed(self) -> str:
        said = ""
        for size in sorted(GROUP_SIZES, key=lambda size: abs(size - 64)):
            try:
                model = load(self._folder, 0, lambda _done: None, KvPacking(bits=8, group_size=size))
                found = probe(model)
                return self._packed_right(found.fitted(model), found)
            except ModelError as error:
                said = said or str(error)
                if "does not divide" not in str(error):
                    return str(error)
        return said

    def _packed_right(self, model: LoadedModel, found: Capabilities) -> str:
        driver = Driver(model, capabilities=found)
        outcomes = self._served(driver, "packed", range(len(PROMPTS)))
        for prompt, outcome in zip(self._prompts, outcomes, strict=False):
            if outcome.failure is not None:
                return f"failed: {outcome.failure.message}"
            try:
                assert_right(model, prompt, outcome.tokens)
            except AssertionError as error:
                return f"other answers: {error}"
        return ""


def _upstream(folder: Path) -> nn.Module:
    network, _ = load_model(folder, lazy=False)
    network.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, network.parameters())
    )
    return network


def _nearly(want: Expected) -> list[int]:
    """Its tokens, some of them others."""
    return [(token + (place in MISSES)) % folders.VOCAB for place, token in enumerate(want.tokens)]


class _Ranks:
    """What a network is told of a group when it is divided."""

    def size(self) -> int:
        return RANKS

    def rank(self) -> int:
        return 0


def _undivided(network: nn.Module, config: folders.Config) -> str:
    try:
        shard(network, config, cast(mx.distributed.Group, _Ranks()))
    except CannotShard as error:
        return str(error)
    return ""


def serve(name: str, device: str, folder: str, file: str) -> None:
    """In a process of its own; ``file`` gets the report."""
    Attempt(
        name, Path(folder), gpu=device == "gpu", tell=lambda report: Path(file).write_bytes(msgspec.json.encode(report))
    ).run()
