"""config.json as popular models publish it: nothing in it keeps them from being served, and what is told is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millpond.model.config_keys import remarks_of
from millpond.model.config_rope import check_scaling, rope_changes
from millpond.model.context import context_of
from millpond.model.upstream import class_of

Config = dict[str, object]
PUBLISHED: dict[str, Config] = json.loads((Path(__file__).parent / "published_configs.json").read_text())
"""Of each model the keys that say something about its arithmetic."""
TOLD = {
    "Gemma 2": {"sliding_window"},
    "Mistral 0.1": {"sliding_window"},
    "Qwen2.5 1M": {"dual_chunk_attention_config"},
    "Phi-3 4k": {"sliding_window"},
    "StarCoder2": {"sliding_window"},
    "GLM-4 9B": {"partial_rotary_factor"},
}
"""What is said of those where answers may differ from the published model's."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_popular_models_are_not_refused(name: str) -> None:
    config = PUBLISHED[name]
    module, level, taken = class_of(config)
    context_of(config)
    if taken is None:
        return
    assert "text_config" in config or not rope_changes(level, taken, module) or "rope_parameters" in config
    check_scaling(level, taken, module)
    remarks = remarks_of(level, taken, module)
    assert {remark.split()[0].rstrip(":") for remark in remarks} == TOLD.get(name, set()), remarks
