"""The draft model's proposals against mlx-lm running it on one sequence, whatever was taken, refused, or left out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from engine_driver import TIE, reference, upstream_math
from sampler_support import sampler
from tiny_models import CONTEXT, VOCAB, save
from tiny_tokenizers import byte_level_backend, write_folder

from millpond.kv.arena import Arena
from millpond.kv.slots import RING_SLACK, RingSpec
from millpond.model.lanes import SoloLane
from millpond.model.load import LoadedModel, kept_as, load
from millpond.model.upstream import new_cache
from millpond.speculate.draft import CATCH_UP, Draft
from millpond.speculate.vocabulary import vocabulary_differs
from millpond.types import GRID, Request, Salt, SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
LIMIT = 1 << 28
KINDS = ("llama", "gemma3_text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "llama on arrays", "gemma3_text on arrays"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LoadedModel:
    """On a CPU attention over slots is computed in C; with ``on arrays`` as on a GPU."""
    kind, _, arrays = request.param.partition(" ")
    loaded = load(folders[kind], 0, lambda _: None)
    return kept_as(loaded, replace(loaded.form, native=False)) if arrays else loaded


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> LoadedModel:
    return load(folders["llama"], 0, lambda _: None)


def logits_behind(network: nn.Module, tokens: Sequence[int], drafts: Sequence[int]) -> mx.array:
    """What mlx-lm, with its own caches and attention, makes of each place at which a draft was drawn: [len, V]."""
    with upstream_math():
        caches = new_cache(network)
        if len(tokens) > 1:
            network(mx.array([list(tokens[:-1])]), cache=caches)
        result = network(mx.array([[tokens[-1], *drafts[:-1]]]), cache=caches)[0].astype(mx.float32)
        mx.eval(result)
        return result


def assert_greedy(network: nn.Module, tokens: Sequence[int], drafts: Sequence[int]) -> None:
    """Each draft is the likeliest token behind those before it, or ties with it: greedy generation, token for token."""
    logits = logits_behind(network, tokens, drafts)
    gaps = logits.max(axis=-1) - mx.take_along_axis(logits, mx.array(drafts)[:, None], axis=-1)[:, 0]
    assert gaps.max().item() < TIE


def chosen_alone(network: nn.Module, params: SamplingParams, tokens: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """What a sampler of one row draws at those places."""
    alone, logits = sampler([params], VOCAB), logits_behind(network, tokens, drafts)
    picks = [alone(logits[i : i + 1], [len(tokens) + i]).tokens.item() for i in range(len(drafts))]
    return [int(token) for token in picks]  # type: ignore[arg-type]


def tokens_of(chooser: random.Random, count: int) -> list[int]:
    return [chooser.randrange(VOCAB) for _ in range(count)]


def begin(draft: Draft, name: str, tokens: Sequence[int], params: SamplingParams = GREEDY, salt: str = "") -> None:
    draft.begin(Request(id=name, tokens=list(tokens), params=params, cache_salt=Salt(salt)))


def read(draft: Draft, name: str, tokens: Sequence[int], most: int = 1000) -> int:
    """Read until it is ready; how many calls that took."""
    calls = 0
    while not draft.ready(name, tokens):
        assert draft.read(name, tokens, most)
        calls += 1
        assert calls < 100
    return calls


class Story:
    """Requests that come and go, each with its committed tokens; an engine that takes some drafts, as chance has it."""

    def __init__(self, model: LoadedModel, seed: int, params: Sequence[SamplingParams] = (GREEDY,)) -> None:
        self.draft = Draft(model, VOCAB, LIMIT, LIMIT)
        self.network = model.network
        self.chance = random.Random(seed)
        self.params = params
        self.committed: dict[str, list[int]] = {}
        self.asked_for: dict[str, SamplingParams] = {}
        self.came = 0
        self.checked = self.other = 0

    def join(self, length: int) -> None:
        name = f"r{self.came}"
        params = self.params[self.came % len(self.params)]
        self.came += 1
        self.committed[name], self.asked_for[name] = tokens_of(self.chance, length), params
        begin(self.draft, name, self.committed[name], params)
        read(self.draft, name, self.committed[name], self.chance.choice([40, 64, 200, 1000]))

    def leave(self) -> None:
        name = self.chance.choice(list(self.committed))
        self.draft.end(name)
        del self.committed[name]

    def step(self, wanted: dict[str, int]) -> None:
        """Propose, check, and commit: some of the drafts and then another token; for the others one of their own."""
        known = {
            name: tokens for name, tokens in self.committed.items() if name in wanted or self.chance.random() < 0.5
        }
        ready = {name for name in wanted if self.draft.ready(name, self.committed[name])}
        proposals = self.draft.propose(wanted, known)
        assert proposals.keys() == ready
        for name, drafts in proposals.items():
            assert len(drafts) == wanted[name]
            self.check(name, drafts)
        for name, tokens in self.committed.items():
            drafts = proposals.get(name, [])
            taken = self.chance.choice([len(drafts), self.chance.randint(0, len(drafts))])
            tokens += [*drafts[:taken], self.chance.randrange(VOCAB)]

    def check(self, name: str, drafts: list[int]) -> None:
        params, tokens = self.asked_for[name], self.committed[name]
        if params.greedy:
            assert_greedy(self.network, tokens, drafts)
            return
        expected = chosen_alone(self.network, params, tokens, drafts)
        self.checked += len(drafts)
        self.other += sum(one != other for one, other in zip(drafts, expected, strict=True))

    def wanted(self, share: float = 0.8) -> dict[str, int]:
        return {name: self.chance.randint(1, 6) for name in self.committed if self.chance.random() < share}


@pytest.mark.often("gemma3_text on arrays-3", "gemma3_text-3", "llama-8", "llama on arrays-1")
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_proposals_are_the_models_own_greedy_answer(model: LoadedModel, rows: int) -> None:
    """Ragged prompts, around the ends of windows and blocks; drafts taken and refused; rows that sit out."""
    story = Story(model, seed=rows)
    for length in (30, 1, 64, 65, 2, 150, 17, 23)[:rows]:
        story.join(length)
    for _ in range(12):
        story.step(story.wanted(1.0 if rows == 1 else 0.8))


@pytest.mark.often("gemma3_text on")
def test_requests_come_and_go_and_fall_behind(model: LoadedModel) -> None:
    """Those who leave are replaced by the last row; those far behind are read on; and everybody stays right."""
    story, fell_behind = Story(model, seed=5), 0
    for turn in range(30):
        if len(story.committed) < 5 and story.chance.random() < 0.4:
            story.join(story.chance.choice([1, 5, 40, 63, 64, 130, 200]))
        if story.committed and story.chance.random() < 0.15:
            story.leave()
        if story.committed and turn % 5 == 4:
            name = story.chance.choice(list(story.committed))
            story.committed[name] += tokens_of(story.chance, story.chance.choice([CATCH_UP, 20, 90]))
            fell_behind += not story.draft.ready(name, story.committed[name])
            if story.chance.random() < 0.5:  # with its last guesses still in its row
                read(story.draft, name, story.committed[name])
        story.step(story.wanted())
        for name, tokens in story.committed.items():
            if not story.draft.ready(name, tokens):
                read(story.draft, name, tokens, 64)
    assert fell_behind > 2


@pytest.mark.often("gemma3_text")
def test_sampled_proposals_are_what_one_row_alone_would_draw(model: LoadedModel) -> None:
    """With the parameters and the noise of that very position; penalties are left out."""
    kinds: list[dict[str, object]] = [
        {"temperature": 1.5},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 3.0, "top_k": 20, "presence_penalty": 2.0},
        {"temperature": 2.0, "min_p": 0.05, "logit_bias": {7: 5.0}},
        {"temperature": 0.0, "logit_bias": {9: 1.0}, "repetition_penalty": 1.3, "logprobs": 3},
    ]
    params = [SamplingParams(max_tokens=1, seed=seed, **kind) for seed, kind in enumerate(kinds)]  # type: ignore[arg-type]
    neutral = [
        SamplingParams(max_tokens=1, seed=seed, **{k: v for k, v in kind.items() if "penalty" not in k})  # type: ignore[arg-type]
        for seed, kind in enumerate(kinds)
    ]
    story = Story(model, seed=2, params=params)
    for length in (20, 70, 3, 33, 64):
        story.join(length)
    story.asked_for = dict(zip(story.committed, [*neutral[:4], replaced_bias(neutral[4])], strict=True))
    for _ in range(8):
        story.step(story.wanted())
    assert story.checked > 40
    assert story.other <= story.checked // 50, "the last bits of a logit may move a draw once in a long while"


def replaced_bias(params: SamplingParams) -> SamplingParams:
    """Greedy with a bias: compared as a sampled row whose temperature is next to nothing."""
    return SamplingParams(max_tokens=1, temperature=1e-6, seed=params.seed, logit_bias=params.logit_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_equal_to_its_target_is_always_right(folders: dict[str, Path], kind: str) -> None:
    model = load(folders[kind], 0, lambda _: None)
    prompt = tokens_of(random.Random(3), 50)
    answer = reference(model.network, prompt, 60)
    draft, tokens = Draft(model, VOCAB, LIMIT, 0), list(prompt)
    begin(draft, "x", tokens)
    read(draft, "x", tokens)
    while len(tokens) + 6 <= len(prompt) + len(answer):
        drafts = draft.propose({"x": 5}, {"x": tokens})["x"]
        done = len(tokens) - len(prompt)
        assert drafts == answer[done : done + 5]
        tokens += answer[done : done + 6]


@pytest.mark.often("gemma3_text")
def test_as_many_as_one_step_can_verify_and_the_same_again(model: LoadedModel) -> None:
    """Nothing was committed in between: the row goes back over all it was fed, and farther."""
    draft, tokens = Draft(model, VOCAB, LIMIT, 0), tokens_of(random.Random(4), 90)
    other = tokens_of(random.Random(5), 80)
    for name, its in (("x", tokens), ("y", other)):
        begin(draft, name, its)
        read(draft, name, its)
    for _ in range(3):
        other += tokens_of(random.Random(6), CATCH_UP)  # so that the row beside it is padded far
        proposals = draft.propose({"x": 31, "y": 1}, {"x": tokens, "y": other})
        assert_greedy(model.network, tokens, proposals["x"])
        assert_greedy(model.network, other, proposals["y"])
        assert len(proposals["x"]) == 31
        draft.propose({"y": 3}, {"y": other})


# --- prefixes ---------------------------------------------------------------------------------------------------


def test_restored_prefixes_give_the_same_proposals(model: LoadedModel) -> None:
    prompt = tokens_of(random.Random(7), 300)
    draft = Draft(model, VOCAB, LIMIT, LIMIT)
    calls, proposals = [], []
    for name, salt in (("a", ""), ("b", ""), ("c", "other")):
        begin(draft, name, prompt, GREEDY, salt)
        calls.append(read(draft, name, prompt, GRID))
        proposals.append(draft.propose({name: 6}, {name: prompt})[name])
        draft.end(name)
    assert calls == [5, 1, 5], "restored for the second, and not for another tenant"
    assert proposals[0] == proposals[1] == proposals[2]
    assert_greedy(model.network, prompt, proposals[1])
    assert 0 < draft.cached_bytes <= LIMIT


def test_the_next_turn_of_a_conversation_finds_the_answer(llama: LoadedModel) -> None:
    """Whatever wrong guesses the row was fed: only what was committed is kept."""
    story = Story(llama, seed=8)
    story.join(100)
    while len(story.committed["r0"]) < 300:
        story.step({"r0": 4})
    said = story.committed["r0"]
    story.draft.end("r0")
    following = [*said, *tokens_of(story.chance, 40)]
    begin(story.draft, "next", following)
    assert read(story.draft, "next", following, 2 * GRID) == 1
    assert_greedy(llama.network, following, story.draft.propose({"next": 5}, {"next": following})["next"])


def test_what_was_guessed_and_refused_is_not_kept(llama: LoadedModel) -> None:
    """The guesses reach into the next block, whose tokens then become others."""
    draft, tokens = Draft(llama, VOCAB, LIMIT, LIMIT), tokens_of(random.Random(12), 2 * GRID - 4)
    begin(draft, "x", tokens)
    read(draft, "x", tokens)
    guesses = draft.propose({"x": 8}, {"x": tokens})["x"]
    tokens += [(guess + 1) % VOCAB for guess in guesses]
    draft.end("x")
    begin(draft, "y", tokens)
    read(draft, "y", tokens)
    assert_greedy(llama.network, tokens, draft.propose({"y": 6}, {"y": tokens})["y"])


def test_a_cache_keeps_to_its_limit(llama: LoadedModel) -> None:
    limit = 300 * llama.sizes.token_bytes
    draft = Draft(llama, VOCAB, LIMIT, limit)
    for seed in range(4):
        prompt = tokens_of(random.Random(seed), 200)
        begin(draft, "x", prompt)
        read(draft, "x", prompt)
        draft.end("x")
        assert 0 < draft.cached_bytes <= limit


# --- limits and mishaps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=1, temperature=5.0, seed=1)])
@pytest.mark.parametrize("size", [VOCAB - 56, VOCAB + 44])
def test_proposals_are_in_the_served_models_vocabulary(llama: LoadedModel, size: int, params: SamplingParams) -> None:
    """Padded to another size: what only one of the two knows is never proposed, and does no harm when read."""
    draft, chance = Draft(llama, size, LIMIT, 0), random.Random(9)
    tokens = [chance.randrange(size) for _ in range(30)]
    begin(draft, "x", tokens, params)
    read(draft, "x", tokens)
    for _ in range(12):
        drafts = draft.propose({"x": 4}, {"x": tokens})["x"]
        assert all(0 <= token < min(size, VOCAB) for token in drafts)
        if params.greedy:
            seen = [min(token, VOCAB - 1) for token in tokens]
            logits = logits_behind(llama.network, seen, drafts)[:, :size]
            assert mx.argmax(logits, axis=-1).tolist() == drafts
        tokens += [drafts[0], size - 1]


def test_requests_beyond_the_models_context_get_no_proposals(llama: LoadedModel) -> None:
    draft, tokens = Draft(llama, VOCAB, LIMIT, 0), tokens_of(random.Random(1), CONTEXT - 3)
    begin(draft, "x", tokens)
    read(draft, "x", tokens)
    assert len(draft.propose({"x": 8}, {"x": tokens})["x"]) == 3
    tokens += [1, 2, 3]
    assert not draft.ready("x", tokens)
    assert draft.propose({"x": 8}, {"x": tokens}) == {}
    assert not draft.read("x", tokens, 100)
    draft.trim()
    assert draft.nbytes == 0


def test_memory_for_rows_is_limited(llama: LoadedModel) -> None:
    """What does not fit gets no proposals until others have left; what grows too long makes room."""
    limit = 2 * 256 * llama.sizes.token_bytes + 800 * llama.sizes.token_bytes
    draft, chance = Draft(llama, VOCAB, limit, 0), random.Random(1)
    prompts = {name: tokens_of(chance, 150) for name in "abcd"}
    fitting = []
    for name, tokens in prompts.items():
        begin(draft, name, tokens)
        if draft.read(name, tokens, 1000):
            fitting.append(name)
        assert draft.nbytes <= limit
    assert 0 < len(fitting) < len(prompts)
    assert draft.propose(dict.fromkeys(prompts, 3), prompts).keys() == set(fitting)
    prompts[fitting[0]] += tokens_of(chance, 15)
    draft.end(fitting.pop())
    assert draft.read("d", prompts["d"], 1000)
    grown = prompts["d"]
    while draft.ready("d", grown):
        proposals = draft.propose({"d": 1}, prompts)
        grown += [*proposals.get("d", []), 1]
        assert draft.nbytes <= limit
        assert len(grown) < CONTEXT
    assert all(draft.read(name, prompts[name], 1000) for name in fitting)


def test_a_row_that_overflows_is_left_alone(model: LoadedModel) -> None:
    """Its neighbour, and who gets its place, are not touched by it."""
    draft, chance = Draft(model, VOCAB, LIMIT, LIMIT), random.Random(2)
    prompts = {name: tokens_of(chance, 70) for name in "ab"}
    poisoned = next(token for token in range(VOCAB) if not any(token in tokens for tokens in prompts.values()))
    sound = model.network.model.embed_tokens
    try:
        model.network.model.embed_tokens = Poisoned(sound, poisoned)
        for name, tokens in prompts.items():
            begin(draft, name, tokens)
            read(draft, name, tokens)
        prompts["b"].append(poisoned)
        proposals = draft.propose({"a": 3, "b": 3}, prompts)
    finally:
        model.network.model.embed_tokens = sound
    assert proposals.keys() == {"a"}
    assert_greedy(model.network, prompts["a"], proposals["a"])
    assert not draft.read("b", prompts["b"], 1000)
    prompts["c"] = prompts["a"][:40]
    begin(draft, "c", prompts["c"])
    read(draft, "c", prompts["c"])
    again = draft.propose({"c": 4, "a": 2}, prompts)
    assert again.keys() == {"a", "c"}
    for name, drafts in again.items():
        assert_greedy(model.network, prompts[name], drafts)


class Poisoned(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Embeddings of which one is not finite."""

    def __init__(self, sound: nn.Embedding, token: int) -> None:
        super().__init__()
        self.sound = sound
        self.token = token

    def __call__(self, tokens: mx.array) -> mx.array:
        embedded: mx.array = self.sound(tokens)
        return mx.where((tokens == self.token)[..., None], mx.array(float("nan")), embedded)

    def as_linear(self, x: mx.array) -> mx.array:
        logits: mx.array = self.sound.as_linear(x)
        return logits


