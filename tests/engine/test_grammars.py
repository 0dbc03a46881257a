"""Answers that follow grammars, in the batch (M3, M11): the same whoever else is there, whatever is guessed, cached or
lost on the way; and neighbours notice nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence

import jsonschema
import pytest
from engine_driver import Driver, Outcome, prefix_cache
from guided import (
    CALL,
    END,
    SCHEMA,
    THOUGHT,
    VOCAB,
    call_grammar,
    guided,
    id_of,
    ids,
    object_grammar,
    spelled,
    thinking,
    vocabulary,
)
from msgspec.structs import replace
from speculation_support import SAMPLED, SPECULATED, Oracle, capabilities, model, prompt, request, same
from tiny_models import SLOT_KINDS, SOLO_KINDS

from millpond.engine import grammars
from millpond.grammar.constraint import Constraint
from millpond.grammar.lexicon import Lexicon
from millpond.types import ErrorKind, Finish, Grammar, Request, SpecMode, SpecSettings, Speculation

BIAS = {id_of(END): 3.0, id_of(CALL): 4.0, id_of(THOUGHT): 3.0}
"""So that answers of random weights get anywhere."""
SHAPES: tuple[Grammar | None, ...] = (
    object_grammar(),
    None,
    call_grammar(),
    replace(object_grammar(), thinking=thinking(begun=True, most=12)),
    replace(object_grammar(), thinking=thinking(begun=False, most=5)),
    Grammar(text="start: /(ab|cd)+/\n"),
)


def crowd(count: int, seed: int = 0) -> list[Request]:
    made = []
    for number in range(count):
        params = dict(SAMPLED[number % len(SAMPLED)])
        params["logit_bias"] = {**BIAS, **params.get("logit_bias", {})}  # type: ignore[dict-item]
        params["seed"] = number
        params["logprobs"] = 2 if number % 4 == 0 else None
        params["min_tokens"] = 6 if number % 5 == 0 else 0
        one = request(f"r{number}", prompt(5 + 13 * number, seed + number), 60, **params)
        made.append(guided(one, SHAPES[number % len(SHAPES)]))
    return made


def run(kind: str, requests: Sequence[Request], **options: object) -> Driver:
    driver = Driver(
        model(kind),
        capabilities=capabilities(kind),
        vocabulary=vocabulary(),
        **options,  # type: ignore[arg-type]
    )
    for one in requests:
        driver.submit(one)
    driver.run()
    return driver


def alone(kind: str, requests: Sequence[Request]) -> dict[str, Outcome]:
    return {one.id: run(kind, [one]).outcomes[one.id] for one in requests}


def check(requests: Sequence[Request], outcomes: Mapping[str, Outcome]) -> int:
    """How many objects are whole; each answer is what it has to be, as far as it goes."""
    whole = 0
    for one in requests:
        outcome = outcomes[one.id]
        assert outcome.failure is None, outcome.failure
        text = spelled(outcome.tokens)
        shape = one.grammar
        if shape is None:
            continue
        if shape.triggers:
            _, called, text = text.rpartition(CALL)
            text = text.partition("</call>")[0] if called else ""
        text = text.rpartition(THOUGHT)[2].strip("\n")
        if shape.text == SHAPES[-1].text:  # type: ignore[union-attr]
            assert {text[i : i + 2] for i in range(0, len(text) - 1, 2)} <= {"ab", "cd"}
        elif text and outcome.finish is Finish.STOP:
            jsonschema.validate(json.loads(text), SCHEMA)
            whole += 1
    return whole


@pytest.mark.often("gemma3_text")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", SOLO_KINDS[0]])
def test_alone_and_together(kind: str) -> None:
    requests = crowd(12)
    expected = alone(kind, requests)
    assert check(requests, expected) >= 3
    together = run(kind, requests).outcomes
    same(together, expected)


def test_neighbours_answers_are_what_they_were() -> None:
    requests = crowd(12)
    free = [one for one in requests if one.grammar is None]
    expected = run("llama", free).outcomes
    same({one.id: run("llama", requests).outcomes[one.id] for one in free}, expected)


@pytest.mark.often("gemma3_text", "llama-1.0")
@pytest.mark.parametrize(
    ("kind", "chance"), [("llama", 0.0), ("llama", 0.7), ("llama", 1.0), *((kind, 0.7) for kind in SLOT_KINDS[1:])]
)
def test_draft_tokens_change_nothing(kind: str, chance: float) -> None:
    requests = crowd(8)
    expected = run(kind, requests).outcomes
    oracle = Oracle({name: outcome.tokens for name, outcome in expected.items()}, {one.id: chance for one in requests})
    driver = run(kind, requests, spec=SPECULATED, draft=oracle)
    same(driver.outcomes, expected)
    assert driver.beat.counters.spec.proposed > 0


def test_tokens_without_a_choice_are_drafts() -> None:
    """They cost a column instead of a step, and nobody has to propose them."""
    requests = [
        guided(request(f"r{n}", prompt(20, n), 60, temperature=1.0, seed=n), object_grammar()) for n in range(3)
    ]
    expected = run("llama", requests).outcomes
    spec = SpecSettings(default=Speculation(mode=SpecMode.NGRAM, adaptive=False))
    driver = run("llama", requests, spec=spec)
    same(driver.outcomes, expected)
    counts = driver.beat.counters.spec
    assert counts.accepted > 0.5 * counts.proposed
    assert counts.accepted >= 10


def test_cached_prefixes_change_nothing() -> None:
    requests = crowd(8)
    expected = run("llama", requests).outcomes
    cached = prefix_cache(model("llama"))
    same(run("llama", requests, cache=cached).outcomes, expected)
    hits = run("llama", requests, cache=cached).outcomes
    same(hits, expected)
    assert any(outcome.prefix is not None and outcome.prefix.cached for outcome in hits.values())


@pytest.mark.slow
def test_preempted_answers_go_on_where_they_were() -> None:
    long = replace(object_grammar(), text='start: /[a-z ]{400,440}/ "." \n')
    shapes = (long, None, replace(long, thinking=thinking(begun=True, most=90)), long)
    requests = [
        guided(request(f"r{n}", prompt(60 + 9 * n, n), 230, temperature=0.7, seed=n, min_tokens=200), shape)
        for n, shape in enumerate(shapes)
    ]
    expected = alone("llama", requests)
    tight = 1200 * model("llama").sizes.token_bytes
    driver = run("llama", requests, limit_bytes=tight)
    same(driver.outcomes, expected)
    assert driver.beat.counters.preemptions > 0


def test_an_answer_has_the_tokens_that_it_must_have() -> None:
    one = guided(request("r", prompt(9), 40, temperature=1.0, logit_bias={id_of(END): 100.0}, min_tokens=17), None)
    outcome = run("llama", [one]).outcomes["r"]
    assert len(outcome.tokens) == 17
    assert outcome.finish is Finish.STOP
    short = guided(replace(one, params=replace(one.params, min_tokens=0)), None)
    assert run("llama", [short]).outcomes["r"].tokens == []


def test_a_grammar_ends_an_answer_that_must_be_longer() -> None:
    one = guided(request("r", prompt(9), 40, temperature=1.0, min_tokens=30), Grammar(text='start: "ab"\n'))
    outcome = run("llama", [one]).outcomes["r"]
    assert (spelled(outcome.tokens), outcome.finish) == ("ab", Finish.STOP)


def test_no_end_is_drawn_within_a_thought_that_something_must_follow() -> None:
    grammar = replace(object_grammar(), thinking=thinking(begun=True, most=25))
    one = guided(request("r", prompt(9), 120, temperature=1.0, logit_bias={id_of(END): 100.0}), grammar)
    outcome = run("llama", [one]).outcomes["r"]
    text = spelled(outcome.tokens)
    assert outcome.finish is Finish.STOP
    jsonschema.validate(json.loads(text.rpartition(THOUGHT)[2]), SCHEMA)


def test_ends_that_are_ignored_end_what_is_complete() -> None:
    """`ignore_eos` has no ends; a grammar does."""
    one = replace(request("r", prompt(9), 50, temperature=1.0, logit_bias={id_of(END): 50.0}), grammar=SHAPES[-1])
    outcome = run("llama", [one]).outcomes["r"]
    assert outcome.finish is Finish.STOP
    assert outcome.tokens[-1] == id_of(END)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_dead_end_is_an_error_of_that_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = crowd(4)
    expected = alone("llama", requests[1:])
    asked = 0
    original = Constraint.allowed

    def allowed(self: Constraint) -> object:
        nonlocal asked
        if self._grammar.text == object_grammar().text and self._grammar.thinking is None:
            asked += 1
            if asked > 5:
                self.stuck = "no token of the vocabulary can follow"
                return None
        return original(self)

    monkeypatch.setattr(Constraint, "allowed", allowed)
    outcomes = run("llama", requests).outcomes
    failure = outcomes.pop("r0").failure
    assert failure is not None
    assert failure.kind is ErrorKind.GRAMMAR
    assert "no token" in failure.message
    same(outcomes, expected)


def test_an_end_that_was_drawn_in_need_is_no_end() -> None:
    """Where the draft's last column has no token to choose, an end is drawn as any other: the answer is stuck."""
    grammar = Grammar(text='start: "abcd" "\u00e9"\n')
    one = guided(request("r", prompt(9), 40, temperature=1.0, logit_bias={id_of(END): 100.0}), grammar)
    for spec in (None, SpecSettings(default=Speculation(mode=SpecMode.NGRAM, adaptive=False))):
        failure = run("llama", [one], spec=spec).outcomes["r"].failure
        assert failure is not None
        assert failure.kind is ErrorKind.GRAMMAR


