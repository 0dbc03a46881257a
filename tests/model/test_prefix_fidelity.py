"""Hit equals miss on real models: from RAM, from the SSD, after a restart and after kill -9, alone and in batches."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from engine_driver import Driver, Outcome, assert_right, disk_cache, request, settle
from test_fidelity import TEXT
from tiny_models import CONFIGS, VOCAB, save
from tokenizers import Tokenizer

from millpond.engine.link import Inbox
from millpond.model.load import LoadedModel
from millpond.model.opened import open_model
from millpond.model.probe import Capabilities
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Opened
from millpond.prefix.disk.tier import SsdTier
from millpond.types import UNPACKED, KvPacking, PrefixReport

ANSWER = 6
INT8 = KvPacking(bits=8)
CHILD = Path(__file__).parents[1] / "support" / "prefix_child.py"


@dataclass
class Subject:
    """A model, and prompts for it; the first one is asked again and again, the others keep it company."""

    model: LoadedModel
    folder: Path
    capabilities: Capabilities
    prompts: list[list[int]]
    right: list[list[int]] = field(default_factory=list)
    """Answers that were compared with the reference, which costs more than they do."""

    def ask(self, both: tuple[PrefixCache, SsdTier, Inbox], batch: int) -> Outcome:
        cache, ssd, inbox = both
        driven = Driver(self.model, capabilities=self.capabilities, cache=cache, ssd=ssd, inbox=inbox, max_batch=8)
        for other in range(1, batch):
            driven.submit(request(f"o{other}", self.prompts[other], ANSWER))
        driven.submit(request("x", self.prompts[0], ANSWER))
        driven.run()
        return driven.outcomes["x"]

    def check(self, folder: Path, batch: int) -> None:
        """All the ways to the same answer."""
        limit = len(self.prompts[0]) - 1
        in_memory, on_disk = PrefixReport(limit, 0, "prompt", limit), PrefixReport(0, limit, "prompt", limit)
        with opened(self.model, folder / "live") as both:
            self.compare(self.ask(both, batch), None)
            self.compare(self.ask(both, batch), in_memory)
            settle(both[0], both[2])
            both[0].fit(0)
            both[0].fit(1 << 30)
            self.compare(self.ask(both, batch), on_disk)
        with opened(self.model, folder / "live") as both:
            self.compare(self.ask(both, batch), on_disk)
        self.leave(folder / "killed", batch)
        with opened(self.model, folder / "killed") as both:
            self.compare(self.ask(both, batch), on_disk)

    def compare(self, outcome: Outcome, report: PrefixReport | None) -> None:
        assert outcome.prefix is not None
        assert outcome.prefix.cached == 0 if report is None else outcome.prefix == report
        if outcome.tokens not in self.right:
            assert_right(self.model, self.prompts[0], outcome.tokens)
            self.right.append(outcome.tokens)

    def leave(self, folder: Path, batch: int) -> None:
        """Let another process answer the prompts, write, and be killed."""
        asked = json.dumps(self.prompts[:batch])
        bits = str(self.model.form.packing.bits)
        command = [sys.executable, str(CHILD), str(self.folder), str(folder), asked, str(ANSWER), bits]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr


@contextmanager
def opened(model: LoadedModel, folder: Path) -> Iterator[tuple[PrefixCache, SsdTier, Inbox]]:
    cache, ssd, inbox = disk_cache(model, folder, limit_bytes=1 << 30)
    first = inbox.get(timeout=30)
    assert isinstance(first, Opened)
    cache.on_event(first)
    yield cache, ssd, inbox
    settle(cache, inbox)
    assert ssd.close(30)


def real(folder: Path, length: int, packing: KvPacking = UNPACKED) -> Subject:
    opened = open_model(folder, packing=packing)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    prompts = [ids[50 : 50 + length], *(ids[number * 301 : number * 301 + 40 + 9 * number] for number in range(1, 8))]
    return Subject(opened.model, folder, opened.capabilities, prompts)


@pytest.mark.models
@pytest.mark.slow  # small models of every kind are below; a server's restarts with this one are in test_prefix_cache
@pytest.mark.parametrize("batch", [1, 8])
def test_smollm2(smollm2_folder: Path, tmp_path: Path, batch: int) -> None:
    real(smollm2_folder, 300).check(tmp_path, batch)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_gemma3_past_its_window(gemma3_folder: Path, tmp_path: Path, batch: int) -> None:
    real(gemma3_folder, 540).check(tmp_path, batch)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_smollm2_packed(smollm2_folder: Path, tmp_path: Path, batch: int) -> None:
    """(I1) Against one sequence whose keys and values are packed at the same places."""
    real(smollm2_folder, 300, INT8).check(tmp_path, batch)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_gemma3_packed_past_its_window(gemma3_folder: Path, tmp_path: Path, batch: int) -> None:
    """(I1)"""
    real(gemma3_folder, 540, INT8).check(tmp_path, batch)


@pytest.mark.often("gemma3_text-1")  # tests/engine/test_prefix.py has all of them without the kill
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_cache(kind: str, tmp_path: Path, batch: int) -> None:
    folder = save(kind, tmp_path / "model")
    opened = open_model(folder)
    prompts = [[(7 * n * n + 13 * number + 3) % VOCAB for n in range(170 - 17 * number)] for number in range(8)]
    Subject(opened.model, folder, opened.capabilities, prompts).check(tmp_path, batch)
