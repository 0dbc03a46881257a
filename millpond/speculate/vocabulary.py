"""Whether two models speak of the same tokens: a draft's ids mean nothing to a target with another vocabulary."""

from __future__ import annotations

from pathlib import Path

from millpond.text.tokenizer import Tokenizer


def vocabulary_differs(draft: Path, target: Path) -> str:
    """A sentence that names the first token in which the vocabularies of two model folders differ, or ''.

    Raises TokenizerError for a folder without a tokenizer.
    """
    ours, theirs = (
        {id_: text for text, id_ in Tokenizer.load(folder).vocabulary.items()} for folder in (draft, target)
    )
    for token in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(token), theirs.get(token)
        if mine != other:
            named = [f"is {text!r} in" if text is not None else "is missing in" for text in (mine, other)]
            return (
                f"token {token} {named[0]} the draft model's vocabulary of {len(ours)} tokens "
                f"and {named[1]} the model's of {len(theirs)}"
            )
    return ""