def test_what_is_no_grammar_is_refused() -> None:
    requests = [guided(request("bad", prompt(9), 20), Grammar(text="start: nobody\n")), *crowd(2)]
    outcomes = run("llama", requests).outcomes
    failure = outcomes.pop("bad").failure
    assert failure is not None
    assert failure.kind is ErrorKind.INVALID
    assert "nobody" in failure.message
    same(outcomes, alone("llama", requests[1:]))


def test_without_a_vocabulary_there_are_no_grammars() -> None:
    driver = Driver(model("llama"), capabilities=capabilities("llama"))
    driver.submit(crowd(1)[0])
    driver.run()
    failure = driver.outcomes["r0"].failure
    assert failure is not None
    assert failure.kind is ErrorKind.INVALID


class Slow(Lexicon):
    """Compiles when it is let."""

    def __init__(self) -> None:
        self.size = VOCAB
        self.may = threading.Event()
        self.compiled: list[str] = []

    def matcher(self, grammar: str) -> object:  # type: ignore[override]
        assert self.may.wait(20), "nobody who waits for it may be needed to let it"
        self.compiled.append(grammar)
        return vocabulary().matcher(grammar)

    def bytes_of(self, token: int) -> bytes:
        return vocabulary().bytes_of(token)


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    slow = Slow()
    driver = Driver(model("llama"), capabilities=capabilities("llama"), vocabulary=slow)
    bound, again, cancelled, free = (replace(one, id=name) for one, name in zip((*crowd(1) * 3, crowd(2)[1]), "abcd"))  # noqa: B905
    for one in (bound, again, cancelled, free):
        driver.submit(one)

    def watch(turn: int) -> None:
        if turn == 10:
            driver.cancel("c")
        if driver.outcomes["d"].endings:
            assert driver.outcomes["c"].finish is Finish.CANCELLED
            slow.may.set()

    driver.run(each_turn=watch)
    assert driver.outcomes["a"].tokens == driver.outcomes["b"].tokens != []
    assert slow.compiled == [object_grammar().text], "once for all who have it"


