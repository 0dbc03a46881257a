"""What clients may say about guessing ahead in any API: the field ``speculative``.

It changes nothing of an answer, only how fast it comes; see docs/speculative-decoding.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millpond.http.errors import bad_value, unsupported
from millpond.types import MOST_DRAFT_TOKENS, ModelInfo, SpecMode, SpecModeName, Speculation

LONGEST_NAME = 40
"""Of a field that there is not, as it may stand in a message."""
MISSING = {
    "draft": "it was started without a draft model (--draft-model)",
    "mtp": "no MTP head of the model is in use (--spec auto or mtp, and weights that have one)",
}
"""Modes that not every server has, and why not."""
SPECULATIVE = "an object with mode, tokens and adaptive, each of which may be absent"


class SpeculativeOptions(BaseModel):
    """The field ``speculative``; what is absent is as the server was started. Descriptions complete "must be …"."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    mode: SpecModeName | None = Field(None, description='"off", "ngram", "draft" or "mtp"')
    tokens: Annotated[int, Field(ge=1, le=MOST_DRAFT_TOKENS)] | None = Field(
        None, description=f"an integer from 1 to {MOST_DRAFT_TOKENS}"
    )
    adaptive: bool | None = Field(None, description="true or false")


def read_speculative(value: object) -> SpeculativeOptions:
    """Check a ``speculative`` value. Raises ApiError 400 naming the part at fault."""
    if not isinstance(value, dict):
        raise bad_value("speculative", value, SPECULATIVE)
    # One is enough: a complaint about each would be work without end.
    strange = next((name for name in value if name not in SpeculativeOptions.model_fields), None)
    if strange is not None:
        allowed = f"absent: the fields are {', '.join(SpeculativeOptions.model_fields)}"
        raise bad_value(f"speculative.{strange[:LONGEST_NAME]}", value[strange], allowed)
    try:
        return SpeculativeOptions.model_validate(value)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        known = SpeculativeOptions.model_fields[name]
        raise bad_value(f"speculative.{name}", value[name], str(known.description)) from error


def check_mode(asked: SpeculativeOptions | None, info: ModelInfo) -> None:
    """Refuse a draft model, or a head of the model's own, where there is none. Raises ApiError 400.

    Guesses from the text itself may be asked for anywhere: a model that cannot use them answers plainly.
    """
    mode = None if asked is None else asked.mode
    if mode is None or mode not in MISSING or mode in info.speculation:
        return
    others = [f'"{one}"' for one in ("off", "ngram", *MISSING) if one in ("off", "ngram", *info.speculation)]
    allowed = f"{', '.join(others[:-1])} or {others[-1]}"
    raise unsupported("speculative.mode", mode, f"{allowed}: {info.speculation_reason or MISSING[mode]}")


def speculation(asked: SpeculativeOptions | None, default: Speculation, offered: Sequence[str]) -> Speculation | None:
    """How a request wants its tokens guessed; None where it says nothing. A mode that is not offered means off."""
    if asked is None or (asked.mode is None and asked.tokens is None and asked.adaptive is None):
        return None
    mode = default.mode.among(offered) if asked.mode is None else SpecMode(asked.mode)
    return Speculation(
        mode=mode if mode in offered else SpecMode.OFF,
        tokens=default.tokens if asked.tokens is None else asked.tokens,
        adaptive=default.adaptive if asked.adaptive is None else asked.adaptive,
    )
