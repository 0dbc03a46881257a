"""The tokenizer of the model being served: text and chats to token ids, and ids back to text.

Invariants: no prompt begins with two BOS tokens; ends of turn are known by id. After loading nothing here is changed,
so every method may be called from any number of threads at once.

`transformers` only loads the files. It is imported by ``load``, because that takes more than a second; encoding and
decoding go straight to the Rust tokenizer, since the wrapper sets its truncation and padding on every call, which
concurrent callers must not do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn.text.decoding import decoding_of
from kvarn.text.detokenize import Detokenizer
from kvarn.text.ends import configured_ends, turn_ends
from kvarn.text.template import ChatTemplate, Message, TemplateError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

__all__ = ["Message", "TemplateError", "Tokenizer", "TokenizerError"]


class TokenizerError(Exception):
    """A model folder has no tokenizer that can be used; the message says why."""


class Tokenizer:
    """See the module's docstring. Made by ``load``."""

    def __init__(self, wrapper: PreTrainedTokenizerFast, folder: Path) -> None:
        """``wrapper`` becomes this object's own; ``folder`` may hold config files that name more end tokens."""
        self._wrapper = wrapper
        self._backend: tokenizers.Tokenizer = wrapper.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._decoding = decoding_of(self._backend)
        self._prefix = _prefix(self._backend)
        source = _template_source(wrapper)
        self._template = None if source is None else ChatTemplate(source, wrapper.special_tokens_map)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = wrapper.bos_token_id
        self.eos_token_ids: frozenset[int] = self._find_ends(folder)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer in a model folder; nothing is fetched and no code from the folder is run.

        Raises TokenizerError when there is none or it needs code of its own.
        """
        # Read when transformers is first imported; otherwise it greets users with a warning that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # A batch of one has nothing to share out; threads of `tokenizers` would only be in the way of a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            wrapper = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            # Broken files surface as almost any exception type; all mean that this folder cannot be served.
            log.debug("loading the tokenizer failed", exc_info=True)
            raise TokenizerError(f"cannot load the tokenizer in {folder}: {error}") from error
        if not isinstance(wrapper, PreTrainedTokenizerFast):
            raise TokenizerError(f"the tokenizer in {folder} ({type(wrapper).__name__}) has no tokenizer.json form")
        return cls(wrapper, folder)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, those included that were added to the vocabulary."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, after the BOS that the tokenizer puts first, unless the text begins with it.

        Special tokens written out in the text are recognised. Lone surrogates read as U+FFFD.
        """
        ids = self._encode(text)
        return ids if ids[:1] == self._prefix[:1] else self._prefix + ids

    def text_tokens(self, text: str) -> list[int]:
        """Like ``encode``, but of a text that stands behind another: nothing is put first."""
        return self._encode(text)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant to answer.

        The template alone decides about BOS, as it did when the model was trained. Raises TemplateError.
        """
        return self._encode(self._render(messages, generation_prompt=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens and unknown ids left out."""
        return self._backend.decode_batch([list(ids)], skip_special_tokens=True)[0]

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental form of ``decode``, for one answer."""
        return self._decoding.detokenizer()

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, maybe only part of a character; special tokens are spelled out."""
        return self._decoding.token_bytes(token)

    def token_text(self, token: int) -> str:
        """``token_bytes`` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            # JSON may carry half a surrogate pair, which no tokenizer accepts.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # The batch calls let other threads run meanwhile; `encode` and `decode` hold the interpreter for seconds.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        if self._template is None:
            raise TemplateError("this model has no chat template; use /v1/completions")
        return self._template.render(messages, generation_prompt)

    def _find_ends(self, folder: Path) -> frozenset[int]:
        ends = configured_ends(folder)
        if self._wrapper.eos_token_id is not None:
            ends |= {self._wrapper.eos_token_id}
        if self._template is not None:
            ends |= turn_ends(self._backend, self._template.source, self._render_answer)
        return frozenset(ends)

    def _render_answer(self, answer: str) -> str | None:
        """A conversation that ends with this answer, without generation prompt; None if the template refuses it."""
        try:
            return self._render(
                [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}],
                generation_prompt=False,
            )
        except TemplateError:
            return None


def _prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The ids the tokenizer puts before any text: BOS, or nothing."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _template_source(wrapper: PreTrainedTokenizerFast) -> str | None:
    """The chat template's text; of several named ones, the default."""
    if not wrapper.chat_template:
        return None
    try:
        return wrapper.get_chat_template()
    except ValueError:
        # Several templates and none called default: there is none to choose for a plain chat.
        return None