class Breaking(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """A model whose forwards over a batch fail from some call on."""

    def __init__(self, network: nn.Module, calls: int) -> None:
        super().__init__()
        self.network = network
        self.left = calls

    @property
    def layers(self) -> object:
        return self.network.layers

    def make_cache(self) -> object:
        return new_cache(self.network)

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        self.left -= 1
        logits: mx.array = self.network(tokens, cache=cache)
        if self.left == 0:
            raise RuntimeError("the device is gone")
        return logits


def test_usable_again_after_a_failure(model: LoadedModel) -> None:
    """In the middle of a step, with drafts fed and nothing read: all rows are gone, and are read again."""
    breaking = Breaking(model.network, 5)
    draft = Draft(replace(model, network=breaking), VOCAB, LIMIT, 0)
    prompts = {name: tokens_of(random.Random(ord(name)), 40) for name in "ab"}
    for name, tokens in prompts.items():
        begin(draft, name, tokens)
        read(draft, name, tokens)
    with pytest.raises(RuntimeError, match="gone"):
        draft.propose({"a": 6, "b": 6}, prompts)
    assert draft.nbytes == 0
    assert draft.propose({"a": 6, "b": 6}, prompts) == {}
    for name, tokens in prompts.items():
        read(draft, name, tokens)
    for name, drafts in draft.propose({"a": 6, "b": 6}, prompts).items():
        assert_greedy(model.network, prompts[name], drafts)
    for name in prompts:
        draft.end(name)
        draft.end(name)
    draft.trim()
    assert draft.nbytes == 0


def test_going_back_knows_its_limits() -> None:
    arena = Arena([RingSpec(1, 4, 4, mx.float32, window=8)])
    arena.put("a", (), 0)
    arena.advance([RING_SLACK + 1])
    with pytest.raises(ValueError, match="at most"):
        arena.rewind([RING_SLACK + 1])
    arena.rewind([RING_SLACK])
    with pytest.raises(ValueError, match="go back"):
        arena.rewind([2])
    assert list(arena.lengths) == [1]
    arena.begin(1)
    with pytest.raises(RuntimeError, match="under way"):
        arena.rewind([1])
    with pytest.raises(ValueError, match="solo"):
        SoloLane().rewind([1])


# --- vocabularies -----------------------------------------------------------------------------------------------


def test_vocabularies_are_compared_token_by_token(tmp_path: Path) -> None:
    same, more = byte_level_backend(), byte_level_backend()
    more.add_tokens(["<extra>"])
    folders = {name: write_folder(tmp_path / name, backend, {}, {}) for name, backend in (("a", same), ("b", more))}
    assert vocabulary_differs(folders["a"], write_folder(tmp_path / "c", byte_level_backend(), {}, {})) == ""
    size = same.get_vocab_size()
    sentence = vocabulary_differs(folders["a"], folders["b"])
    assert f"token {size} is missing in" in sentence
    assert f"'<extra>' in the model's of {size + 1}" in sentence
    renamed = tmp_path / "renamed"
    write_folder(renamed, same, {}, {})
    file = renamed / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_stop|>"))
    assert "token 2 is '<|im_stop|>' in the draft model's" in vocabulary_differs(renamed, folders["a"])
