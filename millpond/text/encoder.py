"""From text to token ids, with control tokens or without.

`tokenizers` recognises every added token in every text. To keep text from clients text there is a second tokenizer that
shares the first one's model, and in which each control token goes by a secret name: nobody can write it, all else is as
it was, so that texts without control tokens get the very same ids. Where a chat template wrote a control token, its
name is put in by us.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping

import tokenizers

from millpond.text.control import any_of
from millpond.text.errors import TextError, reading


class Encoder:
    """Both ways of encoding. Nothing is changed after making: any number of threads at once."""

    def __init__(self, backend: tokenizers.Tokenizer, controls: Collection[str]) -> None:
        self._backend = backend
        secret = secrets.token_hex(8)
        self._names = {text: f"<millpond:{secret}:{number}>" for number, text in enumerate(controls)}
        self._pattern = any_of(controls)
        self._single = frozenset(
            token.content
            for token in backend.get_added_tokens_decoder().values()
            if token.single_word and token.content in self._names
        )
        self._bare = _bare(backend, self._names)
        self._real = _real_ids(backend, self._bare, self._names)
        self._spellable = _spellable(backend, controls)

    def parsed(self, text: str) -> list[int]:
        """Ids of a text, control tokens written out in it recognised. Raises TextError."""
        return _run(self._backend, text)

    def plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token. Raises TextError."""
        return self._known(_run(self._bare, text))

    def named(self, text: str) -> str:
        """``text`` with the secret names of the control tokens in it, for ``plain`` to recognise."""
        return self._pattern.sub(self._name, text)

    def _name(self, match: re.Match[str]) -> str:
        text = match[0]
        if text in self._single and (_wordy(match.string, match.start() - 1) or _wordy(match.string, match.end())):
            return text
        return self._names[text]

    def _known(self, ids: list[int]) -> list[int]:
        """Ids of the second tokenizer as the model knows them."""
        if self._real.keys().isdisjoint(ids) and self._spellable.isdisjoint(ids):
            return ids
        found: list[int] = []
        for token in ids:
            if token in self._spellable:
                found += self._spelled(token)
            else:
                found.append(self._real.get(token, token))
        return found

    def _spelled(self, control: int) -> list[int]:
        """Characters of a control token that the vocabulary has as a word, so that its text alone makes it."""
        piece = self._backend.id_to_token(control) or ""
        try:
            ids = [token.id for character in piece for token in self._backend.model.tokenize(character)]
        except Exception as error:
            raise TextError(f"{piece!r} cannot be spelled in the model's vocabulary") from error
        if control in ids:
            raise TextError(f"{piece!r} is nothing but a control token to the model")
        return ids


def _run(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON may carry half a surrogate pair, which no tokenizer accepts.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    with reading("read this text"):
        # The batch call lets other threads run meanwhile; `encode` holds the interpreter for seconds.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _bare(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A tokenizer that shares ``backend``'s parts and knows its control tokens by other names."""
    bare = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    # New tokens are numbered from the size of the vocabulary on: with gaps in it, a number may be taken.
    words = backend.get_vocab(with_added_tokens=False)
    missing = max(words.values(), default=-1) + 1 - len(words)
    some_name = secrets.token_hex(8)
    tokens = [tokenizers.AddedToken(f"<millpond:{some_name}:{number}>") for number in range(missing)]
    tokens += [_renamed(token, names) for _, token in sorted(backend.get_added_tokens_decoder().items())]
    bare.add_tokens(tokens)  # at once: each call builds the search for all of them anew
    return bare


def _renamed(token: tokenizers.AddedToken, names: Mapping[str, str]) -> tokenizers.AddedToken:
    name = names.get(token.content)
    return tokenizers.AddedToken(
        token.content if name is None else name,
        single_word=token.single_word and name is None,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized and name is None,
        special=token.special,
    )


def _real_ids(backend: tokenizers.Tokenizer, bare: tokenizers.Tokenizer, names: Mapping[str, str]) -> Mapping[int, int]:
    """Id in ``bare`` → id in ``backend`` of the added tokens, where they differ."""
    real: dict[int, int] = {}
    for token, added in backend.get_added_tokens_decoder().items():
        other = bare.token_to_id(names.get(added.content, added.content))
        if other is not None and other != token:
            real[other] = token
    return real


def _spellable(backend: tokenizers.Tokenizer, controls: Collection[str]) -> frozenset[int]:
    """Control tokens that are words of the vocabulary too, which plain text might reach; but not the unknown token."""
    model = backend.model
    try:
        unknown = {token.id for token in model.tokenize("\U0010fffd")}
    except Exception:  # noqa: BLE001 - a vocabulary that has no word for what it does not know
        unknown = set()
    words = (model.token_to_id(text) for text in controls)
    return frozenset(word for word in words if word is not None) - unknown


def _wordy(text: str, at: int) -> bool:
    return 0 <= at < len(text) and (text[at].isalnum() or text[at] == "_")
