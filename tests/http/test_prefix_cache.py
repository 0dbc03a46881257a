"""The prefix cache as users see it: real servers, real disks, real signals, the official client, the demo model."""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest
from prefix_client import (
    MODEL,
    Answer,
    blocks_of,
    chat,
    client_of,
    complete,
    explain,
    figures,
    logged,
    records,
    settled,
    ssd,
    story,
    streamed,
    until_ssd,
    wait_until,
)

from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from conftest import Launch, Server

pytestmark = pytest.mark.models

BLOCK = 64
FRANCE = "What is the capital of France?"


def command(folder: Path, *flags: str) -> list[str]:
    return ["serve", str(folder), "--port", "0", "--model-name", MODEL, *flags]


def on_disk(cache: Path, *flags: str) -> list[str]:
    """Flags for a server that caches in a folder, however full the machine's disk is."""
    return ["--cache-dir", str(cache), "--cache-ssd", "2GB", "--ssd-min-free", "0", *flags]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two prompts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def tokenizer(demo_or_thin: Path) -> Tokenizer:
    return Tokenizer.load(demo_or_thin)


@pytest.fixture(scope="module")
def plain(demo_or_thin: Path, millpond: Launch) -> Iterator[Server]:
    """A server that caches in memory only. Tests that share it keep apart by their salts."""
    with millpond(command(demo_or_thin)) as server:
        yield server


# --- what is told ------------------------------------------------------------------------------------------------


def test_the_second_identical_request_computes_one_token(plain: Server) -> None:
    """(E3, K3) Usage, header and log line agree, and the answer is the same, streamed or not."""
    prompt = story("Ship", 14)
    first = complete(plain, prompt, "twice", max_tokens=12)
    assert (first.cached, first.known) == (0, 0)
    again = complete(plain, prompt, "twice", max_tokens=12)
    stream = streamed(plain, prompt, "twice", max_tokens=12)
    for answer in (again, stream):
        assert answer.text == first.text
        assert answer.prompt_tokens == first.prompt_tokens
        assert (answer.cached, answer.disk, answer.end) == (first.prompt_tokens - 1, 0, "prompt")
    for answer in (first, again, stream):
        line = logged(plain, answer)
        assert int(line["prompt_tokens"]) == answer.prompt_tokens
        assert int(line["cached_tokens"]) == answer.cached
        assert int(line["cached_disk"]) == answer.disk
        assert int(line["known_tokens"]) == answer.known
        assert line["cache_end"] == answer.end


def test_the_counters_are_what_the_answers_said(plain: Server) -> None:
    """(E3) Every prompt token is either counted as restored or as computed."""
    before = figures(plain)
    answers = [complete(plain, story("Barge", count), "counted") for count in (6, 9, 9, 4)]
    after = figures(plain)
    assert after["memory_tokens"] - before["memory_tokens"] == sum(answer.cached for answer in answers)
    computed = sum(answer.prompt_tokens - answer.cached for answer in answers)
    assert after["computed_tokens"] - before["computed_tokens"] == computed
    assert after["hits"] - before["hits"] == 3
    assert after["misses"] - before["misses"] == 1
    assert answers[1].cached >= answers[0].prompt_tokens - 1
    assert answers[3].cached == answers[3].prompt_tokens - 1, "a shorter prompt is a part of a longer one"


def test_another_question_shares_what_the_template_puts_first(plain: Server, tokenizer: Tokenizer) -> None:
    """(E3) A different first question restores exactly the tokens that both prompts begin with."""
    questions = [user(FRANCE)], [user("Name three colours.")]
    first, second = (chat(plain, question, "template") for question in questions)
    one, other = (tokenizer.chat_prompt(question).tokens for question in questions)
    assert first.cached == 0
    assert 0 < second.cached == second.known == common(one, other)
    assert second.end == "differs"


