"""Samplers of rows whose answers are given whole."""

from __future__ import annotations

from collections.abc import Sequence

from millpond.sample.sampler import BatchSampler
from millpond.sample.state import SamplingState
from millpond.types import SamplingParams


def state(
    params: SamplingParams, vocab_size: int, prompt: Sequence[int] = (), answer: Sequence[int] = ()
) -> SamplingState:
    """A request that has drawn ``answer`` so far."""
    made = SamplingState(params, vocab_size, prompt)
    for token in answer:
        made.take(token)
    return made


def sampler(
    params: Sequence[SamplingParams],
    vocab_size: int,
    histories: Sequence[Sequence[int]] | None = None,
    prompts: Sequence[int] | None = None,
) -> BatchSampler:
    """``histories``: prompt and answer of each row; ``prompts``: how many of those tokens are the prompt."""
    seen = histories or [()] * len(params)
    ends = prompts or [0] * len(params)
    rows = zip(params, seen, ends, strict=True)
    return BatchSampler([state(p, vocab_size, tokens[:end], tokens[end:]) for p, tokens, end in rows], vocab_size)
