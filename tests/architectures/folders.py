"""Small models with random weights, at least one for each module of mlx-lm that holds one, as ordinary folders."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes

TABLE = Path(__file__).parent / "models.toml"
VOCAB = 320
SPREAD = 2.0
"""Of what a layer makes of its input: large enough that the next token depends on the whole context."""
AS_MADE = ("A_log", "dt_bias", "e_score_correction_bias", "expert_bias", "signs")
"""Parameters that mean something else than a product."""
OWN_KEYS = ("like", "null", "embeddings", "rereads", "text_config")
"""Of a table in the file, those that config.json does not have as they are."""
Config = dict[str, object]


@cache
def _tables() -> dict[str, dict[str, Config]]:
    return tomllib.loads(TABLE.read_text())


def names() -> list[str]:
    """MODULE or MODULE@VARIANT."""
    return list(_tables()["model"])


def rereads(name: str) -> str:
    """Why an answer that is read again, as a part of a prompt, gives other numbers, in mlx-lm itself; else empty."""
    return cast(str, _table(name).get("rereads", ""))


def module_of(name: str) -> str:
    """The module of mlx-lm that it is there for."""
    return name.partition("@")[0]


def config_of(name: str) -> Config:
    """What config.json says."""
    return {"model_type": module_of(name), **_whole(_table(name))}


def _table(name: str) -> Config:
    return _tables()["model"].get(name) or guessed(name)


def _whole(table: Config) -> Config:
    found: Config = {}
    for base in cast(list[str], table.get("like", [])):
        found |= _tables()["base"][base]
    found |= dict.fromkeys(cast(list[str], table.get("null", [])))
    found |= {key: value for key, value in table.items() if key not in OWN_KEYS}
    if isinstance(text := table.get("text_config"), dict):
        found["text_config"] = _whole(text)
    return found


def installed() -> list[str]:
    """The modules of the installed mlx-lm that hold a model."""
    (folder,) = mlx_lm.models.__path__
    return sorted(
        file.stem for file in Path(folder).glob("*.py") if re.search(r"^class Model\b", file.read_text(), re.M)
    )


def unknown() -> list[str]:
    """Those for which there is no folder."""
    return sorted(set(installed()) - {module_of(name) for name in names()})


def guessed(module: str) -> Config:
    """What might do for a module that nobody has described: what others have under the names of its arguments."""
    small: Config = {}
    for table in [*_tables()["model"].values(), *_tables()["base"].values()]:
        small |= {key: value for key, value in table.items() if key not in OWN_KEYS}
    arguments = inspect.signature(import_module(f"mlx_lm.models.{module}").ModelArgs).parameters
    return {key: small[key] for key in arguments if key in small and key != "model_type"}


def with_vocabulary(config: Config, size: int) -> Config:
    """The same model for another tokenizer."""
    found = config | {"vocab_size": size}
    if isinstance(text := config.get("text_config"), dict):
        found["text_config"] = text | {"vocab_size": size}
    return found


def save(name: str, folder: Path, config: Config | None = None) -> Path:
    """Write the model as an MLX folder (no tokenizer), in float32; ``config`` instead of its usual one."""
    config = config or config_of(name)
    model_class, arguments = _get_classes(config)
    network = cast(nn.Module, model_class(arguments.from_dict(config)))
    mx.random.seed(0)
    embeddings = cast(float, _table(name).get("embeddings", 0.0))
    network.update(tree_map_with_path(lambda path, array: _weight(path, array, embeddings), network.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    weights = cast(Mapping[str, mx.array], dict(tree_flatten(network.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _weight(path: str, array: mx.array, embeddings: float) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if path.endswith("sinks"):
        return mx.random.normal(array.shape)
    if array.ndim < 2 or path.endswith(AS_MADE):
        return array.astype(mx.float32)
    if embeddings and "embed" in path:
        return mx.random.normal(array.shape) * embeddings
    return mx.random.normal(array.shape) * (SPREAD / max(array.shape[-1], 1) ** 0.5)
