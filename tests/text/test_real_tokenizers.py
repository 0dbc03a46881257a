"""The tokenizers of the two models that tests use, SmolLM2 (byte-level) and Gemma 3 (byte fallback)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.text.answer import Answer
from millpond.text.decoding import ByteFallbackDecoding, ByteLevelDecoding
from millpond.text.stops import StopStrings
from millpond.text.tokenizer import TemplateError, Tokenizer

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_folder)


@pytest.fixture(scope="module")
def gemma3(gemma3_folder: Path) -> Tokenizer:
    return Tokenizer.load(gemma3_folder)


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    chosen = request.getfixturevalue(request.param)
    assert isinstance(chosen, Tokenizer)
    return chosen


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_full_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Both vocabularies have their byte tokens among the first few hundred.
    anywhere, low = st.integers(0, tokenizer.vocab_size + 2), st.integers(0, 400)
    parts = st.one_of(
        st.lists(anywhere, max_size=10), st.lists(low, max_size=10), st.text(max_size=10).map(tokenizer.encode)
    )
    ids = [token for part in data.draw(st.lists(parts, max_size=5)) for token in part]
    detokenizer = tokenizer.detokenizer()
    assert "".join([detokenizer.add(token) for token in ids]) + detokenizer.finish() == tokenizer.decode(ids)
    assert len(detokenizer.ends) == len(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), stop=st.text("abé世🙂 ", min_size=1, max_size=2))
def test_text_comes_back_up_to_the_stop(tokenizer: Tokenizer, text: str, stop: str) -> None:
    ids = tokenizer.encode("x" + text)
    full = tokenizer.decode(ids)
    answer = Answer(tokenizer.detokenizer(), StopStrings([stop]))
    out = "".join([answer.add([token]).text for token in ids]) + answer.finish().text
    assert out == full.partition(stop)[0]
    assert tokenizer.decode(ids[: answer.completion_tokens]).startswith(out)


@pytest.mark.parametrize(
    ("tokenizer", "decoding"),
    [("smollm2", ByteLevelDecoding), pytest.param("gemma3", ByteFallbackDecoding, marks=pytest.mark.slow)],
    indirect=["tokenizer"],
)
def test_their_decoders_run_token_by_token(tokenizer: Tokenizer, decoding: type) -> None:
    assert isinstance(tokenizer._decoding, decoding)


def test_smollm2_chat(smollm2: Tokenizer) -> None:
    ids = smollm2.chat_prompt(
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}]
    ).tokens
    text = b"".join(smollm2.token_bytes(token) for token in ids).decode()
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 🙂<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.encode("<|im_end|>", parse_special=True)[0] in smollm2.eos_token_ids


@pytest.mark.slow
def test_gemma3_base_completes_only(gemma3: Tokenizer) -> None:
    assert gemma3.encode("Hello")[0] == gemma3.bos_token_id == 2
    assert gemma3.encode("<bos>Hello", parse_special=True) == gemma3.encode("Hello")
    with pytest.raises(TemplateError, match="no chat template"):
        gemma3.chat_prompt([{"role": "user", "content": "Hi"}])
