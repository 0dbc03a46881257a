"""What can be wrong with a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class TextError(Exception):
    """A text that the model's tokenizer cannot read; the message is fit for the client."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever `tokenizers` raises inside into TextError; ``what`` it could not do completes the sentence.

    A panic in its Rust code is no Exception, and what it says may quote the text, so that stays here.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        log.warning("the tokenizer cannot %s: %s", what, type(error).__name__)
        raise TextError(f"the model's tokenizer cannot {what}") from error
