"""/v1/embeddings, by the official client: of a script's vectors, and of a real model that declares its pooling."""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import mlx.core as mx
import numpy as np
import openai
import pytest
from embedding_model import declare
from mlx_lm.utils import load_model
from tiny_models import config_of, save
from tiny_tokenizers import byte_level_backend, write_folder
from tokenizers.processors import TemplateProcessing

from millpond.http.openai.embeddings import AT_ONCE, MOST_INPUTS
from millpond.model.upstream import new_cache
from millpond.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from conftest import Launch, Server, StartServer

SIZE = 8


@pytest.fixture(scope="module")
def embedding(start_server: StartServer) -> Iterator[Server]:
    with start_server(f"embeds={SIZE},context=64,slow=0.001") as server:
        yield server


@pytest.fixture
def ai(embedding: Server) -> Iterator[openai.OpenAI]:
    with embedding.client() as client:
        yield client


def unit(numbers: list[int]) -> list[float]:
    length = math.sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


def test_texts_and_tokens_in_their_order(ai: openai.OpenAI) -> None:
    """(M9) Whatever the client says or leaves out: it asks for base64 by itself."""
    tokens = [[number % 250 + 1, 7] for number in range(50)]
    for more in ({}, {"encoding_format": "float"}):
        answer = ai.embeddings.create(model="test-model", input=tokens, **more)  # type: ignore[call-overload]
        assert [one.index for one in answer.data] == list(range(50))
        assert [one.embedding for one in answer.data] == [(pair * SIZE)[:SIZE] for pair in tokens]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (100, 100)
    one, other = (ai.embeddings.create(model="test-model", input=given).data for given in ("hello", ["hello"]))
    assert [each.embedding for each in one] == [each.embedding for each in other]
    assert len(ai.embeddings.create(model="test-model", input=[5, 6]).data) == 1


def test_fewer_dimensions_are_the_first_ones_of_length_one(ai: openai.OpenAI) -> None:
    """(M9)"""
    answer = ai.embeddings.create(model="test-model", input=[[3, 4]], dimensions=3, encoding_format="float")
    assert answer.data[0].embedding == pytest.approx(unit([3, 4, 3]), abs=1e-7)
    whole = ai.embeddings.create(model="test-model", input=[[3, 4]], dimensions=SIZE, encoding_format="float")
    assert whole.data[0].embedding == [3, 4] * (SIZE // 2), "all of them are as the model has them"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "a string, a list"),
        ({"input": ""}, "input", "a string, a list"),
        ({"input": []}, "input", "a string, a list"),
        ({"input": 7}, "input", "a string, a list"),
        ({"input": [""]}, "input[0]", "a string or a list of token ids"),
        ({"input": ["a", []]}, "input[1]", "a string or a list of token ids"),
        ({"input": ["a", 5]}, "input[1]", "a string or a list of token ids"),
        ({"input": [5, "a"]}, "input", "a list of token ids"),
        ({"input": [True]}, "input[0]", "a string or a list of token ids"),
        ({"input": [[5, True]]}, "input[0]", "a list of token ids"),
        ({"input": [1000]}, "input[0]", "from 0 to 999"),
        ({"input": [-1]}, "input[0]", "from 0 to 999"),
        ({"input": ["a", "a" * 63]}, "input[1]", "at most 62 tokens, got 63"),
        ({"input": ["a"] * (MOST_INPUTS + 1)}, "input", str(MOST_INPUTS)),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", '"float" or "base64"'),
        ({"input": "a", "dimensions": 0}, "dimensions", "at least 1"),
        ({"input": "a", "dimensions": SIZE + 1}, "dimensions", f"at most {SIZE}"),
        ({"input": "a", "model": "another"}, "model", "another"),
    ],
)
def test_what_is_wrong_is_named(embedding: Server, body: dict[str, Any], param: str, said: str) -> None:
    """(M9)"""
    answer = httpx.post(f"{embedding.url}/v1/embeddings", json=body, trust_env=False)
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert said in error["message"]


