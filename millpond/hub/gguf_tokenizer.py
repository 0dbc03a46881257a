"""From the vocabulary inside a GGUF file to tokenizer.json and tokenizer_config.json.

Two kinds exist in the families we convert. ``gpt2``: byte-level BPE, merges listed in the file. ``llama``:
SentencePiece BPE, merges implied by the scores of the pieces, unknown characters spelled as byte pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec
from gguf import GGUFReader, GGUFValueType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from millpond.hub.errors import SourceError
from millpond.hub.gguf_config import Config, Metadata

SPACE = "\u2581"
"""How SentencePiece spells a space."""

END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
"""Control tokens that end an answer, whichever of them the file names as its own."""


class TokenType(IntEnum):
    """GGUF's kinds of tokens that matter here."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


class Vocabulary(msgspec.Struct, frozen=True):
    """The arrays of a GGUF vocabulary; all but ``merges`` have one entry per token id."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]

    def special(self, wanted: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind == wanted]


class BuiltTokenizer(msgspec.Struct, frozen=True):
    """A tokenizer ready to be written: tokenizer.json, tokenizer_config.json and the ids that end an answer."""

    tokenizer_json: str
    config: Config
    bos_token_id: int | None
    eos_token_ids: list[int]


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SINGLE_DIGIT = r"\p{N}"

_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_SINGLE_DIGIT, _GPT2),
    "starcoder": (_SINGLE_DIGIT, _GPT2),
    "refact": (_SINGLE_DIGIT, _GPT2),
    "command-r": (_SINGLE_DIGIT, _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
"""tokenizer.ggml.pre → how text is cut before merging, one pattern after the other."""


def read_vocabulary(reader: GGUFReader) -> Vocabulary:
    """The vocabulary arrays of a file. Raises SourceError when it has none."""

    def array(name: str) -> list[object]:
        field = reader.fields.get(f"tokenizer.ggml.{name}")
        if field is None:
            return []
        if field.types[0] != GGUFValueType.ARRAY:
            raise SourceError(f"GGUF field tokenizer.ggml.{name} is no array")
        try:
            return list(field.contents())
        except UnicodeDecodeError as error:
            raise SourceError(f"GGUF field tokenizer.ggml.{name} is not UTF-8 text") from error

    tokens = [str(token) for token in array("tokens")]
    if not tokens:
        raise SourceError("GGUF field tokenizer.ggml.tokens is missing: only files with a vocabulary are allowed")
    types, scores, merges = array("token_type"), array("scores"), [str(merge) for merge in array("merges")]
    for name, entries in (("token_type", types), ("scores", scores)):
        if entries and len(entries) != len(tokens):
            raise SourceError(f"GGUF field tokenizer.ggml.{name} has {len(entries)} entries for {len(tokens)} tokens")
    if wrong := next((merge for merge in merges if " " not in merge[1:]), None):
        raise SourceError(
            f"GGUF field tokenizer.ggml.merges has {wrong!r}: two pieces with a space between are allowed"
        )
    return Vocabulary(
        tokens,
        [int(str(kind)) for kind in types] or [int(TokenType.NORMAL)] * len(tokens),
        [float(str(score)) for score in scores],
        merges,
    )


def build_tokenizer(vocabulary: Vocabulary, metadata: Metadata, context_length: int) -> BuiltTokenizer:
    """Build the tokenizer a file describes. Raises SourceError for a kind we cannot build."""
    kind = str(metadata.get("tokenizer.ggml.model", ""))
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary, str(metadata.get("tokenizer.ggml.pre", "gpt-2")))
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    else:
        raise SourceError(f"GGUF field tokenizer.ggml.model is {kind!r}: allowed are 'gpt2' and 'llama'")
    _add_whole_tokens(tokenizer, vocabulary)
    bos = _id(metadata, "bos")
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = _id(metadata, name)
        if index is not None and not 0 <= index < len(vocabulary.tokens):
            most = len(vocabulary.tokens) - 1
            raise SourceError(f"GGUF field tokenizer.ggml.{name}_token_id is {index}: allowed are 0 to {most}")
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    if add_bos and bos is not None:
        _prepend(tokenizer, vocabulary.tokens[bos], bos)
    return BuiltTokenizer(
        tokenizer.to_str(pretty=False),
        _tokenizer_config(vocabulary, metadata, context_length, add_bos),
        bos,
        end_ids(vocabulary, metadata),
    )


def end_ids(vocabulary: Vocabulary, metadata: Metadata) -> list[int]:
    """Ids that end an answer: the file's own first, then every control token known to be one."""
    named = [_id(metadata, "eos"), _id(metadata, "eot"), _id(metadata, "eom")]
    known = [
        index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == TokenType.CONTROL and token in END_OF_TURN
    ]
    return list(dict.fromkeys([*(i for i in named if i is not None), *known]))


def _id(metadata: Metadata, name: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if value is None else int(value)


def _byte_level(vocabulary: Vocabulary, pre: str) -> Tokenizer:
    if pre not in _SPLITS:
        raise SourceError(f"GGUF field tokenizer.ggml.pre is {pre!r}: allowed are {', '.join(sorted(_SPLITS))}")
    tokenizer = Tokenizer(models.BPE(vocab=_ids(vocabulary.tokens), merges=_listed_merges(vocabulary.merges)))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, space_prefix: bool) -> Tokenizer:
    # Runs of spaces are stored as they look; everywhere else a space is spelled out.
    tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in vocabulary.tokens]
    listed = _listed_merges(vocabulary.merges)
    merges = listed or _implied_merges(tokens, vocabulary)
    unknown = next((t for t in tokens if t == "<unk>"), None)
    tokenizer = Tokenizer(
        models.BPE(vocab=_ids(tokens), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", SPACE)
    tail = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        tail.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(tail)
    return tokenizer


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _listed_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        # A merge's left side may begin with a space of its own, never be empty: look for the space after it.
        cut = merge.index(" ", 1)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _implied_merges(tokens: Sequence[str], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best joined piece first.

    User-defined pieces come before all others: SentencePiece cuts them out of the text before it merges anything.
    """
    ids = _ids(tokens)
    ranked: list[tuple[float, int, str]] = []
    for index, token in enumerate(tokens):
        kind = vocabulary.types[index]
        if len(token) > 1 and kind in (TokenType.NORMAL, TokenType.USER_DEFINED):
            score = float("-inf") if kind == TokenType.USER_DEFINED else -vocabulary.scores[index]
            ranked.append((score, index, token))
    ranked.sort()
    return [
        (token[:cut], token[cut:])
        for _, _, token in ranked
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]


def _add_whole_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control and user-defined tokens are found in the text as they are, never cut into pieces."""
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in vocabulary.special(TokenType.CONTROL)]
    )
    # Runs of spaces are left to the merges: by the time added tokens would be found, text still has plain spaces.
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token in vocabulary.special(TokenType.USER_DEFINED)
            if token.strip(" ")
        ]
    )


def _prepend(tokenizer: Tokenizer, token: str, index: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )


def _tokenizer_config(vocabulary: Vocabulary, metadata: Metadata, context_length: int, add_bos: bool) -> Config:
    config: Config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "add_bos_token": add_bos,
        "add_eos_token": False,
    }
    for setting, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _id(metadata, name)
        if index is not None:
            config[f"{setting}_token"] = vocabulary.tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = str(template)
    return config