def test_an_engine_that_stops_has_told_those_whose_grammar_was_being_compiled() -> None:
    slow = Slow()
    driver = Driver(model("llama"), capabilities=capabilities("llama"), vocabulary=slow)
    driver.submit(crowd(1)[0])
    driver.engine._receive = lambda: None  # type: ignore[method-assign]
    driver.engine._requests.submit(crowd(1)[0])
    driver.engine._requests.close()
    slow.may.set()
    assert driver.outcomes["r0"].finish is Finish.CANCELLED


def test_only_so_many_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MOST_KEPT", 2)
    shapes = [Grammar(text=f'start: "{letter}"\n') for letter in "abcab"]
    requests = [guided(request(f"r{n}", prompt(9), 5), shape) for n, shape in enumerate(shapes)]
    driver = run("llama", requests)
    assert [spelled(driver.outcomes[f"r{n}"].tokens) for n in range(5)] == list("abcab")
    assert len(driver.engine._requests._grammars._known) == 2
    for one in requests:
        driver.submit(replace(one, id=one.id + "again"))
    driver.run()
    assert spelled(driver.outcomes["r2again"].tokens) == "c"


def test_an_unfinished_thought_is_no_object() -> None:
    """`length` says that something is missing."""
    grammar = replace(object_grammar(), thinking=thinking(begun=True))
    one = guided(request("r", prompt(9), 15, temperature=1.0, logit_bias={id_of(THOUGHT): -100.0}), grammar)
    outcome = run("llama", [one]).outcomes["r"]
    assert outcome.finish is Finish.LENGTH
    assert ids(THOUGHT)[0] not in outcome.tokens