def test_one_that_fails_fails_the_request_and_nobody_else(embedding: Server, ai: openai.OpenAI) -> None:
    """(M9) Commands of the script; what else of it is with the engine is given up."""
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(ai.embeddings.create, model="test-model", input=[[number + 1] for number in range(40)])
        answer = httpx.post(
            f"{embedding.url}/v1/embeddings", json={"input": [[5]] * 20 + [[900]] + [[6]] * 20}, trust_env=False
        )
    assert answer.status_code == 500
    assert len(good.result().data) == 40
    assert httpx.get(f"{embedding.url}/health", trust_env=False).json()["requests"]["running"] == 0


def test_an_engine_that_dies_under_many(start_server: StartServer) -> None:
    """(M9) Those that are with it and those that wait fail together, as the death that it is."""
    with start_server("embeds=8,slow=0.05") as server:
        answer = httpx.post(
            f"{server.url}/v1/embeddings", json={"input": [[904], *([[5]] * 100)]}, timeout=60, trust_env=False
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_died")


def test_the_whole_request_has_its_time(start_server: StartServer) -> None:
    """(M9) However many texts there are."""
    with start_server("embeds=8,slow=0.2", "request_timeout", "1") as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": [[5]] * 200}, timeout=60, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")


def test_a_model_that_makes_none(server: Server) -> None:
    """(M9) Says why."""
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_embeddings"
    assert "this model makes no embeddings: it is a script" in answer.json()["error"]["message"]


def test_a_client_that_leaves_leaves_nothing(embedding: Server) -> None:
    """(M9) Its texts are given up, those that wait among them."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{embedding.url}/v1/embeddings", json={"input": [[903]] * (3 * AT_ONCE)}, timeout=0.5, trust_env=False
        )
    embedding.wait_for_line("client=gone")


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A tiny one, which ends each text with a token of its own."""
    folder = tmp_path_factory.mktemp("models") / "embedder"
    backend = byte_level_backend()
    config = {**config_of("qwen3"), "vocab_size": backend.get_vocab_size()}
    save("qwen3", folder, config=config)
    end = backend.token_to_id("<|endoftext|>")
    backend.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    write_folder(folder, backend, {"eos_token": "<|im_end|>"}, config)
    declare(folder)
    arguments = ["serve", str(folder), "--port", "0", "--model-name", "demo"]
    with launch([sys.executable, "-m", "millpond.cli.main", *arguments]) as server:
        yield server, folder


def test_a_real_models_vectors(real: tuple[Server, Path]) -> None:
    """(M9) Those of one forward over the text and its end, beside answers."""
    server, folder = real
    tokenizer = Tokenizer.load(folder)
    network = load_model(folder)[0]
    texts = ["a pond", "The mill stands by the pond. " * 12, "<|im_end|> is no end here"]
    with server.client() as ai, ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(ai.completions.create, model="demo", prompt="Once", max_tokens=40, seed=number)
            for number in range(3)
        ]
        got = ai.embeddings.create(model="demo", input=texts).data
        for answer in answers:
            answer.result()
    for text, one in zip(texts, got, strict=True):
        tokens = tokenizer.whole(text)
        assert tokens[-1] == tokenizer.vocabulary["<|endoftext|>"]
        assert tokens.count(tokenizer.vocabulary["<|im_end|>"]) == 0
        hidden = np.array(network.model(mx.array([tokens]), cache=new_cache(network))[0, -1].astype(mx.float32))
        assert float(np.dot(one.embedding, hidden / np.linalg.norm(hidden))) > 1 - 1e-4


def test_base64_is_little_endian_float32(real: tuple[Server, Path]) -> None:
    """(M9)"""
    server, _ = real
    shown: dict[str, object] = {"input": "a", "encoding_format": "base64"}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=shown, trust_env=False).json()["data"][0]["embedding"]
    floats = httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}, trust_env=False).json()
    decoded = np.frombuffer(base64.b64decode(answer), "<f4")
    assert np.allclose(decoded, floats["data"][0]["embedding"], atol=1e-8)
    assert abs(float(np.linalg.norm(decoded)) - 1) < 1e-5
    assert json.dumps(floats["usage"]) == '{"prompt_tokens": 2, "total_tokens": 2}'
