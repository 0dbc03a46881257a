"""Answers beside those that mlx-lm gives to the same prompts, one sequence at a time, in its own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from engine_driver import Outcome, upstream_math
from mlx_lm.generate import generate_step

from architectures.found import SAME, TIE, Answers

EQUAL = 2e-3
"""Two tokens whose log probabilities are this close may swap, and no token's may differ by more."""


@dataclass(frozen=True)
class Expected:
    """mlx-lm's answer to a prompt."""

    tokens: list[int]
    logprobs: list[mx.array]
    """Of all tokens, float32 [vocab], at each of its own."""


def expected(network: nn.Module, prompt: Sequence[int], count: int) -> Expected:
    """The likeliest tokens, ``count`` of them."""
    with upstream_math():
        steps = generate_step(mx.array(list(prompt)), network, max_tokens=count, prefill_step_size=256)
        found = [(int(token), logprobs.astype(mx.float32)) for token, logprobs in steps]
    return Expected([token for token, _ in found], [logprobs for _, logprobs in found])


def compared(outcomes: Sequence[Outcome], wanted: Sequence[Expected]) -> Answers:
    """All answers together."""
    each = [_one(outcome, want) for outcome, want in zip(outcomes, wanted, strict=True)]
    wrong = [answers.word for answers in each if not answers.right]
    tied = TIE if any(answers.word == TIE for answers in each) else SAME
    return Answers(wrong[0] if wrong else tied, round(max(answers.apart for answers in each), 7))


def _one(outcome: Outcome, want: Expected) -> Answers:
    if outcome.failure is not None:
        return Answers(f"failed: {outcome.failure.message}")
    if len(outcome.tokens) != len(want.tokens):
        return Answers(f"{len(outcome.tokens)} tokens instead of {len(want.tokens)}")
    largest = 0.0
    for place, (got, token) in enumerate(zip(outcome.tokens, want.tokens, strict=True)):
        likely = want.logprobs[place]
        if outcome.logprobs:
            largest = max(largest, abs(outcome.logprobs[place].logprob - likely[got].item()))
        if largest > EQUAL:
            return Answers(f"log probabilities {largest:.4f} apart at token {place}", largest)
        if got != token:
            gap = (likely[token] - likely[got]).item()
            return Answers(TIE if gap < EQUAL else f"another token, {gap:.4f} less likely, at {place}", largest)
    return Answers(SAME, largest)
