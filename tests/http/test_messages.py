"""(B4) No message that anybody can get shows where a file is, whatever failed and whoever asks."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from plain_http import bearer
from waiting import until

from millpond.client import EngineError, EngineUnavailable
from millpond.client.public import public
from millpond.http.errors import ApiError
from millpond.types import ErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Launch, Server

KEY = "a-key-0123456789"
MESSAGES = [{"role": "user", "content": "hi"}]
ANSWERS = {
    "/v1/completions": {"prompt": [1, 2]},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/cache/explain": {"prompt": [1, 2]},
}
SHOWN = (
    ("[Errno 2] No such file or directory: 'place/model-x/config.json'", "[Errno 2] No such file or directory: …"),
    ("cannot load the model in 'model-x': config.json: bad", "cannot load the model in 'model-x': config.json: bad"),
    ("open /model: failed", "open …: failed"),
    ("open ~/m/x.json, line 3", "open …, line 3"),
    ("a 1/2 of 'x' isn't in 'a b/c d', it's", "a 1/2 of 'x' isn't in …, it's"),
    ('file "/a b/it\'s" is bad', "file … is bad"),
    ("see file:///a/b (or a=/b/c)", "see file:… (or a=…)"),
    ("first\n  File /a/b.py, line 3", "first"),
    ("", "unknown error"),
)


@pytest.mark.parametrize(("message", "shown"), SHOWN)
def test_paths_are_left_out_and_nothing_else(message: str, shown: str) -> None:
    assert public(message) == public(public(message)) == shown


PARTS = st.text("abc.-_ü", min_size=1, max_size=6)


@given(st.lists(PARTS, min_size=2, max_size=5), st.sampled_from(["", "/", "./", "~/"]), st.sampled_from("'\"`_"))
def test_no_path_of_any_shape_is_left(parts: list[str], begin: str, quote: str) -> None:
    """Relative or not, quoted or not, by every way out of the server."""
    path = begin + "/".join(parts)
    message = f"cannot read {path if quote == '_' else f'{quote}{path}{quote}'}: it is bad"
    ways = (
        public(message),
        EngineError(ErrorKind.INVALID, message).message,
        str(EngineError(ErrorKind.ENGINE, message)),
        str(EngineUnavailable(message)),
        *(ApiError(status, message).message for status in (500, 503, 504)),
    )
    assert set(ways) == {"cannot read …: it is bad"}
    assert EngineUnavailable(message).whole == message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("token", "status"), [(911, 500), (912, 400)])
def test_failed_requests(server: Server, token: int, status: int, stream: bool) -> None:
    """At once, and in the middle of an answer, where the error is an event."""
    for prompt in ([token], [1, token]):
        body = {"model": "test-model", "prompt": prompt, "max_tokens": 4, "stream": stream}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20, verify=False)
        assert answer.status_code == (200 if stream and len(prompt) > 1 else status)
        assert "No such file or directory: …" in answer.text
        assert "secret" not in answer.text


# --- a model that is gone when its engine is started again -------------------------------------------------------


@pytest.fixture
def lost(byte_tokenizer: Path, millpond: Launch, tmp_path: Path) -> Iterator[Server]:
    """A server whose model's folder has been renamed, and its engine killed."""
    folder = tmp_path / "secret place" / "model-x"
    tiny_models.save("llama", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_tokenizer / name, folder / name)
    (tmp_path / "keys").write_text(f"{KEY}\n")
    flags = ("--port", "0", "--cache-ssd", "0", "--api-key-file", str(tmp_path / "keys"))
    with millpond(["serve", str(folder), *flags]) as server:
        folder.rename(folder.with_name("gone"))
        os.kill(server.engine_pid(), signal.SIGKILL)
        yield server


def test_a_model_that_is_gone(lost: Server) -> None:
    """The reason is told, the place is not: without a key on the probes, with one everywhere else."""
    with httpx.Client(base_url=lost.url, timeout=20, headers=bearer(KEY)) as client:
        ready = until(lambda: httpx.get(f"{lost.url}/readyz"), lambda got: "cannot load the model" in got.text)
        answers = [ready, httpx.get(f"{lost.url}/health"), client.get("/v1/models"), client.get("/metrics")]
        answers += [
            client.post(path, json={"model": "model-x", "stream": stream, **body})
            for path, body in ANSWERS.items()
            for stream in (False, True)
        ]
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        assert "secret" not in answer.text, answer.text
        assert "/model-x" not in answer.text, answer.text
    lost.wait_for_line("secret place")  # in the log it is
