"""The settings, read as ``millpond serve`` would read them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from millpond.cli.doctor.finding import Finding, fail, ok, warn
from millpond.config import ConfigError, ServeConfig, read_config

OTHERS = ("MILLPOND_CACHE", "MILLPOND_CONFIG", "MILLPOND_KERNELS", "MILLPOND_TP_SECRET")
"""Variables that are not settings of ``serve``."""


def read(
    flags: Mapping[str, str | None], file: str | None, environ: Mapping[str, str] = os.environ
) -> tuple[ServeConfig | None, list[Finding]]:
    """The settings, if they can be used, and what there is to say about them."""
    config, found = None, []
    try:
        config = read_config(flags, environ, file)
    except ConfigError as error:
        found.append(fail("settings", str(error), "correct it; millpond serve --help says what each setting means"))
    else:
        given = ", ".join(sorted(config.model_fields_set)) or "none, all are the defaults"
        found.append(ok("settings", f"given: {given}"))
    known = {f"MILLPOND_{name.upper()}" for name in ServeConfig.model_fields}.union(OTHERS)
    for name in sorted(environ):
        if name.startswith("MILLPOND_") and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"is it {close[0]}?" if close else "unset it"
            found.append(warn("settings", f"{name} is set, but there is no such setting", remedy))
    return config, found