@pytest.mark.slow  # only a model that has learnt to writes texts that become the tokens that it drew
@pytest.mark.parametrize("demo_or_thin", ["demo"], indirect=True)
@pytest.mark.parametrize("length", [6, 60])
def test_the_next_turn_computes_only_what_is_new(plain: Server, tokenizer: Tokenizer, length: int) -> None:
    """(E2) History and answer are restored whole: all tokens of the first prompt and of the answer but its last.

    An answer cut short (6 tokens) never had its last token read, as nothing came after it. One that the model ended (60
    tokens are plenty) was read whole, the end of turn perhaps included.
    """
    history = [user(f"{FRANCE} Answer with one short sentence, please.")]
    first = chat(plain, history, f"turns {length}", max_tokens=length)
    cut_short = first.completion_tokens == length
    assert cut_short == (length == 6)
    turn = [*history, {"role": "assistant", "content": first.text}, user("And of Spain?")]
    second = chat(plain, turn, f"turns {length}", max_tokens=length)
    read = first.prompt_tokens + first.completion_tokens - cut_short
    # The template repeats history and answer token by token, so it costs nothing.
    rendered = tokenizer.chat_prompt(turn).tokens
    assert tokenizer.decode(rendered[: read + cut_short]).endswith(first.text)
    assert read <= second.cached <= read + (not cut_short)
    assert second.prompt_tokens == len(rendered)


def test_hits_and_misses_answer_alike(plain: Server) -> None:
    """(E3) Greedy or seeded, a restored prompt is answered like a computed one; n answers share one prompt."""
    prompt = story("Ferry", 9)
    options = {"max_tokens": 10, "n": 3, "temperature": 0.8, "seed": 11}
    before = figures(plain)
    sampled = complete(plain, prompt, "alike", **options)
    after = figures(plain)
    # One whose request reached the engine after the others' prompt was read computes the rest of its last block again.
    tail = (sampled.prompt_tokens - 1) % BLOCK
    more = after["computed_tokens"] - before["computed_tokens"] - (sampled.prompt_tokens + 2)
    assert more in (0, tail, 2 * tail)
    assert sampled.cached == 0
    assert len(set(sampled.texts)) > 1
    again = complete(plain, prompt, "alike", **options)
    assert again.texts == sampled.texts
    assert again.cached == sampled.prompt_tokens - 1
    hit, miss = complete(plain, prompt, "alike", max_tokens=24), complete(plain, prompt, "unlike", max_tokens=24)
    assert (hit.cached > 0, miss.cached) == (True, 0)
    assert hit.text == miss.text


def test_salts_keep_tenants_apart(plain: Server) -> None:
    """(E1) Prefixes are shared within a salt, and with nobody else; no salt is one more tenant."""
    prompt = story("Canoe", 6)
    size = complete(plain, prompt, "tenant one").prompt_tokens
    assert complete(plain, prompt, "tenant two").cached == 0
    assert complete(plain, prompt).cached == 0
    for salt in ("tenant one", "tenant two", ""):
        assert complete(plain, prompt, salt).cached == size - 1


