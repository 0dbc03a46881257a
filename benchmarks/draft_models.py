"""Draft models for benchmarks/speculation.py, where there is no small model with the same tokens.

    python benchmarks/draft_models.py rounded  FOLDER OUT [--bits 4]    the model itself with rounded weights
    python benchmarks/draft_models.py stranger FOLDER OUT               a tiny random one, which is never right

FOLDER is a model in MLX's format of the Llama family.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx

GROUP = 64


def rounded(folder: Path, out: Path, bits: int) -> None:
    """Every matrix packed to ``bits`` and unpacked again."""
    for file in folder.glob("*.safetensors"):
        weights = mx.load(str(file))
        assert isinstance(weights, dict)
        kept = {}
        for name, array in weights.items():
            if array.ndim == 2 and array.shape[1] % GROUP == 0 and array.dtype != mx.uint32:
                packed = mx.quantize(array.astype(mx.float32), GROUP, bits)
                array = mx.dequantize(*packed, GROUP, bits).astype(array.dtype)
            kept[name] = array
        mx.save_safetensors(str(out / file.name), kept)


def stranger(folder: Path, out: Path) -> None:
    """Two narrow layers of noise."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    width, heads = 64, 2
    config |= {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "tie_word_embeddings": True,
    }
    (out / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for layer in range(2):
        start = f"model.layers.{layer}."
        shapes |= {start + f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {start + f"mlp.{name}_proj.weight": (2 * width, width) for name in ("gate", "up")}
        shapes[start + "mlp.down_proj.weight"] = (width, 2 * width)
        shapes |= {start + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    weights = {name: mx.random.normal(shape) * (0.3 if len(shape) == 2 else 1.0) for name, shape in shapes.items()}
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draft models for benchmarks/speculation.py.")
    parser.add_argument("kind", choices=["rounded", "stranger"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    for file in given.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, given.out / file.name)
    if given.kind == "rounded":
        rounded(given.folder, given.out, given.bits)
    else:
        stranger(given.folder, given.out)


if __name__ == "__main__":
    main()
