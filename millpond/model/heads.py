"""Which tensors of a checkpoint are a head for multi-token prediction (MTP), family by family. No mlx_lm here.

A head is one layer of the model's own kind, between what joins two vectors and a last norm. So its layer is loaded as
that of a model of one layer (``upstream``), by whatever mlx-lm's class does with the tensors of such a layer; what
joins is our own (``mtp``). mlx-lm's classes drop heads, or fail over them, so these tensors are taken out before.
Engine thread only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

Arrays = dict[str, mx.array]
"""Tensors by name."""
CLAIMS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
"""Keys of config.json that say how many heads there are, whether they are or not."""
NAMED = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn)\.")
"""Tensors of heads, by what most families call them."""
NUMBERED = re.compile(r"^(?:language_model\.|model\.)+layers\.(\d+)\.")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|scales|biases)")
PART = re.compile(r"(^|\.)model\.(layers\.0|norm)\.")
"""Parameters of a model of one layer that are a head's."""


@dataclass(frozen=True)
class HeadLayout:
    """How a family's checkpoints hold their heads."""

    place: re.Pattern[str]
    """Begins the names of a head's tensors; a group is the number of the layer, or of the head."""
    from_layers: bool
    """That number counts the model's layers, too."""
    joint: Mapping[str, str]
    """Names in it, up to their last part → of ours: embedding_norm, hidden_norm, fc."""
    final: str
    """What the last norm is called."""
    layer: str
    """Begins the names of its layer's tensors."""
    embedding_first: bool
    """``fc`` takes the embedding before the hidden state."""
    one_layer: Mapping[str, object]
    """What config.json says of a model that has only such a layer."""
    shared: Sequence[str] = ()
    """Begins names of tensors that are the model's own once more."""
    zero_centred: bool = False
    """Files as they were published have norms that are to be one more."""


@dataclass
class HeadTensors:
    """What a checkpoint has of one head."""

    joint: Arrays = field(default_factory=dict)
    """By the names of Head's own parameters."""
    layer: Arrays = field(default_factory=dict)
    """By the names of a model of one layer."""


_QWEN = HeadLayout(
    place=re.compile(r"^(?:language_model\.|model\.)*mtp\."),
    from_layers=False,
    joint={"pre_fc_norm_embedding": "embedding_norm", "pre_fc_norm_hidden": "hidden_norm", "fc": "fc"},
    final="norm",
    layer="layers.0.",
    embedding_first=True,
    one_layer={"num_hidden_layers": 1, "full_attention_interval": 1, "mlp_only_layers": [], "decoder_sparse_step": 1},
    zero_centred=True,
)
_DEEPSEEK = HeadLayout(
    place=re.compile(r"^model\.layers\.(\d+)\."),
    from_layers=True,
    joint={"enorm": "embedding_norm", "hnorm": "hidden_norm", "eh_proj": "fc"},
    final="shared_head.norm",
    layer="",
    embedding_first=True,
    one_layer={"num_hidden_layers": 1, "first_k_dense_replace": 0},
    shared=("embed_tokens.", "shared_head.head."),
)
_MIMO = HeadLayout(
    place=re.compile(r"^model\.mtp_layers\.(\d+)\."),
    from_layers=False,
    joint={"token_layernorm": "embedding_norm", "hidden_layernorm": "hidden_norm", "input_proj": "fc"},
    final="final_layernorm",
    layer="",
    embedding_first=False,
    one_layer={"num_hidden_layers": 1},
)
LAYOUTS: Mapping[str, HeadLayout] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), _QWEN),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_lite"), _DEEPSEEK),
    "mimo": _MIMO,
}
"""By the module of the model's class in mlx-lm."""


class StrangeHeadError(Exception):
    """A head is not made as those of its family are; the message says where."""


def split(arrays: Mapping[str, mx.array], layout: HeadLayout, layers: int) -> tuple[Arrays, list[Arrays]]:
    """The tensors of a model of so many layers, and those of its heads, in order, by their names in a head."""
    own: Arrays = {}
    heads: dict[int, Arrays] = {}
    for name, array in arrays.items():
        found = layout.place.match(name)
        number = int(found[1]) if found is not None and found.groups() else 0
        if found is None or (layout.from_layers and number < layers):
            own[name] = array
        else:
            heads.setdefault(number, {})[name[found.end() :]] = array
    return own, [heads[number] for number in sorted(heads)]


def sorted_out(tensors: Arrays, layout: HeadLayout, *, raw: bool) -> HeadTensors:
    """What is what in a head. ``raw``: its model's file is as it was published. Raises StrangeHeadError."""
    experts = _stacked(tensors)
    raw = raw or experts.keys() != tensors.keys() or any(".experts." in name for name in tensors)
    found = HeadTensors()
    for name, given in experts.items():
        if name.startswith(tuple(layout.shared)):
            continue
        around_zero = layout.zero_centred and raw and given.ndim == 1 and "norm" in name
        array = given + 1.0 if around_zero else given
        before, _, last = name.rpartition(".")
        if before in layout.joint:
            found.joint[f"{layout.joint[before]}.{last}"] = array
        elif before == layout.final:
            found.layer[f"model.norm.{last}"] = array
        elif name.startswith(layout.layer):
            found.layer[f"model.layers.0.{name.removeprefix(layout.layer)}"] = array
        else:
            raise StrangeHeadError(f"nobody knows what its tensor {name!r} is for")
    return found


def _stacked(tensors: Arrays) -> Arrays:
    """With the experts of each projection in one array, as mlx-lm's classes have them."""
    found: Arrays = {}
    apart: dict[str, dict[int, mx.array]] = {}
    for name, array in tensors.items():
        if (expert := EXPERT.fullmatch(name)) is None:
            found[name] = array
        else:
            place = f"{expert[1].removesuffix('experts')}switch_mlp.{expert[3]}.{expert[4]}"
            apart.setdefault(place, {})[int(expert[2])] = array
    for place, experts in apart.items():
        found[place] = mx.stack([experts[number] for number in sorted(experts)])
    return found


def strange_heads(names: Sequence[str], level: Mapping[str, object]) -> bool:
    """Whether some of the tensors belong to a head of a family that is not known here."""
    layers = level.get("num_hidden_layers")
    numbers = [int(found[1]) for name in names if (found := NUMBERED.search(name)) is not None]
    return any(map(NAMED.search, names)) or (isinstance(layers, int) and max(numbers, default=0) >= layers)


def claimed(level: Mapping[str, object]) -> bool:
    """Whether config.json speaks of a head."""
    return any(isinstance(level.get(key), int) and level[key] for key in CLAIMS)
