"""Which tokens end an answer: the sources beside the tokenizer's own EOS.

Runs once, at load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers

from millpond.text.settings import read_json

# Used only where the template cannot show how it ends a turn. <|end|> is left out: in some families it ends one message
# of several in a turn.
KNOWN_TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<turn|>")
_PROBE = "millpond"


def configured_ends(folder: Path) -> set[int]:
    """``eos_token_id`` of config.json, of its ``text_config``, and of generation_config.json, each an id or a list.

    Missing and unreadable files count as naming none: they are judged where the model is loaded.
    """
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    ends: set[int] = set()
    for part in (config, config.get("text_config"), generation):
        value = part.get("eos_token_id") if isinstance(part, dict) else None
        values = value if isinstance(value, list) else [value]
        ends.update(token for token in values if isinstance(token, int) and not isinstance(token, bool) and token >= 0)
    return ends


def turn_ends(backend: tokenizers.Tokenizer, template: str, render_answer: Callable[[str], str | None]) -> set[int]:
    """Ids of the added token that the chat template writes after an assistant's answer.

    ``render_answer`` renders a conversation that ends with the given answer, or gives None. Where that shows nothing,
    well-known end-of-turn tokens count, if the template mentions them and they are single added tokens.
    """
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    rendered = render_answer(_PROBE)
    if rendered is not None and _PROBE in rendered:
        following = rendered.rpartition(_PROBE)[2].lstrip()
        found = max((content for content in added if content and following.startswith(content)), key=len, default=None)
        if found is not None:
            return {added[found]}
    return {added[content] for content in KNOWN_TURN_ENDS if content in added and content in template}
