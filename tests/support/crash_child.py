"""What the children of the crash tests do until they are killed."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

from ssd_support import KillingFiles, chain, payload_of, running

from millpond.prefix.disk.files import Files
from millpond.prefix.disk.index import DiskIndex
from millpond.settings import PrefixSettings


def work(folder: Path, mode: str, at: int, cap: int) -> None:
    """One child, or, for ``every-...``, one after the other killed a step later than the last."""
    if mode.startswith("every-"):
        _every_step(folder, PrefixSettings(cache_ssd=cap, ssd_durability=mode.removeprefix("every-")))  # type: ignore[arg-type]
    elif mode == "endless":
        _endless(folder, PrefixSettings(cache_ssd=cap))
    else:
        _kill_in_transaction("put" if mode == "rows" else "delete", at)
        with running(folder, PrefixSettings(cache_ssd=cap)) as tier:
            for salt in itertools.count(at * 5):
                tier.save(*chain(3, salt=salt % 40))


def _every_step(folder: Path, limits: PrefixSettings) -> None:
    for at in itertools.count():
        inside = folder / str(at)
        child = os.fork()
        if child == 0:
            _some_work(inside, limits, KillingFiles(at))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            sys.exit("a child failed")
        through = not os.WIFSIGNALED(status)
        print("through" if through else "killed", inside, flush=True)
        if through:
            return
        sys.stdin.readline()


def _some_work(folder: Path, limits: PrefixSettings, files: Files) -> None:
    """Write two prompts, a third that evicts when there is room for four records, and discard a part."""
    with running(folder, limits, files=files) as tier:
        for salt in range(2):
            tier.save(*chain(2, salt=salt))
        tier.save(*chain(1, salt=2))
        tier.tier.discard([chain(1, salt=1)[0].id])
        tier.listener.wait(lambda: chain(1, salt=1)[0].id in tier.listener.gone())


def _endless(folder: Path, limits: PrefixSettings) -> None:
    with running(folder, limits) as tier:
        print("ready", flush=True)
        for salt in itertools.count(int(time.time() * 1000)):
            for record in chain(3, salt=salt % 40):
                tier.tier.write(record, payload_of(record))
            tier.tier.touch([record.id for record in chain(2, salt=(salt - 1) % 40)])
            tier.save(chain(1, salt=salt % 40)[0])
            tier.tier.discard([chain(3, salt=(salt - 2) % 40)[2].id])


def _kill_in_transaction(method: str, at: int) -> None:
    original = getattr(DiskIndex, method)
    count = itertools.count()

    def killing(self: DiskIndex, *args: object) -> None:
        original(self, *args)
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(DiskIndex, method, killing)
