"""Convert a GGUF file into an ordinary MLX model folder. No mlx needed.

Quantised types that MLX has too stay quantised, bit for bit; everything else becomes one 16-bit float type. The folder
then loads like any other, here and in every other MLX program.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

from millpond.hub.errors import SourceError
from millpond.hub.gguf_config import Config, Json, architecture, build_config, read_metadata
from millpond.hub.gguf_file import open_gguf, text_or_number
from millpond.hub.gguf_keys import check_keys
from millpond.hub.gguf_tensors import GROUP, KEPT_TYPES, mlx_name, pack, row_order, to_float
from millpond.hub.gguf_tokenizer import build_tokenizer, read_vocabulary
from millpond.hub.progress import Progress
from millpond.hub.shards import ShardWriter

FORMAT = 2
"""Raise it when the same file would convert to a different folder, or is refused where it was not."""
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Write the model in ``source`` as config.json, *.safetensors and tokenizer files into ``target``.

    ``target`` must exist and be empty. Raises SourceError when the file is no GGUF or holds a model we cannot convert;
    ``target`` is then left half filled. Raises OSError where it cannot be written.
    """
    try:
        _convert(open_gguf(source), source, target, progress)
    except (SourceError, OSError, MemoryError):
        raise
    except Exception as error:  # a vocabulary or shapes that do not go together, which no check above has named
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(f"{source} cannot be converted, its content does not fit together: {told}") from error


def _convert(reader: GGUFReader, source: Path, target: Path, progress: Progress) -> None:
    metadata = read_metadata(reader)
    arch = architecture(metadata)
    names = {tensor.name for tensor in reader.tensors}
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise SourceError(f"{source}: GGUF tensor token_embd.weight is missing")
    if len(embedding.shape) != 2:
        raise SourceError(f"{source}: GGUF tensor token_embd.weight has {len(embedding.shape)} dimensions, not 2")
    config = build_config(
        metadata, vocab_size=int(embedding.shape[1]), tied="output.weight" not in names, rope_factors=_rope(reader)
    )
    context = config["max_position_embeddings"]
    assert isinstance(context, int)
    check_keys(arch, ((name, text_or_number(reader, name)) for name in reader.fields), context)
    _check_layers(arch, names, config["num_hidden_layers"])
    progress.say(f"Converting {source.name}: tokenizer")
    built = build_tokenizer(read_vocabulary(reader), metadata, context)
    (target / "tokenizer.json").write_text(built.tokenizer_json, encoding="utf-8")
    _write_json(target / "tokenizer_config.json", built.config)

    bits = _write_weights(reader, arch, config, target, progress)
    if bits:
        config["quantization"] = _quantization(bits)
    ends: Config = {"bos_token_id": built.bos_token_id, "eos_token_id": list(built.eos_token_ids)}
    _write_json(target / "config.json", config | ends)
    _write_json(target / "generation_config.json", ends)


def _check_layers(arch: str, names: set[str], told: Json) -> None:
    found = {name.split(".")[1] for name in names if name.startswith("blk.")}
    if told != len(found):
        raise SourceError(f"GGUF field {arch}.block_count is {told}: the file has tensors of {len(found)} layers")


def _rope(reader: GGUFReader) -> npt.NDArray[np.float32] | None:
    return next((to_float(tensor) for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)


def _write_weights(reader: GGUFReader, arch: str, config: Config, target: Path, progress: Progress) -> dict[str, int]:
    """Write every tensor; returns the bits of each quantised module by path."""
    types = {tensor.tensor_type for tensor in reader.tensors}
    # Scales of kept quantised matrices are float16, and a model computes in one type.
    wide = GGMLQuantizationType.BF16 in types and not types & KEPT_TYPES
    bits: dict[str, int] = {}
    with (
        ShardWriter(target, "bfloat16" if wide else "float16") as writer,
        progress.bar("Converting weights", sum(int(t.n_bytes) for t in reader.tensors), "B") as advance,
    ):
        for tensor in reader.tensors:
            if tensor.name != ROPE_FACTORS:
                _write_tensor(tensor, arch, config, writer, bits)
            advance(int(tensor.n_bytes))
    return bits


def _write_tensor(tensor: ReaderTensor, arch: str, config: Config, writer: ShardWriter, bits: dict[str, int]) -> None:
    module, kind = mlx_name(arch, tensor.name)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    packed = pack(tensor) if kind == "weight" else None
    order = row_order(arch, module, int(tensor.shape[-1]), heads, kv_heads)
    if packed is not None:
        rows = slice(None) if order is None else order
        writer.add(f"{module}.weight", packed.weight[rows])
        writer.add(f"{module}.scales", packed.scales[rows])
        writer.add(f"{module}.biases", packed.biases[rows])
        bits[module] = packed.bits
        return
    values = to_float(tensor)
    if arch == "gemma3" and module.endswith("norm"):
        # The file holds what the norm multiplies by; MLX's Gemma adds the 1 itself.
        values = values - np.float32(1)
    writer.add(f"{module}.{kind}", values if order is None else values[order])


def _quantization(bits: dict[str, int]) -> Config:
    """config.json's entry: the commonest width as the default, the others by path."""
    widths = list(bits.values())
    default = max(set(widths), key=widths.count)
    entry: Config = {"group_size": GROUP, "bits": default, "mode": "affine"}
    for module, width in sorted(bits.items()):
        if width != default:
            entry[module] = {"group_size": GROUP, "bits": width}
    return entry


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
