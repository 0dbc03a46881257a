"""Records made up for tests, a listener for the SSD tier's events, and file systems that go wrong."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from millpond.prefix.disk.age_clock import AgeClock
from millpond.prefix.disk.events import Gone, Loaded, Opened, Saved, SsdEvent
from millpond.prefix.disk.files import Files
from millpond.prefix.disk.pool import record_path
from millpond.prefix.disk.tier import UPKEEP_SECONDS, SsdTier
from millpond.prefix.keys import next_key, pack, root_key
from millpond.prefix.records import Kind, RecordHead, RecordId, Tensor
from millpond.settings import PrefixSettings

NAMESPACE = hashlib.sha256(b"a namespace").hexdigest()
OTHER = hashlib.sha256(b"another namespace").hexdigest()
PATIENCE = 30.0
"""Seconds after which something that should happen has not: far above what it takes."""
NO_LIMITS = PrefixSettings(cache_ssd=1 << 40)


def head(
    parent: bytes, start: int, *, kind: Kind = Kind.KV, size: int = 3000, tokens: int = 64, salt: int = 0
) -> RecordHead:
    """A record's head; the tokens follow from position and ``salt``."""
    packed = pack([start + salt * 1_000_000 + i for i in range(tokens)])
    tensors = (Tensor("uint8", (size // 2,), size // 2), Tensor("uint8", (size - size // 2,), size - size // 2))
    key = next_key(parent, packed)
    return RecordHead(key=key, kind=kind, parent=parent, start=start, tokens=packed, tensors=tensors)


def chain(length: int, *, namespace: str = NAMESPACE, size: int = 3000, salt: int = 0) -> list[RecordHead]:
    """The kv records of one prompt."""
    heads: list[RecordHead] = []
    parent = root_key(namespace)
    for number in range(length):
        heads.append(head(parent, number * 64, size=size, salt=salt))
        parent = heads[-1].key
    return heads


def payload_of(record: RecordHead) -> bytes:
    """The payload a record must have: it follows from its id, so any mix-up shows."""
    seed = hashlib.sha256(record.key + record.kind.encode()).digest()
    return (seed * (record.payload_bytes // len(seed) + 1))[: record.payload_bytes]


def file_of(folder: Path, record: RecordHead, namespace: str = NAMESPACE) -> Path:
    return record_path(folder, namespace, record.id)


def record_files(folder: Path) -> list[Path]:
    """Every file below the namespaces' folders, temporary ones too."""
    return [path for path in folder.glob("????????????????/??/*") if path.is_file()]


def bytes_on_disk(folder: Path) -> int:
    total = 0
    for path in record_files(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


class Listener:
    """Collects events; ``check`` runs on each, in the tier's threads."""

    def __init__(self, check: Callable[[SsdEvent], None] | None = None) -> None:
        self.events: list[SsdEvent] = []
        self._check = check
        self._changed = threading.Condition()

    def __call__(self, event: SsdEvent) -> None:
        if self._check is not None:
            self._check(event)
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], object]) -> None:
        """Until the condition holds; it is asked after every event, and now and then."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not condition():
                assert time.monotonic() < deadline, f"nothing came of {self.events}"
                self._changed.wait(0.005)

    def of(self, kind: type) -> list:
        return [event for event in list(self.events) if isinstance(event, kind)]

    def saved(self) -> dict[RecordId, str]:
        return {event.id: event.problem for event in self.of(Saved)}

    def gone(self) -> set[RecordId]:
        return {record for event in self.of(Gone) for record in event.ids}


class RunningTier:
    """A started tier and its events, with calls that wait for their answer."""

    def __init__(
        self,
        folder: Path,
        limits: PrefixSettings = NO_LIMITS,
        *,
        namespace: str = NAMESPACE,
        check: Callable[[SsdEvent], None] | None = None,
        files: Files | None = None,
        clock: AgeClock | None = None,
        upkeep_seconds: float = UPKEEP_SECONDS,
    ) -> None:
        self.folder = folder
        self.listener = Listener(check)
        self.tier = SsdTier(
            *(folder, namespace, replace(limits, label="a model"), self.listener),
            files=files,
            clock=clock,
            upkeep_seconds=upkeep_seconds,
        )
        self.tier.start()
        self.listener.wait(lambda: self.listener.events)
        opened = self.listener.events[0]
        assert isinstance(opened, Opened)
        self.opened = opened
        self._ticket = 0

    def save(self, *records: RecordHead) -> dict[RecordId, str]:
        """Write records; the problem of each, empty for those on disk."""
        before = len(self.listener.of(Saved))
        for record in records:
            assert self.tier.write(record, payload_of(record))
        self.listener.wait(lambda: len(self.listener.of(Saved)) >= before + len(records))
        answers = self.listener.of(Saved)[before:]
        return {event.id: event.problem for event in answers}

    def load(self, record: RecordHead) -> Loaded:
        """Read one record; a payload is compared with what it must be before it is handed back."""
        self._ticket += 1
        ticket = self._ticket
        self.tier.read(record, ticket)
        self.listener.wait(lambda: any(event.ticket == ticket for event in self.listener.of(Loaded)))
        (event,) = (event for event in self.listener.of(Loaded) if event.ticket == ticket)
        assert event.id == record.id
        if event.payload is not None:
            assert bytes(event.payload) == payload_of(record), "served something else than was written"
            assert event.tensors == record.tensors
        else:
            assert event.problem
        self.tier.taken()
        return event

    def swept(self) -> None:
        """Until the sweep that follows opening is through."""
        self.listener.wait(lambda: self.tier._writer._sweep is None)

    def close(self) -> bool:
        return self.tier.close(PATIENCE)


@contextmanager
def running(
    folder: Path,
    limits: PrefixSettings = NO_LIMITS,
    *,
    namespace: str = NAMESPACE,
    check: Callable[[SsdEvent], None] | None = None,
    files: Files | None = None,
    clock: AgeClock | None = None,
    upkeep_seconds: float = UPKEEP_SECONDS,
) -> Iterator[RunningTier]:
    """A tier that is closed in the end."""
    tier = RunningTier(
        folder, limits, namespace=namespace, check=check, files=files, clock=clock, upkeep_seconds=upkeep_seconds
    )
    try:
        yield tier
    finally:
        tier.close()


class SetClock:
    """Wall and steady time that a test moves."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000.0
        self.steady = 1000.0

    def clock(self) -> AgeClock:
        return AgeClock(lambda: self.wall, lambda: self.steady)

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


STEPS = ("make_folder", "create", "write", "sync", "close", "publish", "sync_folder", "remove")


class KillingFiles(Files):
    """Kills this process, as a loss of power would, at step ``at`` of those that change files.

    Each change counts twice, before and after; a write three times, once with half of its bytes written.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps = 0

    def _step(self) -> None:
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1

    def write(self, descriptor: int, data: memoryview) -> int:
        self._step()
        half = super().write(descriptor, data[: len(data) // 2]) if len(data) > 1 else 0
        self._step()
        count = half + super().write(descriptor, data[half:])
        self._step()
        return count


def _killing(name: str) -> Callable[..., object]:
    def step(self: KillingFiles, *args: object) -> object:
        self._step()
        result = getattr(Files, name)(self, *args)
        self._step()
        return result

    return step


for _name in STEPS:
    if _name != "write":
        setattr(KillingFiles, _name, _killing(_name))


class FailingFiles(Files):
    """Raises an error for the named steps while told so."""

    def __init__(self) -> None:
        self.failing: dict[str, OSError] = {}

    def _maybe(self, name: str) -> None:
        if name in self.failing:
            raise self.failing[name]


def _failing(name: str) -> Callable[..., object]:
    def step(self: FailingFiles, *args: object) -> object:
        self._maybe(name)
        return getattr(Files, name)(self, *args)

    return step


for _name in (*STEPS, "open", "read"):
    setattr(FailingFiles, _name, _failing(_name))
