"""(M3) Where an answer is bound and where it is free, token by token, and across the borders between them."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest
from grammar_walks import ids_of
from guided import (
    CALL,
    CALLED,
    END,
    SCHEMA,
    THINK,
    THOUGHT,
    VOCAB,
    backend,
    call_grammar,
    id_of,
    ids,
    object_grammar,
    spelled,
    thinking,
    vocabulary,
)
from msgspec.structs import replace

from millpond.grammar.check import GrammarError, check, check_schema
from millpond.grammar.constraint import Bits, Constraint, DeadEnd
from millpond.grammar.lexicon import Lexicon, LexiconError
from millpond.types import Grammar, Symbol

OBJECT = '{"a": "x", "b": 7, "c": "red", "d": [true]}'


def constraint(grammar: Grammar) -> Constraint:
    return Constraint(grammar, vocabulary().matcher(grammar.text) if grammar.text else None, vocabulary())


def may(state: Constraint) -> set[int]:
    return ids_of(state.allowed(), VOCAB)


def take(state: Constraint, tokens: list[int]) -> None:
    for token in tokens:
        assert state.permits(token)
        assert token in may(state)
        state.take(token)


def test_an_object_and_its_end() -> None:
    state = constraint(object_grammar())
    take(state, ids(OBJECT))
    assert state.complete
    assert may(state) == {id_of(END)}


def test_nothing_else_is_permitted() -> None:
    state = constraint(object_grammar())
    assert not state.permits(ids("x")[0])
    assert not state.permits(id_of(THINK))
    assert ids("x")[0] not in may(state)
    with pytest.raises(DeadEnd):
        state.take(ids("x")[0])


def test_bits_are_new_each_time() -> None:
    """One that is changed afterwards would forbid a neighbour's tokens."""
    state = constraint(object_grammar())
    first, second = state.allowed(), state.allowed()
    assert first is not None
    assert second is not None
    before = second.copy()
    first[:] = 0
    assert np.array_equal(second, before)


def test_a_copy_goes_its_own_way() -> None:
    state = constraint(object_grammar())
    take(state, ids('{"a": "'))
    other = state.copy()
    take(other, ids('x", '))
    assert may(state) != may(other)
    take(state, ids('y", "b": 1'))
    take(other, ids('"b": 2'))


@pytest.mark.parametrize("begun", [True, False])
def test_thoughts_are_free_and_end(begun: bool) -> None:
    state = constraint(replace(object_grammar(), thinking=thinking(begun=begun)))
    if not begun:
        assert id_of(THINK) in may(state)
        state.take(id_of(THINK))
    assert state.endless
    assert state.allowed() is None
    take(state, ids('well {"a": <call>'))
    state.take(id_of(THOUGHT))
    assert not state.endless
    assert id_of(THINK) not in may(state)
    take(state, ids("\n\n" + OBJECT))
    assert state.complete


def test_an_answer_may_do_without_a_thought() -> None:
    state = constraint(replace(object_grammar(), thinking=thinking(begun=False)))
    take(state, ids(OBJECT))
    assert state.complete
    state = constraint(replace(object_grammar(), thinking=thinking(begun=False)))
    take(state, ids(OBJECT)[:1])
    assert id_of(THINK) not in may(state)


@pytest.mark.parametrize("grammar", [object_grammar(), Grammar(), call_grammar()])
@pytest.mark.parametrize("begun", [True, False])
def test_thoughts_have_a_budget(grammar: Grammar, begun: bool) -> None:
    state = constraint(replace(grammar, thinking=thinking(begun=begun, most=3)))
    if not begun:
        state.take(id_of(THINK))
    take(state, ids("abc")[:3])
    assert may(state) == {id_of(THOUGHT)}
    assert state.forced() == [id_of(THOUGHT)]
    assert state.admitted([id_of(THOUGHT)]) == 1
    assert state.admitted(ids("x")) == 0
    state.take(id_of(THOUGHT))
    assert len(may(state)) == (VOCAB if not grammar.text or grammar.triggers else len(may(state)))


def test_before_a_trigger_nothing_is_asked() -> None:
    state = constraint(call_grammar())
    for token in ids('I {"a" call'):
        assert state.allowed() is None
        assert state.forced() == []
        state.take(token)
    state.take(id_of(CALL))
    take(state, ids(OBJECT))
    assert may(state) == {id_of(CALLED)}
    state.take(id_of(CALLED))
    assert state.complete


def test_a_trigger_in_a_thought_is_none() -> None:
    state = constraint(replace(call_grammar(), thinking=thinking(begun=True)))
    take(state, [id_of(CALL), *ids("x"), id_of(THOUGHT)])
    assert state.allowed() is None
    state.take(id_of(CALL))
    assert state.allowed() is not None


@pytest.mark.parametrize("said", ["", "ab", "<", "<<ca", "a <call", "x\n"])
def test_a_trigger_in_letters(said: str) -> None:
    grammar = Grammar(text='start: after "{" /[a-z]+/ "}"\nafter[lazy]: /(?s:.*)<tool>/\n', triggers=[Symbol("<tool>")])
    state = constraint(grammar)
    for token in ids(said + "<tool>"):
        assert state.allowed() is None
        state.take(token)
    assert {spelled([token]) for token in may(state)} <= {"{"}
    take(state, ids("{abk}"))
    assert state.complete


