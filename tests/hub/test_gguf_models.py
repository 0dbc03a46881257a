"""The two real models: their tokenizers' known facts, and that they talk sense."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

pytestmark = pytest.mark.models


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gemma3_folder)


def greedy(folder: Path, tokens: list[int], count: int) -> list[int]:
    """The ``count`` tokens the model likes best after ``tokens``, in float32."""
    model, _ = load(str(folder))
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    cache, answer, step = make_prompt_cache(model), list[int](), mx.array([tokens])
    while len(answer) < count:
        answer.append(int(mx.argmax(model(step, cache=cache)[0, -1]).item()))
        step = mx.array([answer[-1:]])
    return answer


def test_smollm2_tokens(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = smollm2_tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello, world!")) == ["Hello", ",", "Ġworld", "!"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>")[::2] == [1, 2]
    assert len(tokenizer.encode("2024")) == 4, "digits stand alone"
    assert tokenizer.encode("") == []


def test_smollm2_chat_template(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    text = smollm2_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


NO_SUCH_BYTE = "\x04\x06\x13\x14\x16\x1d"
"""Control characters that SmolLM2's own vocabulary lacks; it also lacks some first bytes beyond the second plane."""
SPELLABLE = st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"], exclude_characters=NO_SUCH_BYTE)


@given(text=st.text(alphabet=SPELLABLE, max_size=60))
@settings(max_examples=150, deadline=None)
def test_smollm2_text_comes_back(smollm2_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text


@pytest.mark.slow
def test_gemma3_tokens(gemma3_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = gemma3_tokenizer
    assert tokenizer.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    plain = tokenizer("a\n\nb  c   d", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(plain) == ["a", "\n\n", "b", "▁▁", "c", "▁▁▁", "d"]
    assert tokenizer.encode("<start_of_turn>", add_special_tokens=False) == [105]


@pytest.mark.slow
@given(text=st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=150, deadline=None)
def test_gemma3_text_comes_back(gemma3_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = gemma3_tokenizer.encode(text)
    assert tokens[0] == 2
    assert gemma3_tokenizer.decode(tokens[1:]) == text


def test_smollm2_knows_paris(smollm2_folder: Path, smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm2_tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = greedy(smollm2_folder, prompt, 8)
    assert smollm2_tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_gemma3_goes_on_sensibly(gemma3_folder: Path, gemma3_tokenizer: PreTrainedTokenizerBase) -> None:
    answer = greedy(gemma3_folder, gemma3_tokenizer.encode("One, two, three, four, five,"), 5)
    assert gemma3_tokenizer.decode(answer).startswith(" six, seven,")
