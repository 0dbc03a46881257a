"""A model that loads for ever: one of its files is a pipe that nobody writes to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiny_models import save


@contextlib.contextmanager
def endless_model(
    folder: Path, file: str = "model.safetensors"
) -> Iterator[Callable[[subprocess.Popen[bytes] | None], None]]:
    """Make it; gives what waits until somebody has begun to read, and fails when the process that should is dead."""
    pipe = save("llama", folder) / file
    pipe.unlink()
    os.mkfifo(pipe)
    with contextlib.ExitStack() as opened:

        def being_read(process: subprocess.Popen[bytes] | None) -> None:
            while True:
                assert process is None or process.poll() is None
                with contextlib.suppress(OSError):  # nobody reads it yet
                    opened.callback(os.close, os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                    return
                time.sleep(0.01)

        yield being_read
