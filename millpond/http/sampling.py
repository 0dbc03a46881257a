"""How a request is sampled where it does not say: what the model's authors recommend in generation_config.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import ValidationError

from millpond.http.generation_request import NO_DEFAULTS, SAMPLING_FIELDS, SamplingDefaults
from millpond.http.openai.schemas import OpenAIRequest

log = logging.getLogger(__name__)

FILE = "generation_config.json"


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """What the file recommends. A value that no request could have is left out, with a warning that names it.

    A file with ``do_sample`` false recommends the likeliest token, whatever it says of temperature and limits.
    """
    try:
        found = json.loads((folder / FILE).read_bytes())
    except FileNotFoundError:
        return NO_DEFAULTS
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is not used: it cannot be read (%s)", FILE, getattr(error, "strerror", None) or error)
        return NO_DEFAULTS
    if not isinstance(found, dict):
        log.warning("%s is not used: it is not a JSON object", FILE)
        return NO_DEFAULTS
    greedy = found.get("do_sample")
    if greedy is not None and not isinstance(greedy, bool):
        log.warning("%s: do_sample must be true or false, got %.80r; it is not used", FILE, greedy)
    if greedy is False:
        found = {"repetition_penalty": found.get("repetition_penalty"), "temperature": 0.0}
    named = {name: found[name] for name in SAMPLING_FIELDS if found.get(name) is not None}
    return {name: value for name, value in named.items() if _usable(name, value)}


def _usable(name: str, value: object) -> bool:
    try:
        OpenAIRequest.model_validate({name: value})
    except ValidationError:
        allowed = OpenAIRequest.model_fields[name].description
        log.warning("%s: %s must be %s, got %.80r; it is not used", FILE, name, allowed, value)
        return False
    return True
