"""The whole command with guesses: same answers, counted and measured, and an error at start where they cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import httpx
import mtp_models
import pytest
import tiny_models
from metrics_page import scrape
from openai import OpenAI

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Launch, Server

TEXT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def folder_of(byte_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model with a byte-level tokenizer."""

    def make(kind: str, seed: int = 0, *, headed: bool = False) -> Path:
        made = tmp_path_factory.mktemp("guessed") / kind
        made = mtp_models.save_headed(kind, made, oracle=True) if headed else tiny_models.save(kind, made, seed)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(byte_tokenizer / name, made / name)
        return made

    return make


def command(folder: Path, *flags: str) -> list[str]:
    program = [sys.executable, "-m", "millpond.cli.main", "serve", str(folder), "--port", "0", "--model-name", "tiny"]
    return [*program, "--cache-ssd", "0", *flags]


def told(server: Server) -> dict[str, object]:
    return dict(httpx.get(f"{server.url}/v1/models").json()["data"][0]["millpond"])


def answers(server: Server, mode: str, adaptive: bool = True, **fields: object) -> list[tuple[str, int, int, int]]:
    """Text, tokens, accepted and rejected drafts of some answers, streamed ones among them."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    found = []
    for number in range(3):
        body = {"speculative": {"mode": mode, "adaptive": adaptive}, "ignore_eos": True, **fields}
        if number == 2:
            stream = client.completions.create(
                model="tiny",
                prompt=TEXT,
                max_tokens=60,
                temperature=0.7,
                seed=number,
                extra_body=body,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
            usage = chunks[-1].usage
        else:
            whole = client.completions.create(
                model="tiny", prompt=TEXT, max_tokens=60, temperature=0.7 * number, seed=number, extra_body=body
            )
            text, usage = whole.choices[0].text, whole.usage
        assert usage is not None
        details = usage.completion_tokens_details
        assert details is not None
        accepted, rejected = details.accepted_prediction_tokens, details.rejected_prediction_tokens
        assert accepted is not None
        assert rejected is not None
        found.append((text, usage.completion_tokens, accepted, rejected))
    return found


def test_a_draft_model_and_the_text_itself(folder_of: Callable[..., Path], launch: Launch) -> None:
    """(H1, H3, H4, H6) The served model's twin guesses everything right, and no way of guessing changes an answer."""
    served, twin = folder_of("llama"), folder_of("llama")
    with launch(command(served, "--spec", "draft", "--draft-model", str(twin), "--spec-tokens", "5")) as server:
        assert told(server)["speculation"] == ["ngram", "draft"]
        plain = answers(server, "off")
        assert all((accepted, rejected) == (0, 0) for _, _, accepted, rejected in plain)
        drafted = answers(server, "draft", adaptive=False)
        assert [one[:2] for one in drafted] == [one[:2] for one in plain]
        assert all(accepted > 40 and rejected == 0 for _, _, accepted, rejected in drafted)
        looked_up = answers(server, "ngram", adaptive=False, prediction={"type": "content", "content": plain[0][0]})
        assert [one[:2] for one in looked_up] == [one[:2] for one in plain]
        assert looked_up[0][2] > 0
        accepted = sum(one[2] for one in (*drafted, *looked_up))
        rejected = sum(one[3] for one in (*drafted, *looked_up))
        proposed = accepted + rejected
        for _ in range(2000):  # the engine's figures come with its heartbeat
            page = scrape(server.url)
            if page.value("vllm:spec_decode_num_draft_tokens_total") >= proposed:
                break
        assert page.value("vllm:spec_decode_num_draft_tokens_total") == proposed
        assert page.value("vllm:spec_decode_num_accepted_tokens_total") == accepted
        assert page.value("millpond_spec_steps_total") > 0


def test_a_draft_model_that_speaks_of_other_tokens_is_an_error_at_start(
    folder_of: Callable[..., Path], launch: Launch
) -> None:
    stranger = folder_of("llama")
    tokenizer = json.loads((stranger / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (stranger / "tokenizer.json").write_text(json.dumps(tokenizer))
    with launch(command(folder_of("llama"), "--draft-model", str(stranger)), ready=False) as server:
        assert server.process.wait(120) != 0
        server.wait_for_line("draft_model: it cannot guess for this model, for token")


@pytest.mark.parametrize(
    ("kind", "says"), [("recurrent_gemma", "it cannot be run in a batch"), ("lfm2", "it has recurrent layers")]
)
def test_a_draft_model_that_cannot_go_along_is_an_error_at_start(
    kind: str, says: str, folder_of: Callable[..., Path], launch: Launch
) -> None:
    with launch(command(folder_of("llama"), "--draft-model", str(folder_of(kind))), ready=False) as server:
        assert server.process.wait(120) != 0
        server.wait_for_line(f"draft_model: {says}")


def test_models_that_cannot_take_a_guess_back_say_so(folder_of: Callable[..., Path], launch: Launch) -> None:
    """(H1) They answer plainly, whatever a request asks for."""
    with launch(command(folder_of("mamba"))) as server:
        info = told(server)
        assert info["speculation"] == []
        assert str(info["speculation_reason"]).startswith("its recurrent layers cannot go back: ")
        server.wait_for_line("are not guessed ahead")
        assert answers(server, "ngram") == answers(server, "off")


def test_a_model_with_a_head_of_its_own(folder_of: Callable[..., Path], launch: Launch) -> None:
    """(N4) It guesses unless told otherwise, and answers are the same."""
    folder = folder_of("qwen3_5", headed=True)
    with launch(command(folder)) as server:
        info = told(server)
        assert (info["speculation"], info["speculation_reason"]) == (["ngram", "mtp"], "")
        plain = answers(server, "off")
        guessed = answers(server, "mtp", adaptive=False)
        assert [one[:2] for one in guessed] == [one[:2] for one in plain]
        assert all(accepted > 30 for _, _, accepted, _ in guessed)
    with launch(command(folder, "--spec", "ngram")) as server:
        assert told(server)["speculation"] == ["ngram"]
        url, body = f"{server.url}/v1/completions", {"prompt": "a", "speculative": {"mode": "mtp"}}
        refused = httpx.post(url, json={"model": "tiny", **body}, timeout=60)
        assert refused.status_code == 400
        assert "no MTP head of the model is in use" in refused.json()["error"]["message"]
        assert [one[:2] for one in answers(server, "off")] == [one[:2] for one in plain]


def test_a_head_that_is_not_there_cannot_be_asked_for(folder_of: Callable[..., Path], launch: Launch) -> None:
    folder = folder_of("qwen3_5")
    config = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with launch(command(folder, "--spec", "mtp"), ready=False) as server:
        assert server.process.wait(120) != 0
        line = server.wait_for_line("spec: mtp cannot be used with this model")
        assert "config.json speaks of one, but no tensor of it is there" in line
    with launch(command(folder)) as server:
        server.wait_for_line("its MTP head is not used: config.json speaks of one")
        assert told(server)["speculation"] == ["ngram"]
