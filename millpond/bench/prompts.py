"""Prompts made from a fixed stock of common words: the same seed gives the same text on every machine.

Nearly every word below, with the space before it, is one token in the vocabularies of current models, so a text's
length in words is close to its length in tokens; the report shows the count the server itself states. A text begins
with words drawn from its seed, so that two texts of different seeds share no prefix beyond the chat template.
"""

from __future__ import annotations

import random

WORDS_PER_TOKEN = 0.84
"""Full stops take their share of the tokens."""


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    "old young small large quiet bright dark warm cold early late long short heavy light empty full broken clean "
    "strange simple gentle golden silver hidden distant narrow open"
)
NOUNS = _words(
    "farmer teacher sailor doctor painter soldier child captain writer singer lamp letter book map key box table "
    "window door stone wheel engine boat basket mirror clock coat bottle picture ticket"
)
VERBS = _words(
    "carried found moved opened watched followed repaired painted held sold kept lost cleaned counted described "
    "returned lifted turned placed covered"
)
PLACES = _words(
    "bridge river market garden station harbor forest village mountain school kitchen tower field road island "
    "library valley church beach street"
)
PREPOSITIONS = _words("near across behind beyond beside under above around inside outside")

TASK = "Continue this story at length, with many details about every person and every place."


def _sentence(rng: random.Random) -> list[str]:
    pick = rng.choice
    return [
        *("The", pick(ADJECTIVES), pick(NOUNS), pick(VERBS), "a", pick(ADJECTIVES), pick(NOUNS)),
        *(pick(PREPOSITIONS), "the", pick(ADJECTIVES), pick(PLACES) + "."),
    ]


def story(seed: str, tokens: int) -> str:
    """About ``tokens`` tokens of plain English, four words at least, that depend on ``seed`` from the first one on."""
    # Repeatable on purpose; nothing here is secret.
    rng = random.Random(seed)  # noqa: S311
    opening = [word.capitalize() for word in rng.choices(NOUNS + PLACES + ADJECTIVES, k=4)]
    words = [*opening[:3], opening[3] + "."]
    wanted = max(len(words), round(tokens * WORDS_PER_TOKEN))
    while len(words) < wanted:
        words += _sentence(rng)
    return " ".join(words[:wanted]).rstrip(".") + "."


def request_text(seed: str, tokens: int) -> str:
    """A user message of about ``tokens`` tokens that asks for a long answer."""
    return f"{story(seed, max(1, tokens - 18))} {TASK}"
