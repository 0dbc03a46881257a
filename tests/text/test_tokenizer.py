"""Loading, chat templates, BOS and ends of turn, on model folders written here."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, CORPUS, TURNS, byte_fallback_backend, byte_level_backend, id_of, write_folder

from millpond.text.tokenizer import TemplateError, Tokenizer, TokenizerError

HELLO: list[dict[str, object]] = [{"role": "user", "content": "the世界 🙂"}]


@pytest.fixture(scope="module")
def chatml(chatml_folder: Path) -> Tokenizer:
    return Tokenizer.load(chatml_folder)


@pytest.fixture(scope="module")
def turns(turns_folder: Path) -> Tokenizer:
    return Tokenizer.load(turns_folder)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(token) for token in ids).decode()


def test_chat_is_rendered_once_with_generation_prompt(chatml: Tokenizer) -> None:
    assert chatml.has_chat_template
    ids = chatml.chat_prompt([{"role": "system", "content": "Be brief."}, *HELLO]).tokens
    assert spelled(chatml, ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe世界 🙂<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_has_one_bos_when_the_template_writes_it(turns: Tokenizer) -> None:
    ids = turns.chat_prompt(HELLO).tokens
    assert ids[0] == turns.bos_token_id == 2
    assert ids.count(2) == 1
    assert spelled(turns, ids) == "<bos><start_of_turn>user\nthe世界 🙂<end_of_turn>\n<start_of_turn>model\n"


def test_the_template_alone_decides_about_bos(tmp_path: Path) -> None:
    template = TURNS.replace("{{ bos_token }}", "")
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_fallback_backend(strip=False), settings, {}))
    assert tokenizer.chat_prompt(HELLO).tokens[0] == 4


def test_completion_has_one_bos_even_if_the_text_brings_it(turns: Tokenizer) -> None:
    assert turns.encode("the") == turns.encode("<bos>the", parse_special=True) == [2, *turns.encode("the")[1:]]
    assert turns.encode("the").count(2) == 1
    assert turns.encode("") == [2]


def test_completion_has_no_bos_where_the_tokenizer_puts_none(chatml: Tokenizer) -> None:
    assert chatml.bos_token_id is None
    assert chatml.encode("") == []
    assert chatml.decode(chatml.encode(CORPUS[3])) == CORPUS[3]


def test_developer_reads_as_system_unless_the_template_knows_it(chatml: Tokenizer, tmp_path: Path) -> None:
    messages: list[dict[str, object]] = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert spelled(chatml, chatml.chat_prompt(messages).tokens).startswith("<|im_start|>system\nBe brief.")
    assert messages[0]["role"] == "developer"
    knowing = "{# system or developer #}" + CHATML
    settings = {"eos_token": "<|endoftext|>", "chat_template": knowing}
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_level_backend(), settings, {}))
    assert spelled(tokenizer, tokenizer.chat_prompt(messages).tokens).startswith("<|im_start|>developer\nBe brief.")


def test_template_that_refuses_is_an_error(turns: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="System role not supported"):
        turns.chat_prompt([{"role": "system", "content": "Be brief."}, *HELLO])
    with pytest.raises(TemplateError, match="System role not supported"):
        turns.chat_prompt([{"role": "developer", "content": "Be brief."}, *HELLO])


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": 7}]])
def test_template_that_breaks_is_an_error(chatml: Tokenizer, messages: list[dict[str, object]]) -> None:
    with pytest.raises(TemplateError):
        chatml.chat_prompt(messages)


def test_template_with_a_syntax_error_is_an_error(tmp_path: Path) -> None:
    settings = {"eos_token": "<|endoftext|>", "chat_template": "{% for m in messages %}"}
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_level_backend(), settings, {}))
    with pytest.raises(TemplateError):
        tokenizer.chat_prompt(HELLO)


def test_no_template_is_an_error_and_never_a_made_up_prompt(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_level_backend(), {"eos_token": "<|endoftext|>"}, {}))
    assert not tokenizer.has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.chat_prompt(HELLO)


def test_half_a_surrogate_pair_reads_as_replacement(chatml: Tokenizer) -> None:
    assert chatml.decode(chatml.encode("a\ud83d!")) == "a\ufffd!"
    assert chatml.decode(chatml.encode("\ud83d\ude42")) == "🙂"
    assert "a\ufffd" in spelled(chatml, chatml.chat_prompt([{"role": "user", "content": "a\ud83d"}]).tokens)


def test_ends_are_the_union_of_all_sources(chatml: Tokenizer, turns_folder: Path, tmp_path: Path) -> None:
    assert chatml.eos_token_ids == {0, 2}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((turns_folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": [8]}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 10, None, True, "x", -1]}))
    assert Tokenizer.load(tmp_path).eos_token_ids == {1, 5, 7, 8, 9, 10}


def test_turn_end_is_known_without_asking_the_template(tmp_path: Path) -> None:
    """A template that refuses the probing conversation still names its end of turn."""
    template = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + CHATML
    settings = {"eos_token": "<|endoftext|>", "chat_template": template}
    tokenizer = Tokenizer.load(write_folder(tmp_path, byte_level_backend(), settings, {}))
    assert tokenizer.eos_token_ids == {0, 2}


def test_a_message_end_inside_a_turn_does_not_end_the_answer(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.add_special_tokens(["<|end|>", "<|return|>"])
    template = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    )
    settings = {"eos_token": "<|endoftext|>", "chat_template": template}
    tokenizer = Tokenizer.load(write_folder(tmp_path, backend, settings, {}))
    assert tokenizer.eos_token_ids == {0, id_of(backend, "<|return|>")}


def test_token_text_and_bytes(turns: Tokenizer, chatml: Tokenizer) -> None:
    end = turns.encode("<end_of_turn>", parse_special=True)[-1]
    assert (turns.token_text(end), turns.token_bytes(end)) == ("<end_of_turn>", b"<end_of_turn>")
    the = turns.encode(" the")[-1]
    assert (turns.token_text(the), turns.token_bytes(the)) == (" the", b" the")
    lone = turns.encode("🙂")[1]
    assert (turns.token_text(lone), turns.token_bytes(lone)) == ("\ufffd", b"\xf0")
    assert turns.token_text(turns.vocab_size + 100) == ""
    assert chatml.vocab_size == 504


def test_decoding_hides_special_and_unknown_tokens(turns: Tokenizer) -> None:
    ids = [2, *turns.encode("the<end_of_turn>", parse_special=True)[1:], turns.vocab_size + 3]
    assert turns.decode(ids) == "the"
    detokenizer = turns.detokenizer()
    assert "".join(detokenizer.add(token) for token in ids) + detokenizer.finish() == "the"


def test_many_threads_get_what_one_gets(turns: Tokenizer) -> None:
    chats = [[{"role": "user", "content": text * 3}] for text in CORPUS] * 20
    texts = CORPUS * 20
    alone = [turns.chat_prompt(chat).tokens for chat in chats], [turns.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        chat_results, text_results = (
            pool.map(lambda chat: turns.chat_prompt(chat).tokens, chats),
            pool.map(turns.encode, texts),
        )
        assert (list(chat_results), list(text_results)) == alone


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.load(write_folder(tmp_path, backend, {"eos_token": "<|endoftext|>"}, {}))
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path)


def test_code_in_the_folder_is_not_run(tmp_path: Path, chatml_folder: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "tok.py").write_text(f"open({str(marker)!r}, 'w')\n")
    settings = {"auto_map": {"AutoTokenizer": ["tok.T", "tok.T"]}, "tokenizer_class": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path)
    assert not marker.exists()


def test_loading_is_silent_and_free_of_mlx(chatml_folder: Path) -> None:
    script = (
        "import sys, pathlib; from millpond.text.tokenizer import Tokenizer; before = 'transformers' in sys.modules;"
        "Tokenizer.load(pathlib.Path(sys.argv[1]));"
        "print(before, [m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'torch')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(chatml_folder)], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("False []", "")
