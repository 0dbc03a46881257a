"""Whether steps in flight write in place: one that is launched before the one ahead of it has been read must not copy
what the rows hold, not even a part of one layer. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx

from millpond.kv.slots import RingSpec
from millpond.model.forwards import decode
from millpond.model.load import LoadedModel, keeping_keys
from millpond.model.prompt import new_prompt

CANARY_BYTES = 96 * 1024 * 1024
"""Of the long row, in all layers."""
SHORT = 64
"""Of it, the part that the short row has."""
STEPS = 3
TRIES = 3
MARGIN = (1 + TRIES) * STEPS + 2
LOGIT_BYTES = 16
"""Of one logit, in all the forms in which a step has it at once."""
COPIED = 0.4
"""Of a layer, what is no copy yet: the scores of unfused attention grow with the row, too."""


def donates(model: LoadedModel) -> bool:
    """What steps over a long row take beyond those over a short one is copies: the rest is of the same size in both.
    Recurrent states are, and are new in each step anyway."""
    assert not isinstance(model.specs, str)
    layers = keeping_keys(model.specs)
    if not layers:
        return True
    token_bytes = sum(spec.token_bytes for spec in layers)
    longest = min(model.context_length, max(SHORT, CANARY_BYTES // token_bytes)) - MARGIN
    short, least = _in_flight(model, longest // SHORT, max)
    long, most = _in_flight(model, longest, min)
    growing = sum(not isinstance(spec, RingSpec) for spec in layers)
    if long == short:  # rings are as large whatever they hold
        states = model.sizes.state_bytes
        least = STEPS * (model.vocab_size * LOGIT_BYTES + states)
        short, growing = states, len(layers)
    scores = model.score_bytes * (longest - longest // SHORT)
    return most - least < COPIED * (long - short) / growing + scores


def _in_flight(model: LoadedModel, length: int, of_tries: Callable[[Iterable[int]], int]) -> tuple[int, int]:
    """Bytes of a row of ``length`` tokens, and the most that steps in flight took beyond it, ``of_tries``: how many are
    under way at once is a matter of luck where they are short, and what is copied is copied each time."""
    lane = model.slots_lane()
    lane.adopt("canary", new_prompt(model.network, model.form))
    lane.advance([length])  # positions that were never written are zeros: the canary looks at memory, not at values
    tokens = mx.zeros((1,), dtype=mx.int32)
    taken = []
    for _ in range(1 + TRIES):
        flights = []
        mx.eval(tokens, lane.arrays())
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(STEPS):
            tokens = mx.argmax(decode(model.network, lane, tokens), axis=-1).astype(mx.int32)
            mx.async_eval(tokens)
            flights.append(tokens)
        mx.eval(flights)
        taken.append(mx.get_peak_memory() - before)
    return lane.nbytes, of_tries(taken[1:])  # the first one also makes what later ones find
