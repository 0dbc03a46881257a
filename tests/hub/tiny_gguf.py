"""Small GGUF files with known content, as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 64, 4, 2, 16, 96, 7
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Q4_1, Q8_0, F16, BF16 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F16", "BF16"))


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a byte-level vocabulary: all bytes, one merge, three control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = [chr(byte) for byte in printable]
    spelled += [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*SPECIAL, *spelled, "he"]
    return tokens, [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)), ["h e"]


VOCAB = len(vocabulary()[0])


def interleaved(weight: Floats, heads: int) -> Floats:
    """Rows of a projection in the order Llama files have: each head's two halves interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def random_weights(arch: str, seed: int = 0) -> dict[str, Floats]:
    """Every tensor of a tiny model by GGUF name, values as MLX should see them."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Floats:
        return (rng.standard_normal((rows, columns)) / 8).astype(np.float32)

    def norm(size: int) -> Floats:
        return rng.uniform(0.5, 1.5, size).astype(np.float16).astype(np.float32)

    weights = {"token_embd.weight": matrix(VOCAB, WIDTH), "output_norm.weight": norm(WIDTH)}
    for layer in range(LAYERS):
        block = {
            "attn_q.weight": matrix(HEADS * HEAD_DIM, WIDTH),
            "attn_k.weight": matrix(KV_HEADS * HEAD_DIM, WIDTH),
            "attn_v.weight": matrix(KV_HEADS * HEAD_DIM, WIDTH),
            "attn_output.weight": matrix(WIDTH, HEADS * HEAD_DIM),
            "ffn_gate.weight": matrix(HIDDEN, WIDTH),
            "ffn_up.weight": matrix(HIDDEN, WIDTH),
            "ffn_down.weight": matrix(WIDTH, HIDDEN),
            "attn_norm.weight": norm(WIDTH),
            "ffn_norm.weight": norm(WIDTH),
        }
        if arch == "qwen2":
            block |= {
                f"attn_{part}.bias": norm(rows * HEAD_DIM)
                for part, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
            }
        if arch in ("qwen3", "gemma3"):
            block |= {"attn_q_norm.weight": norm(HEAD_DIM), "attn_k_norm.weight": norm(HEAD_DIM)}
        if arch == "gemma3":
            block |= {"post_attention_norm.weight": norm(WIDTH), "post_ffw_norm.weight": norm(WIDTH)}
        weights |= {f"blk.{layer}.{name}": value for name, value in block.items()}
    return weights


def write_gguf(
    path: Path,
    arch: str,
    weights: dict[str, Floats],
    kind: gguf.GGMLQuantizationType = F16,
    extra: dict[str, int | float | str] | None = None,
) -> None:
    """Write a model; matrices become ``kind``, vectors stay float32. ``extra`` fields override the standard ones."""
    writer = gguf.GGUFWriter(str(path), arch)
    fields: dict[str, int | float | str] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": WIDTH,
        f"{arch}.feed_forward_length": HIDDEN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }
    if arch == "gemma3":
        fields["gemma3.attention.sliding_window"] = 32
    for name, value in (fields | (extra or {})).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    tokens, types, merges = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name, value in weights.items():
        if arch == "llama" and "attn_q." in name:
            value = interleaved(value, HEADS)
        elif arch == "llama" and "attn_k." in name:
            value = interleaved(value, KV_HEADS)
        if value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
