"""The files by which a model's folder declares how vectors of texts are made."""

from __future__ import annotations

import json
from pathlib import Path

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def declare(folder: Path, mode: str = "lasttoken", modules: object = (TRANSFORMER, POOLING, NORMALIZE)) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "lasttoken")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder
