"""What is written about settings: their defaults and ranges as one would write them, and docs/configuration.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from millpond.values import MOST_BYTES, MOST_COUNT, SECONDS, SIZES, seconds

BEGIN = """\
# Configuration

Settings of `millpond serve`, as flags (`--max-batch 8`), as environment variables (`MILLPOND_MAX_BATCH=8`) or in
a TOML file given with `--config` or `MILLPOND_CONFIG` (`max_batch = 8`). A flag wins over a variable, and that
over the file. Sizes take units (`8GB`, `512MiB`), durations too (`90s`, `30m`, `12h`, `7d`), lists are
separated by commas. A bad value stops the start with a message that names it and what is allowed.

```toml
port = 9000
max_batch = 16
cache_ram = "8GB"
api_key_file = "~/.config/millpond/keys"
allowed_hosts = ["chat.example.org", "localhost"]
```

API keys, HTTPS, hosts and web pages: [security.md](security.md). Several processes or machines for one model:
[tensor-parallel.md](tensor-parallel.md). Written by `make reference`.

| setting | default | allowed | meaning |
|---|---|---|---|
"""


def default(field: FieldInfo) -> str:
    """A default as one would write it; empty where there is none to write."""
    value: object = field.default
    if value in ("", None, ()):
        return ""
    if isinstance(value, ByteSize):
        unit = next((unit for unit in SIZES if value and value % SIZES[unit] == 0), "")
        return f"{value // SIZES.get(unit, 1)}{unit}"
    if isinstance(value, float):
        units = SECONDS if any(getattr(part, "func", None) is seconds for part in field.metadata) else {"": 1.0}
        unit = next((unit for unit in reversed(units) if value and value % units[unit] == 0), "")
        return f"{value / units.get(unit, 1.0):g}{unit}"
    return str(value)


def allowed(field: FieldInfo) -> str:
    """The values or the range of a setting, where there is more to say than its kind."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(get_args(field.annotation))
    low = next((part.ge for part in field.metadata if hasattr(part, "ge")), None)
    high = next((part.le for part in field.metadata if hasattr(part, "le")), None)
    if high is None or high in (MOST_COUNT, MOST_BYTES):
        return "" if low is None else f"from {low}"
    return f"{low} to {high}"


def page(fields: Mapping[str, FieldInfo]) -> str:
    """docs/configuration.md."""
    rows = (
        f"| `{name}` | {f'`{default(field)}`' if default(field) else ''} | {allowed(field)} | {field.description} |\n"
        for name, field in fields.items()
    )
    return BEGIN + "".join(rows)
