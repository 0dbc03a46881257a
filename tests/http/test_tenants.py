"""(E9) With several owners of keys nothing of one's prompts can be found out by another."""

from __future__ import annotations

import json
import re
import shutil
import signal
import zlib
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from plain_http import bearer

from millpond.http.generation_request import LONGEST_SALT
from millpond.http.tenants import salted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Launch, Server, StartServer

ALICE, BOB, BOBS_OTHER, NAMELESS = (f"{name}-key-0123456789" for name in ("alice", "bob", "other", "nameless"))
FILE = f"alice {ALICE}\nbob {BOB}\nbob {BOBS_OTHER}\n{NAMELESS}\n"
SECRET = [(7 * number) % 250 for number in range(300)]
WRONG = [*SECRET[:290], *range(10)]
"""A guess at the secret that is right in its first 290 tokens."""

OWNERS = st.text(min_size=1, max_size=32).filter(lambda name: "\0" not in name)
GIVEN = st.text(max_size=LONGEST_SALT)


@given(OWNERS, GIVEN, OWNERS, GIVEN)
def test_no_two_owners_or_salts_have_one_salt(owner: str, mine: str, other: str, its: str) -> None:
    assert (salted(owner, mine) == salted(other, its)) == ((owner, mine) == (other, its))


@given(OWNERS, GIVEN, GIVEN)
def test_no_client_can_give_an_owners_salt(owner: str, mine: str, given_by_anybody: str) -> None:
    """Also where prefixes are shared, or there are no keys any more, and the SSD still has those of an owner."""
    for given_salt in (given_by_anybody, owner + mine):
        assert salted("", given_salt) == given_salt != salted(owner, mine)


# --- which salt reaches the engine --------------------------------------------------------------------------------


def salt(server: Server, key: str, given_salt: str = "") -> str:
    """What the engine is told, for answers; the same for explanations is checked on the way."""
    headers = bearer(key) if key else {}
    body = {"model": "test-model", "prompt": [908], "max_tokens": 1, "cache_salt": given_salt or None}
    refused = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, verify=False)
    told = str(json.loads(refused.json()["error"]["message"]).get("salt", ""))
    body["prompt"] = [909]
    explained = httpx.post(f"{server.url}/v1/cache/explain", json=body, headers=headers, verify=False)
    assert explained.json()["data"][0]["known_tokens"] == zlib.crc32(told.encode())
    return told


def test_whose_prefixes_are_whose(start_server: StartServer, tmp_path: Path) -> None:
    """One owner has the salts that there are without keys; with more, each has its own, from the moment on when the
    second comes."""
    file = tmp_path / "keys"
    file.write_text(f"bob {BOB}\nbob {BOBS_OTHER}\n")
    with start_server("plain", "api_key_file", str(file)) as server:
        assert [salt(server, key) for key in (BOB, BOBS_OTHER)] == ["", ""]
        assert salt(server, BOB, "mine") == "mine"
        file.write_text(FILE)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("keys=4")
        bob, his_other, alice, nameless = (salt(server, key) for key in (BOB, BOBS_OTHER, ALICE, NAMELESS))
        assert bob == his_other
        salted_too = [salt(server, key, "mine") for key in (BOB, ALICE, NAMELESS)]
        assert len({bob, alice, nameless, *salted_too, "", "mine"}) == 8


def test_prefixes_are_shared_where_the_setting_says_so(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(FILE)
    with start_server("plain", "api_key_file", str(tmp_path / "keys"), "share_prefixes", "on") as server:
        assert [salt(server, key) for key in (ALICE, BOB, NAMELESS)] == [""] * 3
        assert [salt(server, key, "ours") for key in (ALICE, BOB)] == ["ours"] * 2


def test_without_keys_a_salt_is_what_the_client_gives(server: Server) -> None:
    assert [salt(server, "", given_salt) for given_salt in ("", "mine")] == ["", "mine"]


# --- what can be found out, with a real cache ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tenants(byte_tokenizer: Path, millpond: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with a tiny model, where past answers are used for guessing, and two owners."""
    folder = tmp_path_factory.mktemp("tenants")
    tiny_models.save("llama", folder / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_tokenizer / name, folder / "tiny" / name)
    (folder / "keys").write_text(FILE)
    flags = ["--api-key-file", str(folder / "keys"), "--spec-shared", "on", "--spec-adaptive", "off"]
    flags += ["--cache-dir", str(folder / "cache"), "--ssd-min-free", "0", "--ssd-policy", "all"]
    with millpond(["serve", str(folder / "tiny"), "--port", "0", "--model-name", "tiny", *flags]) as server:
        yield server


def ask(server: Server, key: str, prompt: list[int], given_salt: str = "", path: str = "completions") -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0, "cache_salt": given_salt or None}
    body["ignore_eos"] = True
    headers = bearer(key)
    answer = httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=120, verify=False)
    assert answer.status_code == 200, answer.text
    return answer


def found_out(server: Server, key: str, guess: list[int], given_salt: str = "") -> dict[str, object]:
    """All that somebody is told of a guess at another's prompt."""
    [entry] = ask(server, key, guess, given_salt, "cache/explain").json()["data"]
    answer = ask(server, key, guess, given_salt)
    usage = answer.json()["usage"]
    header = re.sub(r"end=\w+", "", answer.headers["x-millpond-prefix-cache"])
    return {
        "explained": [entry[name] for name in ("cached_tokens", "memory_tokens", "disk_tokens", "known_tokens")],
        "header": [int(number) for number in re.findall(r"\d+", header)],
        "cached": usage["prompt_tokens_details"]["cached_tokens"],
        "guessed": usage["completion_tokens_details"],
    }


@pytest.mark.parametrize("given_salt", ["", "the same for both"])
def test_nothing_of_one_owners_prompts_is_told_to_another(tenants: Server, given_salt: str) -> None:
    """By explanations, header, usage and accepted guesses: all are as for a prompt that nobody ever asked."""
    nothing = found_out(tenants, NAMELESS, WRONG, f"fresh {given_salt}")
    assert (nothing["explained"], nothing["header"], nothing["cached"]) == ([0] * 4, [0] * 3, 0)
    ask(tenants, ALICE, SECRET, given_salt)
    assert found_out(tenants, BOB, WRONG, given_salt) == nothing
    # The other key of bob's finds what bob has asked, as alice finds hers, to the token.
    for key, guess, known in ((BOBS_OTHER, WRONG, len(WRONG) - 1), (ALICE, WRONG, 290)):
        told = found_out(tenants, key, guess, given_salt)
        assert told["explained"] == [known, known, 0, known]
        assert told["cached"] == known


def test_past_answers_of_others_are_not_guessed_from(tenants: Server) -> None:
    """The same prompt as another owner's is answered with as many accepted guesses as one that nobody has asked."""
    prompt = SECRET[::-1]
    alone, again = (ask(tenants, ALICE, prompt, "guess").json()["usage"] for _ in range(2))
    other = ask(tenants, BOB, prompt, "guess").json()["usage"]
    name = "completion_tokens_details"
    assert again[name] != alone[name]  # one's own past answers are used
    assert other[name] == alone[name]
