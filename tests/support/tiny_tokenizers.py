"""Small real tokenizers, trained here on a few lines of text, one per kind of decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "Größe, façade, naïve, señor, Ærø, smørrebrød. Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "こんにちは世界。今日はいい天気ですね。 你好，世界！",  # noqa: RUF001 -- real Chinese punctuation
    "🙂🙃🎉 family: 👨‍👩‍👧‍👦 flag: 🇩🇰",
    "def f(x):\n    return x * 2  # 0123456789\n\n\nUser: hi\nAssistant: hello",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def byte_level_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # Not special, so shown: one outside the byte alphabet, one inside it, one half and half, one with a space.
    for text in ("世<tool>", "<tool>", "Ãé世", "two words"):
        backend.add_tokens([AddedToken(text, special=False, normalized=False)])
    return backend


def byte_fallback_backend(strip: bool) -> Tokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    vocab = {text: index for index, text in enumerate(special)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for text in [
        *"▁abcdefghijklmnopqrstuvwxyzABCDEFTHU.,:;é世\n",
        "▁t",
        "▁th",
        "▁the",
        "▁▁",
        "he",
        "<0x+5>",
        "<0xZZ>",
        "x▁y",
    ]:
        vocab.setdefault(text, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("h", "e")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*stages, decoders.Strip(" ", 1, 0)] if strip else stages)
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken("<tool▁call>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return backend


def metaspace_backend() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece_backend() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def bare_backend() -> Tokenizer:
    backend = word_piece_backend()
    backend.decoder = None
    return backend


def unfamiliar_backend() -> Tokenizer:
    backend = byte_fallback_backend(strip=False)
    backend.decoder = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level_backend,
    "byte fallback": lambda: byte_fallback_backend(strip=False),
    "byte fallback, stripped": lambda: byte_fallback_backend(strip=True),
    "metaspace": metaspace_backend,
    "word piece": word_piece_backend,
    "no decoder": bare_backend,
    "unfamiliar": unfamiliar_backend,
}


def write_folder(
    folder: Path, backend: Tokenizer, settings: Mapping[str, object], config: Mapping[str, object]
) -> Path:
    """A model folder as far as text is concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def id_of(backend: Tokenizer, piece: str) -> int:
    token = backend.token_to_id(piece)
    assert token is not None
    return token