def test_a_shared_beginning_is_computed_and_stored_once(plain: Server, tokenizer: Tokenizer) -> None:
    """(E2) Four requests at once with one long system prompt."""
    system = {"role": "system", "content": story("Pilot", 33)}
    questions = [[system, user(text)] for text in ("Hi", "Who are you?", "What is 2+2?", "Sing a song, please.")]
    prompts = [tokenizer.chat_prompt(question).tokens for question in questions]
    shared = min(common(prompts[0], prompt) for prompt in prompts[1:])
    assert shared > 400
    per_token = httpx.get(f"{plain.url}/v1/models").json()["data"][0]["millpond"]["kv_bytes_per_token"]
    before = figures(plain)
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: chat(plain, question, "crowd"), questions))
    after = figures(plain)
    computed = after["computed_tokens"] - before["computed_tokens"]
    assert computed == sum(answer.prompt_tokens - answer.cached for answer in answers)
    # Whole blocks of the beginning are computed once; of the block in which the prompts part, everybody may compute his
    # own.
    assert computed <= shared + sum(len(prompt) - shared // BLOCK * BLOCK for prompt in prompts)
    assert after["misses"] - before["misses"] == 1
    stored = after["ram_bytes"] - before["ram_bytes"]
    # At most two blocks each beyond the shared ones, for the rest of the prompt and the answer.
    assert stored <= (shared + len(prompts) * 2 * BLOCK) * (per_token + 1024)


def test_a_disconnect_keeps_what_was_computed(plain: Server, tokenizer: Tokenizer) -> None:
    """(E2, L) Whoever gives up in the middle of a long prompt leaves its finished blocks behind."""
    prompt = tokenizer.encode(story("Tanker", 260))
    assert len(prompt) > 3000
    before = settled(plain)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "stream": True, "cache_salt": "gone"}
    connection = http.client.HTTPConnection(plain.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    blocks = before["prefix_cache"]["ram_blocks"]
    wait_until(plain, lambda health: health["prefix_cache"]["ram_blocks"] >= blocks + 2)
    connection.close()
    wait_until(plain, lambda health: health["requests"]["cancelled"] == before["requests"]["cancelled"] + 1)
    settled(plain)
    [entry] = explain(plain, prompt=prompt, cache_salt="gone", max_tokens=4)
    kept = int(str(entry["memory_tokens"]))
    assert 2 * BLOCK <= kept < len(prompt) - 1
    assert kept % BLOCK == 0
    resumed = complete(plain, prompt[: kept + 20], "gone")
    assert (resumed.cached, resumed.end) == (kept, "differs")
    shorter = prompt[: 2 * BLOCK + 20]
    assert complete(plain, shorter, "gone").text == complete(plain, shorter, "came back").text


# --- asking without running --------------------------------------------------------------------------------------


def test_explain_runs_nothing_and_is_the_truth(plain: Server) -> None:
    """(E3) What is announced for chats and completions is what the request then gets."""
    prompt, messages = story("Kayak", 8), [user(story("Raft", 8))]
    complete(plain, prompt, "asked")
    chat(plain, messages, "asked")
    before = settled(plain)
    longer = prompt + " Then it sank."
    known, unknown, part = explain(plain, prompt=[prompt, "Nobody knows this.", longer], cache_salt="asked")
    [turn] = explain(plain, messages=messages, cache_salt="asked")
    [elsewhere] = explain(plain, messages=messages, cache_salt="asked elsewhere")
    after = settled(plain)
    assert after["engine"]["step"] == before["engine"]["step"]
    assert after["requests"]["submitted"] == before["requests"]["submitted"]
    assert after["prefix_cache"] == before["prefix_cache"]
    for entry in (known, turn):
        size = int(str(entry["prompt_tokens"]))
        assert entry == {
            "prompt_tokens": size,
            "cached_tokens": size - 1,
            "memory_tokens": size - 1,
            "disk_tokens": 0,
            "known_tokens": size - 1,
            "end": "prompt",
            "at": "",
        }
    assert (unknown["cached_tokens"], unknown["end"]) == (0, "differs")
    assert (elsewhere["cached_tokens"], elsewhere["known_tokens"]) == (0, 0)
    answer = complete(plain, longer, "asked")
    assert (answer.prompt_tokens, answer.memory, answer.disk, answer.known, answer.end) == tuple(
        part[name] for name in ("prompt_tokens", "memory_tokens", "disk_tokens", "known_tokens", "end")
    )


def test_what_a_client_changed_is_named(plain: Server) -> None:
    """(M7) In the header, in the log and by those who ask before."""
    messages = [user(f"Say a word about number {number}.") for number in range(4)]
    chat(plain, messages, "changed")
    messages[2] = user("Forget that one.")
    [entry] = explain(plain, messages=messages, cache_salt="changed")
    assert (entry["end"], entry["at"]) == ("differs", "messages[2]")
    answer = chat(plain, messages, "changed")
    assert (answer.known, answer.end, answer.at) == (entry["known_tokens"], "differs", "messages[2]")
    assert logged(plain, answer)["differs"] == "messages[2]"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [10**9]}, 400, "prompt"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"prompt": "a", "cache_salt": 5}, 400, "cache_salt"),
        ({"prompt": "a", "cache_salt": "s" * 257}, 400, "cache_salt"),
        ({"prompt": "a", "max_tokens": 10**6}, 400, "max_tokens"),
        ({"prompt": "word " * 9000, "max_tokens": 1}, 400, "prompt"),
        ({"prompt": "a", "n": 0}, 400, "n"),
        ({"prompt": "a", "model": "another"}, 404, "model"),
    ],
)
def test_explain_refuses_what_generation_refuses(
    plain: Server, body: dict[str, object], status: int, param: str
) -> None:
    """(E3, J2) In the API's error shape, naming the field."""
    response = httpx.post(f"{plain.url}/v1/cache/explain", json=body, verify=False)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(f"{param}: ")
    assert error["code"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff", b""])
def test_explain_refuses_what_is_no_object(plain: Server, content: bytes) -> None:
    """(L) Bad JSON."""
    response = httpx.post(f"{plain.url}/v1/cache/explain", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_explaining_takes_places_like_answering(plain: Server) -> None:
    """(B9) Nobody can have more prompts explained at once than could wait for answers; who leaves is forgotten."""
    answer = httpx.post(f"{plain.url}/v1/cache/explain", json={"prompt": ["a"] * 5000}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    connection = http.client.HTTPConnection(plain.url.removeprefix("http://"))
    body = json.dumps({"prompt": ["a " * 50] * 500})
    connection.request("POST", "/v1/cache/explain", body, {"content-type": "application/json"})
    connection.close()
    assert settled(plain)["requests"]["held"] == 0


def test_a_null_field_is_an_absent_one(plain: Server) -> None:
    """(B1) Also for the field that tells a chat from a plain completion."""
    assert explain(plain, messages=None, prompt="a")[0]["prompt_tokens"] == 1


def test_models_say_what_is_cached(plain: Server) -> None:
    """(E7) The kinds of records, and no reason against it."""
    shown = client_of(plain).models.retrieve(MODEL).model_dump()["millpond"]
    assert (shown["prefix_cache"], shown["prefix_cache_reason"]) == ("kv", "")


def test_no_cache_says_so(demo_or_thin: Path, millpond: Launch) -> None:
    """(J1, E6) --cache-ram 0 turns it off everywhere; while the model loads, nothing is explained."""
    with millpond(command(demo_or_thin, "--cache-ram", "0"), ready=False) as server:
        early = httpx.post(f"{server.url}/v1/cache/explain", json={"prompt": "a"})
        assert early.status_code == 503
        assert int(early.headers["retry-after"]) > 0
        assert "loading" in early.json()["error"]["message"] or "starting" in early.json()["error"]["message"]
        server.wait_for_line("ready api=")
        shown = httpx.get(f"{server.url}/v1/models/{MODEL}").json()["millpond"]
        assert shown["prefix_cache"] == ""
        assert "cache_ram" in shown["prefix_cache_reason"]
        prompt = story("Yacht", 3)
        first, second = complete(server, prompt), complete(server, prompt)
        assert first.text == second.text
        assert {(answer.cached, answer.known, answer.end) for answer in (first, second)} == {(0, 0, "off")}
        assert explain(server, prompt=prompt)[0]["end"] == "off"
        assert figures(server)["ram_bytes"] == 0
        # Several answers of one prompt still work where nothing can be shared.
        assert set(complete(server, prompt, n=3).texts) == {first.text}


# --- the disk ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a server with one policy did before it ended, and what it was asked."""

    once: Answer
    twice: Answer
    writes_of_first: int
    writes_at_end: int
    unsaved: int


def ask_once_and_twice(server: Server, one: str, other: str) -> Written:
    """One prompt once, another twice."""
    once = complete(server, story(one, 8))
    first = ssd(server)["writes"]
    twice = complete(server, story(other, 8))
    again = complete(server, story(other, 8))
    assert (again.cached, again.text) == (again.prompt_tokens - 1, twice.text)
    return Written(once, twice, first, 0, 0)


def check_from_disk(answer: Answer, was: Answer) -> None:
    """All of a prompt but its last token came from disk. One block may be in memory: a start reads one to time it."""
    assert (answer.cached, answer.known, answer.end) == (was.prompt_tokens - 1, was.prompt_tokens - 1, "prompt")
    assert answer.memory in (0, BLOCK)
    assert answer.text == was.text


def until_writes(server: Server, count: int) -> int:
    return until_ssd(server, lambda disk: disk["writes"] >= count)["writes"]


def kill(server: Server) -> None:
    """kill -9 of both processes, the front end first: nothing is flushed."""
    engine = server.engine_pid()
    server.process.kill()
    os.kill(engine, signal.SIGKILL)
    server.process.wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def all_killed(demo_or_thin: Path, millpond: Launch, cache: Path) -> Written:
    with millpond(command(demo_or_thin, *on_disk(cache, "--ssd-policy", "all"))) as server:
        seen = ask_once_and_twice(server, "Alpha", "Beta")
        writes = until_writes(server, blocks_of(seen.once) + blocks_of(seen.twice))
        kill(server)
    return Written(seen.once, seen.twice, seen.writes_of_first, writes, 0)


@pytest.fixture(scope="module")
def second_use_killed(demo_or_thin: Path, millpond: Launch, cache: Path) -> Written:
    with millpond(command(demo_or_thin, *on_disk(cache, "--ssd-policy", "second-use"))) as server:
        seen = ask_once_and_twice(server, "Gamma", "Delta")
        writes = until_writes(server, -(-seen.twice.prompt_tokens // BLOCK))
        kill(server)
    return Written(seen.once, seen.twice, seen.writes_of_first, writes, 0)


@pytest.fixture(scope="module")
def evicted_stopped(demo_or_thin: Path, millpond: Launch, cache: Path) -> Written:
    """Memory for two of the three prompts."""
    flags = on_disk(cache, "--ssd-policy", "evicted", "--cache-ram", "13MB")
    with millpond(command(demo_or_thin, *flags)) as server:
        once = complete(server, story("Omega", 8))
        first = ssd(server)["writes"]
        for name in ("Sigma", "Lambda"):
            twice = complete(server, story(name, 8))
        held = figures(server)
        written = until_ssd(server, lambda disk: disk["writes"] > 0)
        assert held["evicted"] > 0
        assert server.stop() == 0
    return Written(once, twice, first, written["writes"], held["unsaved"])


@pytest.fixture(scope="module")
def reader(
    demo_or_thin: Path,
    millpond: Launch,
    cache: Path,
    all_killed: Written,
    second_use_killed: Written,
    evicted_stopped: Written,
) -> Iterator[Server]:
    """A server that may only read, on what the others left."""
    with millpond(command(demo_or_thin, *on_disk(cache, "--ssd-policy", "off"))) as server:
        yield server


def test_policy_all_survives_kill_9(reader: Server, all_killed: Written) -> None:
    """(F1) Every block is written as soon as it is full, the tail when its request ends: no stop is needed."""
    for topic, was in (("Alpha", all_killed.once), ("Beta", all_killed.twice)):
        check_from_disk(complete(reader, story(topic, 8)), was)


def test_policy_second_use_survives_kill_9_for_what_was_used_twice(reader: Server, second_use_killed: Written) -> None:
    """(F1) Nothing is written of what one request used; after the second it is on disk."""
    assert second_use_killed.writes_of_first == 0
    check_from_disk(complete(reader, story("Delta", 8)), second_use_killed.twice)
    once = complete(reader, story("Gamma", 8))
    assert once.cached == 0
    assert once.text == second_use_killed.once.text


def test_policy_evicted_keeps_everything_at_an_orderly_stop(reader: Server, evicted_stopped: Written) -> None:
    """(F1, F7) Written before it leaves memory; at a stop, with all those writes pending, everything else."""
    assert evicted_stopped.writes_of_first == 0
    assert evicted_stopped.unsaved == 0
    for topic, was in (("Omega", evicted_stopped.once), ("Lambda", evicted_stopped.twice)):
        check_from_disk(complete(reader, story(topic, 8)), was)


def test_policy_off_reads_and_changes_nothing(reader: Server, cache: Path) -> None:
    """(F1) Not even after a second use."""
    before = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in records(cache)}
    for _ in range(2):
        complete(reader, story("Nothing", 7))
    assert complete(reader, story("Alpha", 8)).cached > 0
    counted = ssd(reader)
    assert (counted["writes"], counted["writing"], counted["damaged"], counted["missing"]) == (0, 0, 0, 0)
    assert {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in records(cache)} == before


@pytest.mark.slow
@pytest.mark.parametrize("demo_or_thin", ["demo"], indirect=True)  # as above
def test_conversations_outlive_their_servers(demo_or_thin: Path, millpond: Launch, tmp_path: Path) -> None:
    """(A2, F1, F6, L) second-use saves live conversations at a stop, with all writes pending, although used once.

    After SIGTERM the exit code is 0 and the next server goes on from disk. After kill -9 of the front end alone, the
    engine does not outlive it, and what was on disk is.
    """
    messages = [user(story("Harbour", 10))]
    with millpond(command(demo_or_thin, *on_disk(tmp_path))) as server:
        first = chat(server, messages)
        assert ssd(server)["writes"] == 0
        assert server.stop() == 0
    saved = records(tmp_path)
    assert len(saved) >= blocks_of(first)
    with millpond(command(demo_or_thin, *on_disk(tmp_path))) as server:
        turn = [*messages, {"role": "assistant", "content": first.text}, user(story("Lighthouse", 6))]
        second = chat(server, turn)
        assert second.cached >= first.prompt_tokens + first.completion_tokens - 1
        assert second.memory in (0, BLOCK)
        engine = os.pidfd_open(server.engine_pid())
        server.process.kill()
        server.process.wait()
        ended = select.select([engine], [], [], 60)[0]
        os.close(engine)
        assert ended, "the engine outlives its front end"
    assert records(tmp_path) >= saved
    with millpond(command(demo_or_thin, *on_disk(tmp_path))) as server:
        assert chat(server, turn).disk == second.disk


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shaky_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shaky")


@pytest.fixture(scope="module")
def shaky(demo_or_thin: Path, millpond: Launch, shaky_cache: Path) -> Iterator[Server]:
    """Writes everything at once, and has memory for four blocks, so that one long prompt sends the others to disk."""
    flags = on_disk(shaky_cache, "--ssd-policy", "all", "--cache-ram", "13MB")
    with millpond(command(demo_or_thin, *flags)) as server:
        yield server


def saved(server: Server, folder: Path, topic: str) -> tuple[str, Answer, set[Path]]:
    """A prompt of two blocks and a tail, its answer, and the files that hold it once they are there."""
    settled(server)
    before, written = records(folder), ssd(server)["writes"]
    prompt = story(topic, 8)
    answer = complete(server, prompt)
    until_writes(server, written + blocks_of(answer))
    return prompt, answer, records(folder) - before


def fill_memory(server: Server, topic: str) -> None:
    """Send everything else out of memory."""
    complete(server, story(topic, 21))


def test_killed_engine_finds_its_blocks_on_disk(shaky: Server, shaky_cache: Path) -> None:
    """(A2, F1) kill -9 of the engine process: the next one serves the same prompt from disk."""
    prompt, first, files = saved(shaky, shaky_cache, "Killed")
    assert len(files) == blocks_of(first)
    restarts = shaky.health()["engine"]["restarts"]
    os.kill(shaky.engine_pid(), signal.SIGKILL)
    wait_until(shaky, lambda health: health["engine"]["restarts"] == restarts + 1 and not health["reasons"])
    again = complete(shaky, prompt)
    check_from_disk(again, first)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def foreign_version(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x63")


def test_damaged_files_cost_a_computation(shaky: Server, shaky_cache: Path) -> None:
    """(F2, L) Damaged blocks are set aside and counted, their prompts computed and written again."""
    kinds = {"Flip": flip, "Cut": truncate, "Foreign": foreign_version}
    cases = {topic: saved(shaky, shaky_cache, topic) for topic in kinds}
    fill_memory(shaky, "Fill")
    for topic, (_, _, files) in cases.items():
        for path in files:
            kinds[topic](path)
    before = ssd(shaky)
    for prompt, first, files in cases.values():
        again = complete(shaky, prompt)
        assert (again.text, again.cached) == (first.text, 0)
        assert again.end in ("damaged", "differs")
        aside = {path.name.split("-", 1)[1] for path in (shaky_cache / "quarantine").iterdir()}
        assert aside & {path.name for path in files}
    rewritten = sum(blocks_of(first) for _, first, _ in cases.values())
    after = until_ssd(shaky, lambda disk: disk["writes"] >= before["writes"] + rewritten)
    assert after["damaged"] - before["damaged"] >= len(cases)
    fill_memory(shaky, "Refill")
    for prompt, first, _ in cases.values():
        check_from_disk(complete(shaky, prompt), first)


def test_deleted_files_cost_a_computation(shaky: Server, shaky_cache: Path) -> None:
    """(F2, L) Files that somebody removed are missed and counted, and nothing is set aside."""
    prompt, first, files = saved(shaky, shaky_cache, "Deleted")
    fill_memory(shaky, "Fill deleted")
    for path in files:
        path.unlink()
    before = ssd(shaky)
    again = complete(shaky, prompt)
    assert (again.text, again.cached < BLOCK) == (first.text, True)
    after = ssd(shaky)
    assert after["missing"] > before["missing"]
    assert after["damaged"] == before["damaged"]


def test_a_deleted_index_is_made_anew(shaky: Server, shaky_cache: Path) -> None:
    """(F2, L) While the server runs: nothing is lost but the index, and that only for a moment."""
    prompt, first, _ = saved(shaky, shaky_cache, "Indexed")
    before = ssd(shaky)
    for path in shaky_cache.glob("index.sqlite*"):
        path.unlink()
    _, _, files = saved(shaky, shaky_cache, "Unindexed")
    assert files
    until_ssd(shaky, lambda disk: disk["adopted"] > before["adopted"])
    fill_memory(shaky, "Fill indexed")
    again = complete(shaky, prompt)
    check_from_disk(again, first)


def test_a_deleted_folder_is_made_anew(shaky: Server, shaky_cache: Path) -> None:
    """(F2, L) While the server runs: requests go on, and so do writes."""
    prompt, first, _ = saved(shaky, shaky_cache, "Folder")
    fill_memory(shaky, "Fill folder")
    while shaky_cache.exists():
        shutil.rmtree(shaky_cache, ignore_errors=True)  # the server may be writing into it
    again = complete(shaky, prompt)
    assert again.text == first.text
    wait_until(shaky, lambda _: bool(complete(shaky, story("Folder again", 7)).text) and bool(records(shaky_cache)))
    assert (shaky_cache.stat().st_mode & 0o777) == 0o700
    assert {path.stat().st_mode & 0o777 for path in records(shaky_cache)} == {0o600}


def test_two_servers_share_a_folder(shaky: Server, shaky_cache: Path, demo_or_thin: Path, millpond: Launch) -> None:
    """(F9, L) The second finds what the first wrote before; both go on writing; the folder stays sound."""
    prompt, first, _ = saved(shaky, shaky_cache, "Shared")
    with millpond(command(demo_or_thin, *on_disk(shaky_cache, "--ssd-policy", "all"))) as second:
        answer = complete(second, prompt)
        check_from_disk(answer, first)
        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(lambda server: complete(server, story("Together", 8)).text, (shaky, second)))
            pairs = ((shaky, "Mine"), (second, "Yours"))
            files = list(pool.map(lambda pair: saved(pair[0], shaky_cache, pair[1])[2], pairs))
        assert texts[0] == texts[1]
        assert all(files)
        for server in (shaky, second):
            counted = ssd(server)
            assert (counted["writing"], counted["write_errors"], counted["index_errors"]) == (1, 0, 0)
        assert second.stop() == 0
    assert complete(shaky, prompt).text == first.text
