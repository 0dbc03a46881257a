"""A whole front end process in front of the scripted engine: ``scripted_server.py SCRIPT FOLDER [FLAG VALUE]...``."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from millpond.cli.serve import ServeRun, StartError, bind, find_draft, read_certificate, read_keys
from millpond.client.start import engine_client, start_message
from millpond.config import read_config
from millpond.http.names import ModelNames
from millpond.observe.log import configure

ENGINE = (sys.executable, str(Path(__file__).parent.parent / "client" / "scripted_engine.py"))


def main() -> int:
    script, folder, *rest = sys.argv[1:]
    try:
        config = read_config({"port": "0", "cache_ssd": "0", **dict(zip(rest[::2], rest[1::2], strict=True))}, {})
        configure(config.log_level, config.log_format)
        names = ModelNames.of(config.model_name, "org/test-model", "test-model", Path(folder))
        # The engine is told a script instead of the folder that the tokenizer comes from.
        client = engine_client(config, start_message(config, script, find_draft(config), names.served), command=ENGINE)
        certificate = read_certificate(config)
        serving = ServeRun(config, read_keys(config), names, Path(folder), client, certificate, time.monotonic())
        asyncio.run(serving.serve(bind(config)))
    except StartError as error:
        print(f"millpond serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
