"""Speculator ahead, from the user's settings and fields to the counts in answers; the engine's side is scripted.

The scripted engine guesses 4 tokens per step unless told otherwise, and all of them are right unless a request has a
prediction: then the guesses are the prediction's tokens at the same places. So every count is known in advance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from metrics_page import scrape

from millpond.http.prompts import prediction_tokens
from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server, StartServer

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
ANSWER = "user:hi;" * 20
"""What the scripted engine says to it."""
CHAT = {"messages": HELLO, "max_tokens": 9}
PLAIN = {"prompt": "abcdefgh", "max_tokens": 9}
DEFAULTS = {"mode": "auto", "tokens": 0, "adaptive": True}


@pytest.fixture(scope="module")
def guessing(start_server: StartServer) -> Iterator[Server]:
    """Guesses from the text itself by default, and has a draft model."""
    with start_server("spec=ngram+draft,slow=0") as server:
        yield server


@pytest.fixture
def ai(guessing: Server) -> Iterator[openai.OpenAI]:
    with guessing.client() as client:
        yield client


@pytest.fixture
def raw(guessing: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guessing.url, timeout=20, verify=False) as client:
        yield client


def details(usage: dict[str, Any]) -> tuple[int, int]:
    """Accepted and rejected; nothing is thought."""
    found = usage["completion_tokens_details"]
    assert found.keys() == {"accepted_prediction_tokens", "rejected_prediction_tokens", "reasoning_tokens"}
    assert found["reasoning_tokens"] == 0
    return found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]


def asked(url: str, path: str, **body: object) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=20, verify=False)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def told(url: str, **body: object) -> dict[str, Any]:
    """What the engine is told of guessing with a request."""
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": [908], **body}, timeout=20, verify=False)
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = json.loads(answer.json()["error"]["message"])
    return found


def streamed(url: str, path: str, **body: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks with choices, and the usage."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{url}/v1/{path}", json={**body, **more}, timeout=20, verify=False)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    return chunks, last["usage"]


# --- settings -----------------------------------------------------------------------------------------------------


def test_the_engine_is_told_every_setting(start_server: StartServer, byte_tokenizer: Path, tmp_path: Path) -> None:
    """(J1) Defaults, and spec, spec_tokens, spec_adaptive, spec_shared and draft_model, each changed."""

    def start(*flags: str) -> dict[str, Any]:
        with start_server("tell,spec=ngram", *flags) as server:
            [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
            found: dict[str, Any] = json.loads(model["millpond"]["device"])
            return found

    assert start() == {"default": DEFAULTS, "draft_path": "", "shared": False}
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    (draft / "model.safetensors").touch()
    flags = ("spec", "draft", "spec_tokens", "7", "spec_adaptive", "off", "spec_shared", "on", "draft_model")
    assert start(*flags, str(draft)) == {
        "default": {"mode": "draft", "tokens": 7, "adaptive": False},
        "draft_path": str(draft),
        "shared": True,
    }
    # A draft model for the requests that ask for it.
    assert start("spec", "off", "draft_model", str(draft)) == {
        "default": {**DEFAULTS, "mode": "off"},
        "draft_path": str(draft),
        "shared": False,
    }


def test_a_draft_model_that_is_not_there_is_said_at_start(start_server: StartServer) -> None:
    for name, said in (("no-such-model", "does not exist"), ("/tmp", "has no config.json")):
        with start_server("plain", "draft_model", name, ready=False) as server:
            assert server.process.wait(60) == 1
            line = server.wait_for_line("millpond serve:")
        assert line.startswith(f"millpond serve: --draft-model {name}: ")
        assert said in line


def test_the_servers_default_is_what_a_silent_request_gets(start_server: StartServer) -> None:
    """(J1) spec and spec_tokens, by how many tokens come in a step."""
    for flags, burst in (((), 5), (("spec_tokens", "2"), 3), (("spec", "off"), 1)):
        with start_server("spec=ngram,slow=0", *flags) as server:
            chunks, usage = streamed(server.url, "completions", prompt="abcdefgh", max_tokens=10)
            assert len(chunks[0]["choices"][0]["text"]) == burst
            assert details(usage) == {5: (8, 0), 3: (7, 0), 1: (0, 0)}[burst]
            assert told(server.url) == {"speculation": None, "prediction": [], "predicted": 0}


def test_a_request_overrides_part_of_the_default(start_server: StartServer) -> None:
    flags = ("spec_tokens", "6", "spec_adaptive", "off")
    with start_server("spec=ngram+draft", *flags) as server:

        def speculation(**speculative: object) -> object:
            return told(server.url, speculative=speculative)["speculation"]

        default = {"mode": "ngram", "tokens": 6, "adaptive": False}
        assert speculation(mode="draft") == {**default, "mode": "draft"}
        assert speculation(mode="off") == {**default, "mode": "off"}
        assert speculation(tokens=31) == {**default, "tokens": 31}
        assert speculation(adaptive=True, mode=None) == {**default, "adaptive": True}
        assert speculation() is None
        assert speculation(mode=None, tokens=None, adaptive=None) is None


# --- what is offered ------------------------------------------------------------------------------------------------


def test_the_models_route_says_what_is_offered(server: Server, guessing: Server) -> None:
    [model] = httpx.get(f"{guessing.url}/v1/models").json()["data"]
    assert (model["millpond"]["speculation"], model["millpond"]["speculation_reason"]) == (["ngram", "draft"], "")
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    reason = "its caches cannot take a guess back"
    assert (model["millpond"]["speculation"], model["millpond"]["speculation_reason"]) == ([], reason)


def test_a_draft_model_must_be_there_to_be_asked_for(start_server: StartServer) -> None:
    with start_server("spec=ngram") as server:
        for path, base in (("completions", PLAIN), ("chat/completions", CHAT), ("cache/explain", CHAT)):
            answer = httpx.post(f"{server.url}/v1/{path}", json={**base, "speculative": {"mode": "draft"}})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "speculative.mode")
            assert error["code"] == "unsupported_parameter"
            for said in ('"draft"', '"off" or "ngram"', "--draft-model"):
                assert said in error["message"]
        answer = httpx.post(f"{server.url}/v1/completions", json={**PLAIN, "speculative": {"mode": "mtp"}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "speculative.mode")
        for said in ('"mtp"', '"off" or "ngram"', "--spec auto or mtp"):
            assert said in answer.json()["error"]["message"]
        health = server.health()
    assert health["requests"]["submitted"] == 0


def test_a_model_that_cannot_guess_answers_plainly(server: Server) -> None:
    """Whether the server's default or the client asks for it; only a draft model cannot be asked for."""
    nothing = {"speculation": None, "prediction": [], "predicted": 0}
    assert told(server.url, prediction={"type": "content", "content": "x"}) == nothing
    off = {"mode": "off", "tokens": 3, "adaptive": True}
    assert told(server.url, speculative={"mode": "ngram", "tokens": 3})["speculation"] == off
    answer = asked(server.url, "completions", **PLAIN, speculative={"mode": "ngram"})
    assert (answer["choices"][0]["text"], details(answer["usage"])) == ("abcdefgha", (0, 0))
    refused = httpx.post(f"{server.url}/v1/completions", json={**PLAIN, "speculative": {"mode": "draft"}})
    assert refused.status_code == 400
    assert "its caches cannot take a guess back" in refused.json()["error"]["message"]


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "param", "said"),
    [
        ("speculative", "ngram", "speculative", '"ngram"'),
        ("speculative", [], "speculative", "an object with mode, tokens and adaptive"),
        ("speculative", True, "speculative", "true"),
        ("speculative", {"mode": "eagle"}, "speculative.mode", '"off", "ngram", "draft" or "mtp", got "eagle"'),
        ("speculative", {"mode": 1}, "speculative.mode", "got 1"),
        ("speculative", {"tokens": 0}, "speculative.tokens", "an integer from 1 to 31, got 0"),
        ("speculative", {"tokens": 32}, "speculative.tokens", "an integer from 1 to 31, got 32"),
        ("speculative", {"tokens": "4"}, "speculative.tokens", 'got "4"'),
        ("speculative", {"tokens": 4.0}, "speculative.tokens", "got 4.0"),
        ("speculative", {"tokens": True}, "speculative.tokens", "got true"),
        ("speculative", {"adaptive": 1}, "speculative.adaptive", "true or false, got 1"),
        ("speculative", {"mode": "off", "depth": 3}, "speculative.depth", "mode, tokens, adaptive, got 3"),
        ("prediction", "text", "prediction", '{"type": "content"'),
        ("prediction", [], "prediction", "got []"),
        ("prediction", {}, "prediction.type", 'is required and must be "content"'),
        ("prediction", {"type": "content"}, "prediction.content", "is required"),
        ("prediction", {"type": "content", "content": 5}, "prediction.content", "a list of text parts, got 5"),
        ("prediction", {"type": "content", "content": []}, "prediction.content", "got []"),
        ("prediction", {"type": "content", "content": ["a"]}, "prediction.content[0]", 'got "a"'),
        ("prediction", {"type": "content", "content": [{"type": "text"}]}, "prediction.content[0].text", "a string"),
        ("prediction", {"type": "image", "content": "x"}, "prediction.type", '"image" is not supported'),
        ("prediction", {"type": 3, "content": "x"}, "prediction.type", "got 3"),
    ],
)
@pytest.mark.parametrize(("path", "base"), [("chat/completions", CHAT), ("completions", PLAIN)])
def test_bad_values_are_named(
    raw: httpx.Client, path: str, base: dict[str, object], field: str, value: object, param: str, said: str
) -> None:
    answer = raw.post(f"/v1/{path}", json={**base, field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert said in error["message"]


def test_a_field_of_any_length_is_refused_in_one_line(raw: httpx.Client) -> None:
    answer = raw.post("/v1/completions", json={**PLAIN, "speculative": {"x" * 100_000: "y" * 100_000}})
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 400


def test_a_prediction_reaches_the_engine_as_tokens(guessing: Server, byte_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer)
    for content, text in (
        ("some text", "some text"),
        ([{"type": "text", "text": "some"}, {"type": "text", "text": " text"}], "some text"),
        ("", ""),
        ("x" * 5000, "x" * 512),
        ("é" * 5000, "é" * 256),
    ):
        found = told(guessing.url, prediction={"type": "content", "content": content})
        expected = tokenizer.encode(text)
        assert len(expected) <= 512  # the context
        assert (found["prediction"], found["predicted"]) == (expected[:16], len(expected))
    nothing = told(guessing.url, prediction={"type": "content", "content": "x"}, speculative={"mode": "off"})
    assert nothing["predicted"] == 0


def test_a_prediction_is_tokenised_without_what_a_prompt_begins_with() -> None:
    class Counting:
        """Puts 99 before every text that is a prompt."""

        def __init__(self) -> None:
            self.read = 0

        def text_tokens(self, text: str, *, parse_special: bool) -> list[int]:
            self.read += len(text)
            return [ord(character) for character in text]

    tokenizer = Counting()
    assert prediction_tokens("ab", tokenizer, 10) == [97, 98]  # type: ignore[arg-type]
    assert prediction_tokens("ab" * 10**6, tokenizer, 10) == [97, 98] * 5  # type: ignore[arg-type]
    assert tokenizer.read < 20_000


def test_a_prediction_may_come_with_everything(ai: openai.OpenAI) -> None:
    """OpenAI refuses it with most of these."""
    answer = ai.chat.completions.create(
        model="test-model",
        messages=HELLO,
        max_completion_tokens=8,
        n=2,
        logprobs=True,
        top_logprobs=2,
        presence_penalty=1,
        frequency_penalty=1,
        seed=3,
        tools=[],
        prediction={"type": "content", "content": "user:hi;"},
    )
    assert [choice.message.content for choice in answer.choices] == ["user:hi;"] * 2


# --- usage ----------------------------------------------------------------------------------------------------------


def test_the_official_client_reads_what_became_of_a_prediction(ai: openai.OpenAI) -> None:
    """The answer user:hi;user:hi against the prediction user:ho;user:hi, 4 guesses at a time, streamed or not."""
    prediction: Any = {"type": "content", "content": "user:ho;user:hi"}
    answer = ai.chat.completions.create(model="test-model", messages=HELLO, max_tokens=15, prediction=prediction)
    assert answer.choices[0].message.content == ANSWER[:15]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 15
    found = answer.usage.completion_tokens_details
    assert found is not None
    # Right guesses, and the token behind them: user + : (4 of 4), h + i (1 of 4), ;use + r (4 of 4), :hi (3 of 3).
    assert (found.accepted_prediction_tokens, found.rejected_prediction_tokens) == (4 + 1 + 4 + 3, 3)
    chunks = list(
        ai.chat.completions.create(
            model="test-model",
            messages=HELLO,
            max_tokens=15,
            prediction=prediction,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [text for chunk in chunks[:-1] if (text := chunk.choices[0].delta.content)]
    assert texts == ["user:", "hi", ";user", ":hi"]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.accepted_prediction_tokens == 12
    assert usage.completion_tokens_details.rejected_prediction_tokens == 3


@pytest.mark.parametrize(("path", "base"), [("chat/completions", {"messages": HELLO}), ("completions", PLAIN)])
@pytest.mark.parametrize("most", [1, 2, 4, 5, 6, 9, 10, 11, 23])
def test_bursts_are_counted_exactly(guessing: Server, path: str, base: dict[str, object], most: int) -> None:
    """Of 5 tokens in a step the first 4 were guessed, and ``max_tokens`` cuts the last step's."""
    accepted = most // 5 * 4 + most % 5
    body = {**base, "max_tokens": most}
    for usage in (asked(guessing.url, path, **body)["usage"], streamed(guessing.url, path, **body)[1]):
        assert usage["completion_tokens"] == most
        assert details(usage) == (accepted, 0)


def test_nothing_guessed_is_said_too(server: Server, guessing: Server) -> None:
    """Without guesses (mode off, or a model that cannot) the counts are there, and 0."""
    for url, more in ((server.url, {}), (guessing.url, {"speculative": {"mode": "off"}})):
        for path, base in (("chat/completions", CHAT), ("completions", PLAIN)):
            assert details(asked(url, path, **base, **more)["usage"]) == (0, 0)
            chunks, usage = streamed(url, path, **base, **more)
            assert details(usage) == (0, 0)
            assert len(chunks) >= 9


STOPS = [
    # The text is abcdefghabcdefgh… in steps abcde fghab cdefg; e, b and g are no guesses.
    ("c", 2, 2),  # in the middle of the first burst: a and b are left
    ("a", 0, 0),
    ("e", 4, 4),  # where the burst's last token begins
    ("f", 5, 4),
    ("h", 7, 6),  # in the second burst
    ("ef", 4, 4),  # over two bursts: what the first held back is cut, too
    ("defgh", 3, 3),
    ("habc", 7, 6),
    (["zzz", "gha"], 6, 5),
    ("fghabcde", 5, 4),  # over three
    ("bcdefghab", 1, 1),
    ("cdefX", 23, 19),  # always held back, never found
]


@pytest.mark.parametrize(("stop", "tokens", "accepted"), STOPS)
@pytest.mark.parametrize("more", [{}, {"logprobs": 1}])
def test_a_stop_string_cuts_inside_of_a_burst(
    guessing: Server, stop: object, tokens: int, accepted: int, more: dict[str, object]
) -> None:
    """(H4) Guesses behind the cut are no part of the answer, and neither are their log-probabilities."""
    body = {"prompt": "abcdefgh", "max_tokens": 23, "stop": stop, **more}
    whole = asked(guessing.url, "completions", **body)
    text = ("abcdefgh" * 3)[:tokens]
    assert whole["choices"][0]["text"] == text
    assert whole["choices"][0]["finish_reason"] == ("length" if tokens == 23 else "stop")
    chunks, usage = streamed(guessing.url, "completions", **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    for used in (whole["usage"], usage):
        assert used["completion_tokens"] == tokens
        assert details(used) == (accepted, 0)
    if more:
        pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert whole["choices"][0]["logprobs"]["tokens"] == list(text)
        assert [token for piece in pieces for token in piece["tokens"]] == list(text)


def test_several_answers_add_up(guessing: Server) -> None:
    """5 tokens of 4 guesses each, twice; over two prompts, cut by a stop string."""
    body: dict[str, object] = {"messages": HELLO, "max_tokens": 7, "n": 2}
    for usage in (
        asked(guessing.url, "chat/completions", **body)["usage"],
        streamed(guessing.url, "chat/completions", **body)[1],
    ):
        assert (usage["completion_tokens"], details(usage)) == (14, (12, 0))
    body = {"prompt": ["abcdefgh", "ghabcdef"], "max_tokens": 10, "n": 2, "stop": "h"}
    for usage in (
        asked(guessing.url, "completions", **body)["usage"],
        streamed(guessing.url, "completions", **body)[1],
    ):
        assert (usage["completion_tokens"], details(usage)) == (2 * 7 + 2 * 1, (2 * 6 + 2 * 1, 0))


def test_log_probabilities_keep_to_their_tokens(guessing: Server) -> None:
    """One entry per token of a burst, in order, also where bytes of one character come in two bursts."""
    body: dict[str, object] = {"messages": HELLO, "max_tokens": 13, "logprobs": True, "top_logprobs": 2}
    whole = asked(guessing.url, "chat/completions", **body)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == list(ANSWER[:13])
    chunks, usage = streamed(guessing.url, "chat/completions", **body)
    assert details(usage) == details(whole["usage"]) == (11, 0)
    for chunk in chunks:
        choice = chunk["choices"][0]
        if text := choice["delta"].get("content"):
            assert [entry["token"] for entry in choice["logprobs"]["content"]] == list(text)
            assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
    found = asked(guessing.url, "completions", prompt="abcdé", max_tokens=12, logprobs=1)["choices"][0]
    assert found["text"] == "abcdé" * 2
    assert len(found["logprobs"]["tokens"]) == len(found["logprobs"]["text_offset"]) == 12


def test_a_guessed_end_is_no_token_of_the_answer(guessing: Server) -> None:
    """The engine guessed that the answer ends there: nothing is added."""
    answer = asked(guessing.url, "completions", prompt=[64, 65, 66, 901], max_tokens=9)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (answer["usage"]["completion_tokens"], details(answer["usage"])) == (3, (3, 0))


def test_depth_is_as_asked(guessing: Server) -> None:
    for tokens in (1, 3, 31):
        speculative = {"mode": "draft", "tokens": tokens}
        chunks, usage = streamed(guessing.url, "completions", prompt="abc", max_tokens=40, speculative=speculative)
        assert len(chunks[0]["choices"][0]["text"]) == tokens + 1
        whole, rest = divmod(40, tokens + 1)
        assert details(usage) == (whole * tokens + rest, 0)


# --- what else counts -------------------------------------------------------------------------------------------------


def test_the_log_line_has_the_counts(start_server: StartServer) -> None:
    with start_server("spec=ngram,slow=0", "log_format", "json", ready=False) as server:
        url = json.loads(server.wait_for_line('"message": "listening"'))["url"]
        server.wait_for_line('"message": "ready"')
        prediction = {"type": "content", "content": "user:ho;user:hi"}
        asked(url, "chat/completions", messages=HELLO, max_tokens=15, prediction=prediction)
        line = json.loads(server.wait_for_line('"completion_tokens"'))
    assert (line["completion_tokens"], line["accepted_draft_tokens"], line["rejected_draft_tokens"]) == (15, 12, 3)
    assert not [said for said in server.lines if "user:ho" in said]


def test_a_bursts_tokens_are_one_pause(start_server: StartServer) -> None:
    """All tokens are counted; what is timed between tokens is the time between steps, as docs/metrics.md says."""
    with start_server("spec=ngram,slow=0") as server:
        asked(server.url, "completions", prompt="abc", max_tokens=20)
        page = scrape(server.url)
    assert page.value("vllm:generation_tokens_total") == 20
    assert page.value("vllm:inter_token_latency_seconds_count") == 3
    assert page.value("vllm:request_generation_tokens_sum") == 20
