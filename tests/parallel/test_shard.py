"""What can be divided is, and what cannot is refused in words that say what can."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from group_driver import Group
from mlx.utils import tree_flatten
from tiny_models import CONFIGS, build, config_of, save

from millpond.model.load import ModelError, load
from millpond.model.shard import CannotShard, agreement, shard

DIVISIBLE = ("llama", "qwen3", "deepseek_v2")


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in DIVISIBLE])
def test_a_model_that_mlx_lm_cannot_divide_is_refused(kind: str, tmp_path: Path) -> None:
    group = mx.distributed.init()
    with pytest.raises(CannotShard, match=f"tp: mlx-lm cannot divide a model of type '{kind}'; serve it with tp 1"):
        shard(build(kind), config_of(kind), group)
    with pytest.raises(ModelError, match="cannot divide a model"):
        load(save(kind, tmp_path), 0, lambda _: None, group=group)


@pytest.mark.parametrize("kind", DIVISIBLE)
def test_divided_by_one_it_stays_as_it_is(kind: str) -> None:
    network, tokens = build(kind), mx.array([[1, 2, 3, 4]])
    whole = network(tokens)
    sizes = {name: array.shape for name, array in tree_flatten(network.parameters())}
    shard(network, config_of(kind), mx.distributed.init())
    assert {name: array.shape for name, array in tree_flatten(network.parameters())} == sizes
    assert mx.allclose(network(tokens), whole, atol=1e-5).item()


def test_a_lone_rank_agrees_with_itself() -> None:
    agree = agreement(mx.distributed.init())
    assert agree(mx.array([3, 0, 255], dtype=mx.int32)).tolist() == [3, 0, 255]


@pytest.mark.often("gemma3_text")
@pytest.mark.parametrize(
    ("kind", "world", "said"),
    [
        ("llama", 3, "tp: 3 ranks cannot share this model's 4 attention heads; allowed: 1, 2"),
        ("llama", 4, "tp: 4 ranks cannot share this model's 2 key value heads; allowed: 1, 2"),
        ("gemma3_text", 2, "tp: mlx-lm cannot divide a model of type 'gemma3_text'; serve it with tp 1"),
    ],
)
def test_a_group_that_cannot_share_a_model_says_why(kind: str, world: int, said: str, tmp_path: Path) -> None:
    """Every rank finds it out by itself, and any may be the first to say it."""
    with Group(save(kind, tmp_path / kind), world, tmp_path) as group:
        assert group.failure().endswith(said)
        assert all(process.wait(60) != 0 for process in group.processes)


def test_every_rank_holds_its_share(tmp_path: Path) -> None:
    with Group(save("llama", tmp_path / "llama"), 2, tmp_path) as group:
        info = group.ready()
        assert info.ranks == 2
        assert info.kv_bytes_per_token == 4 * 2 * 1 * 16 * 4  # layers, keys and values, one head of two, float32
        whole = sum(array.nbytes for _, array in tree_flatten(build("llama").parameters()))
        assert info.weight_bytes < whole
        assert group.stop() == [0, 0]
