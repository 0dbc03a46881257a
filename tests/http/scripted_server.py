"""A whole front end process in front of the scripted engine: ``scripted_server.py SCRIPT FOLDER [FLAG VALUE]...``."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from millpond.cli.serve import Front, StartError, bind, find_draft, read_certificate, read_keys
from millpond.config import read_config
from millpond.observe.log import configure

ENGINE = (sys.executable, str(Path(__file__).parent.parent / "client" / "scripted_engine.py"))


class ScriptedFront(Front):
    """Tells the engine a script instead of the folder the tokenizer comes from."""

    def __init__(self, script: str, folder: Path, flags: dict[str, str | None]) -> None:
        config = read_config({"port": "0", **flags}, {})
        configure(config.log_level, config.log_format)
        names = ("org/test-model", "test-model")
        super().__init__(
            config,
            read_keys(config),
            *names,
            folder,
            time.monotonic(),
            ENGINE,
            script,
            read_certificate(config),
            find_draft(config),
        )
        self.listeners = bind(config)


def main() -> int:
    script, folder, *rest = sys.argv[1:]
    try:
        front = ScriptedFront(script, Path(folder), dict(zip(rest[::2], rest[1::2], strict=True)))
        asyncio.run(front.serve(front.listeners))
    except StartError as error:
        print(f"millpond serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
