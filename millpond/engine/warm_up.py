"""What is compiled or paged in on first use is used once before the first request. Engine thread only."""

from __future__ import annotations

import time
from collections.abc import Sequence

from millpond.engine.chunk import reading_seconds
from millpond.engine.inflight import Steps
from millpond.engine.sequence import Sequence as Answer
from millpond.model.forwards import prefill
from millpond.model.load import LoadedModel
from millpond.model.probe import Capabilities
from millpond.model.prompt import new_prompt
from millpond.sample.state import SamplingState
from millpond.schedule.costs import CostModel
from millpond.types import Request, SamplingParams

KINDS = (
    SamplingParams(max_tokens=2, temperature=0.0),
    SamplingParams(max_tokens=2, temperature=1.0),
    SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9),
    SamplingParams(max_tokens=2, temperature=1.0, top_k=20, min_p=0.1),
    SamplingParams(max_tokens=2, temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.1, logit_bias={0: 1.0}),
    SamplingParams(max_tokens=2, temperature=0.0, logprobs=5),
)
"""Every way to draw. A GPU compiles the kernels of each; a CPU compiles none of them."""


PACED = (16, 64, 256)
"""Tokens of the prompts whose reading is measured."""


def warm_up(model: LoadedModel, capabilities: Capabilities) -> None:
    """One row through one step. Raises what the model's code raises: there is nothing to serve with it then."""
    _step(model, capabilities, KINDS[:1])


def warm_up_all(model: LoadedModel, capabilities: Capabilities) -> None:
    """Rows of different lengths, one for each way to draw, through a plain step and one with draft tokens. Nothing on a
    CPU, whose forwards are dear. Raises what MLX raises: what cannot be done is a request's fault that asks for it."""
    if not model.on_cpu:
        _step(model, capabilities, KINDS)


def _step(model: LoadedModel, capabilities: Capabilities, kinds: Sequence[SamplingParams]) -> None:
    lane, answers = capabilities.lane(model), []
    for length, params in enumerate(kinds):
        tokens = [0] * (length + 1)
        request = Request(id=str(length), tokens=tokens, params=params)
        answers.append(Answer(request, SamplingState(params, model.vocab_size, tokens)))
        prompt = new_prompt(model.network, model.form)
        prefill(model.network, prompt, tokens[:-1])
        lane.adopt(request.id, prompt)
    steps = Steps(model.network, model.vocab_size)
    steps.plain(lane, answers, None, time.monotonic(), lambda _: []).drawn()
    if capabilities.slots and len(kinds) > 1:
        steps.verifying(lane, answers, ((0,),) * len(answers), time.monotonic()).drawn()


def first_costs(model: LoadedModel, costs: CostModel) -> None:
    """What reading prompts takes on this device, before the first request: how much of it is the same for any length
    decides whether short prompts are read together. A CPU, where that is little, learns it from its requests."""
    for tokens in () if model.on_cpu else PACED:
        tokens = min(tokens, model.context_length - 1)
        costs.observe_prefill(0, tokens, reading_seconds(model, tokens) * 1000)
