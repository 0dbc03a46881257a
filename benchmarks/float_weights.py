"""Write a float32 copy of an MLX model folder: what an mlx-lm based server needs to use a fast BLAS on a CPU.

    python benchmarks/float_weights.py FOLDER DESTINATION

Quantised layers are dequantised; everything else is cast. The tokenizer and the other files are copied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer, save


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def write_float32(source: Path, destination: Path) -> None:
    """Convert ``source``, a folder that mlx-lm can load, into ``destination``, which must not exist or be empty."""
    mx.set_default_device(mx.Device(mx.cpu))
    model, config = load_model(source)
    tokenizer = load_tokenizer(source)  # type: ignore[no-untyped-call]
    model = dequantize_model(model)
    model.update(tree_map(_float32, model.parameters()))
    mx.eval(model.parameters())
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    save(destination, str(source), model, tokenizer, {**plain, "torch_dtype": "float32", "dtype": "float32"})
    for file in source.glob("chat_template*"):
        if not (destination / file.name).exists():
            (destination / file.name).write_bytes(file.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    if not (args.source / "config.json").is_file():
        print(f"{args.source} is not a model folder: it has no config.json", file=sys.stderr)
        return 1
    if args.destination.exists() and any(args.destination.iterdir()):
        print(f"{args.destination} is not empty", file=sys.stderr)
        return 1
    write_float32(args.source, args.destination)
    print(args.destination)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
