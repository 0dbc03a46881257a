"""Answers prompts with write-through to a folder and dies by SIGKILL: what a killed engine leaves behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from millpond.model import blas

blas.prepare()

from engine_driver import Driver, disk_cache, request  # noqa: E402

from millpond.model.opened import open_model  # noqa: E402
from millpond.prefix.disk.events import Opened  # noqa: E402
from millpond.types import KvPacking  # noqa: E402


def main() -> None:
    """``FOLDER CACHE PROMPTS ANSWER BITS``: a model folder, the cache's folder, a JSON list of prompts, tokens to draw,
    bits of keys and values."""
    folder, where, prompts, answer = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
    opened = open_model(folder, packing=KvPacking(bits=int(sys.argv[5])))
    cache, ssd, inbox = disk_cache(opened.model, where)
    event = inbox.get(timeout=30)
    assert isinstance(event, Opened)
    cache.on_event(event)
    driven = Driver(opened.model, capabilities=opened.capabilities, cache=cache, ssd=ssd, inbox=inbox)
    for index, tokens in enumerate(prompts):
        driven.submit(request(f"r{index}", tokens, answer))
    driven.run()
    cache.housekeep()
    while cache.saving:
        cache.on_event(inbox.get(timeout=30))  # type: ignore[arg-type]
        cache.housekeep()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
