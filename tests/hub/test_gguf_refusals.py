"""GGUF files that say what the conversion cannot follow, or nonsense: one sentence that names it."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
import tiny_gguf as tiny

from millpond.hub.errors import SourceError
from millpond.hub.gguf import convert_gguf
from millpond.hub.gguf_keys import check_keys
from millpond.hub.progress import SilentProgress

Extra = dict[str, int | float | str]


def convert(source: Path) -> None:
    target = source.with_suffix(".converted")
    target.mkdir(exist_ok=True)
    convert_gguf(source, target, SilentProgress())


def refusal(source: Path) -> str:
    with pytest.raises(SourceError) as caught:
        convert(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(tmp_path: Path, arch: str = "llama", extra: Extra | None = None) -> Path:
    tiny.write_gguf(tmp_path / "m.gguf", arch, tiny.random_weights(arch), extra=extra)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("llama.attention.scale", 0.5),
        ("llama.attention.causal", 0),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.logit_scale", 0.25),
        ("llama.embedding_scale", 12.0),
        ("llama.residual_scale", 0.2),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.use_parallel_residual", 1),
        ("llama.heard_of_by_nobody", 3),
        ("qwen3.attention.sliding_window", 32),
        ("gemma3.attention.sliding_window_pattern", 4),
        ("gemma3.rope.freq_base_swa", 20000.0),
    ],
)
def test_fields_that_nothing_maps_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(SourceError, match=f"^GGUF field {field} is"):
        check_keys(field.partition(".")[0], [(field, value)], 512)


def test_an_unmapped_field_keeps_a_file_from_being_converted(tmp_path: Path) -> None:
    assert "llama.logit_scale is 0.25" in refusal(made(tmp_path, extra={"llama.logit_scale": 0.25}))


def test_what_describes_the_file_or_asks_for_nothing_is_passed_over(tmp_path: Path) -> None:
    extra: Extra = {
        "general.name": "Tiny",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.sampling.temp": 0.6,
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.entries_count": 224,
        "imatrix.chunk_count": 125,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.fim_pre_token_id": 1,
        "llama.vocab_size": tiny.VOCAB,
        "llama.rope.dimension_count": tiny.HEAD_DIM,
        "llama.attention.value_length": tiny.HEAD_DIM,
        "llama.expert_count": 0,
        "llama.final_logit_softcapping": 0.0,
        "llama.logit_scale": 1.0,
        "llama.attention.sliding_window": 512,
        "split.count": 1,
        "somebody.else": 3,
    }
    convert(made(tmp_path, extra=extra))


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    told = refusal(made(tmp_path, extra={"split.count": 2, "split.no": 0, "split.tensors.count": 90}))
    assert "is part 1 of 2 (split.count)" in told
    assert "--merge" in told


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor is missing"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count": "four"}, "llama.attention.head_count is 'four'"),
        ({"llama.attention.head_count": 2.5}, "llama.attention.head_count is 2.5"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "llama.attention.layer_norm_rms_epsilon is nan"),
        ({"llama.block_count": 2**31}, "llama.block_count is"),
        ({"llama.block_count": 6}, "llama.block_count is 6: the file has tensors of 7 layers"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8"),
        ({"tokenizer.ggml.eos_token_id": 4000}, "tokenizer.ggml.eos_token_id is 4000"),
        ({"split.count": "two"}, "split.count is 'two'"),
    ],
)
def test_values_that_make_no_sense_are_named(extra: Extra, named: str, tmp_path: Path) -> None:
    assert named in refusal(made(tmp_path, extra=extra))


def head(*entries: bytes, tensors: int = 0) -> bytes:
    """Magic, version, counts and fields."""
    return b"GGUF" + number(3, 4) + number(tensors) + number(len(entries)) + b"".join(entries)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def entry(name: bytes, kind: gguf.GGUFValueType, value: bytes) -> bytes:
    return number(len(name)) + name + number(kind, 4) + value


ARRAY, STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (head(entry(b"a", ARRAY, (number(ARRAY, 4) + number(1)) * 5000)), "arrays of arrays"),
        (head(entry(b"a", ARRAY, number(0, 4) + number(2**60))), f"an array of {2**60} entries"),
        (head(entry(b"a", ARRAY, number(0, 4) + number(2**20))), "it ends before"),
        (head(entry(b"a", STRING, number(2**63) + b"x")), "it ends before"),
        (head(entry(b"\xff", STRING, number(1) + b"x")), "utf-8"),
        (head(entry(b"a", STRING, number(1) + b"\xff")), "field a is not UTF-8"),
        (head(tensors=2**62), "it ends before"),
        (head(tensors=1) + number(1) + b"t" + number(2**31, 4), "it ends before"),
        (head(tensors=1) + number(1) + b"t" + number(0, 4) + number(8, 4) + number(0), "out of range"),
    ],
)
def test_shapes_of_a_file_that_cannot_be(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert told in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize("dimensions", [(), (64,)])
def test_an_embedding_that_is_no_matrix(dimensions: tuple[int, ...], tmp_path: Path) -> None:
    name = b"token_embd.weight"
    shape = number(len(dimensions), 4) + b"".join(number(n) for n in dimensions)
    content = head(entry(b"general.architecture", STRING, number(5) + b"llama"), tensors=1)
    content += number(len(name)) + name + shape + number(0, 4) + number(0)
    (tmp_path / "m.gguf").write_bytes(content + bytes(32 - len(content) % 32 + 256))
    assert "token_embd.weight has" in refusal(tmp_path / "m.gguf")


def test_whatever_is_changed_in_a_head_it_is_converted_or_refused(tmp_path: Path) -> None:
    whole, mutated = made(tmp_path).read_bytes(), tmp_path / "mutated.gguf"
    size = whole.index(b"blk.6.ffn_norm.weight") + 64
    chance = random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(size)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        mutated.write_bytes(content[: chance.choice((len(content), len(content), chance.randrange(len(content))))])
        with suppress(SourceError):
            convert(mutated)