def test_letters_behind_a_trigger_that_nobody_asked_about() -> None:
    """The token that completes a trigger was free: where it goes on as nothing that is meant, the answer stays free."""
    grammar = Grammar(text='start: after "z"\nafter[lazy]: /(?s:.*)xxa/\n', triggers=[Symbol("xxa")])
    state = constraint(grammar)
    take(state, ids("xx"))
    state.take(ids("ak")[0])
    assert spelled(ids("ak")[:1]) == "ak"
    assert state.allowed() is None
    state.take(ids("q")[0])


def test_drafts_are_cut_where_they_leave_the_grammar() -> None:
    grammar = replace(object_grammar(), thinking=thinking(begun=True))
    state = constraint(grammar)
    draft = [*ids("hm"), id_of(THOUGHT), *ids("\n" + OBJECT)]
    assert state.admitted(draft) == len(draft)
    assert state.admitted([*draft, *ids("x")]) == len(draft)
    wrong = [*draft[:-4], id_of(CALL), *draft[-4:]]
    assert state.admitted(wrong) == len(draft) - 4
    assert state.admitted(draft) == len(draft), "a walk leaves nothing behind"
    take(state, draft)
    assert state.complete


def test_forced_tokens_are_those_that_may_come() -> None:
    state = constraint(object_grammar())
    seen = 0
    chosen = random.Random(1)
    for _ in range(200):
        if state.complete:
            break
        forced = state.forced()
        assert state.admitted(forced) == len(forced)
        seen += len(forced)
        token = forced[0] if forced else chosen.choice(sorted(may(state) - {id_of(END)}))
        take(state, [token])
    assert seen > 5


def test_all_draws_fit() -> None:
    for seed in range(30):
        state, answer = constraint(object_grammar()), list[int]()
        chosen = random.Random(seed)
        while not state.complete:
            token = chosen.choice(sorted(may(state) - {id_of(END)}))
            state.take(token)
            answer.append(token)
        jsonschema.validate(json.loads(spelled(answer)), SCHEMA)


class Silent(Lexicon):
    """Follows nothing."""

    def __init__(self) -> None:
        self.size = VOCAB


class Stuck:
    """A matcher for which no token fits."""

    def is_error(self) -> bool:
        return False

    def get_error(self) -> str:
        return ""

    def compute_bitmask(self) -> bytes:
        return bytes(VOCAB // 8)

    def deep_copy(self) -> Stuck:
        return self


def test_where_no_token_fits_the_answer_is_stuck() -> None:
    state = Constraint(object_grammar(), Stuck(), Silent())  # type: ignore[arg-type]
    assert state.allowed() is None
    assert state.stuck
    with pytest.raises(DeadEnd, match="no token"):
        state.take(3)


def test_a_grammar_that_takes_too_much_is_stuck_and_says_so() -> None:
    """Limits of a step: what cannot be followed any further is no answer."""
    grammar = Grammar(text='start: ("a" | "b" | x)*\nx: /(a|b)*c(a|b){1,2000}c(a|b){1,2000}/\n')
    state = constraint(grammar)
    bits: Bits | None = None
    for token in ids("abab" * 40):
        bits = state.allowed()
        if bits is None:
            break
        state.take(token)
    assert (bits is None) == bool(state.stuck)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('start: "a" nobody', "nobody"),
        ("start: %json " + json.dumps({"type": "frob"}), "frob"),
        ("start: /a(?=b)/", "look-around"),
        ("start: %json " + json.dumps({"not": {}, "type": "string"}), 'Unimplemented keys: ["not"]'),
    ],
)
def test_what_is_no_grammar_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(GrammarError) as refused:
        check(text)
    assert said in str(refused.value)
    assert "start:" not in str(refused.value), "nobody's grammar is repeated"
    assert "\n" not in str(refused.value)[-1:]


@pytest.mark.parametrize("step", [99991, 1.001, 0, 1001])
def test_divisions_that_would_take_all_memory_are_refused(step: float) -> None:
    with pytest.raises(GrammarError, match="multipleOf"):
        check_schema({"type": "object", "properties": {"a": [{"multipleOf": step}]}})
    with pytest.raises(GrammarError, match="allOf"):
        check_schema({"allOf": [{"multipleOf": 7}, {"multipleOf": 11}]})
    for small in (2, 0.25, 100, 999):
        check_schema({"items": {"multipleOf": small}})


def test_line_ends_behind_a_thought_are_few_and_may_be_meant() -> None:
    state = constraint(replace(Grammar(text='start: "\\n" "a"\n'), thinking=thinking(begun=True)))
    state.take(id_of(THOUGHT))
    take(state, ids("\n"))
    assert spelled(sorted(may(state))) == "a"
    state = constraint(replace(object_grammar(), thinking=thinking(begun=True)))
    state.take(id_of(THOUGHT))
    take(state, ids("\n\n"))
    assert ids("\n")[0] not in may(state)


def test_what_is_left_out_is_named() -> None:
    schema = {"type": "object", "x-guidance": {"lenient": True}, "properties": {"a": {"not": {}}, "b": {"format": "x"}}}
    schema["properties"]["b"]["type"] = "string"  # type: ignore[index]
    assert sorted(check("start: %json " + json.dumps(schema))) == ["format x", "not"]


def test_a_tokenizer_that_reads_otherwise_is_refused() -> None:
    with pytest.raises(LexiconError, match="token"):
        Lexicon(_backend(), VOCAB, VOCAB, [id_of(END)], lambda token: b"other")
    with pytest.raises(LexiconError, match="ends"):
        Lexicon(_backend(), VOCAB, VOCAB, [], lambda token: b"")
    with pytest.raises(LexiconError, match="tokenizer"):
        Lexicon("{}", VOCAB, VOCAB, [id_of(END)], lambda token: b"")


def _backend() -> str:

    return str(backend().to_str())
