"""Which tensors of a checkpoint are a head for multi-token prediction (MTP), family by family. No mlx_lm here.

A head is one layer of the model's own kind, between what joins two vectors and a last norm. So its layer is loaded as
that of a model of one layer (``upstream``), by whatever mlx-lm's class does with the tensors of such a layer; what
joins is our own (``mtp``). mlx-lm's classes drop heads, or fail over them, so these tensors are taken out before.
Engine thread only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

Arrays = dict[str, mx.array]
"""Tensors by name."""
CLAIMS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
"""Keys of config.json that say how many heads there are, whether they are or not."""
NAMED = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn)\.")
"""Tensors of heads, by what most families call them."""
NUMBERED = re.compile(r"^(?:language_model\.|model\.)+layers\.(\d+)\.")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|scales|biases)")
PART = re.compile(r"(^|\.)model\.(layers\.0|norm)\.|^backbone\.(layers|norm_f)\.")
"""Parameters of a model of one layer that are a head's."""
BLOCK = re.compile(r"layers\.(\d+)\.(?:mixer\.)?(\w+)")
BLOCKS = {"q_proj": "*", "experts": "E", "switch_mlp": "E", "up_proj": "-"}
"""What a block of layers that are cut into such is, in config.json's signs, by the first part that only it has."""


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
    into: str = "model.layers.0."
    """Begins the names of its layer's tensors in a model that has only that."""
    norm: str = "model.norm"
    """What that model's last norm is called."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Projections of single experts → what they are called where they are in one array, if that is another name."""
    in_blocks: bool = False
    """Its layer is cut into blocks, each with a norm of its own, in an order that differs from head to head."""


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
_NEMOTRON = HeadLayout(
    place=re.compile(r"^mtp\."),
    from_layers=False,
    joint={"layers.0.enorm": "embedding_norm", "layers.0.hnorm": "hidden_norm", "layers.0.eh_proj": "fc"},
    final="final_layernorm",
    layer="layers.",
    embedding_first=True,
    one_layer={"layers_block_type": None, "layer_types": None},
    into="backbone.layers.",
    norm="backbone.norm_f",
    experts={"up_proj": "fc1", "down_proj": "fc2"},
    in_blocks=True,
)
LAYOUTS: Mapping[str, HeadLayout] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), _QWEN),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_lite"), _DEEPSEEK),
    "mimo": _MIMO,
    "nemotron_h": _NEMOTRON,
}
"""By the module of the model's class in mlx-lm."""


class StrangeHeadError(Exception):
    """A head is not made as those of its family are; the message says where."""


def split(arrays: Mapping[str, mx.array], layout: HeadLayout, layers: object) -> tuple[Arrays, list[Arrays]]:
    """The tensors of a model of so many layers, and those of its heads, in order, by their names in a head."""
    if layout.from_layers and not isinstance(layers, int):
        return dict(arrays), []
    own: Arrays = {}
    heads: dict[int, Arrays] = {}
    for name, array in arrays.items():
        found = layout.place.match(name)
        number = int(found[1]) if found is not None and found.groups() else 0
        if found is None or (isinstance(layers, int) and layout.from_layers and number < layers):
            own[name] = array
        else:
            heads.setdefault(number, {})[name[found.end() :]] = array
    return own, [heads[number] for number in sorted(heads)]


def fitted(tensors: Arrays, layout: HeadLayout) -> tuple[Arrays, HeadLayout]:
    """A head's tensors and layout, where that depends on its blocks; of several heads' those of the first. Raises
    StrangeHeadError."""
    if not layout.in_blocks:
        return tensors, layout
    parts: dict[int, set[str]] = {}
    for name in tensors:
        if (block := BLOCK.match(name)) is not None:
            parts.setdefault(int(block[1]), set()).add(block[2])
    last = min((number for number, found in parts.items() if layout.final in found), default=-1)
    signs = [next((sign for part, sign in BLOCKS.items() if part in parts.get(n, ())), "?") for n in range(last + 1)]
    if signs.count("*") != 1 or "?" in signs:
        raise StrangeHeadError(
            f"it is made of the blocks {''.join(signs)!r}; one has to have attention (*), and none may be unknown"
        )
    own = {name: array for name, array in tensors.items() if (b := BLOCK.match(name)) is None or int(b[1]) <= last}
    one_layer = {**layout.one_layer, "num_hidden_layers": last + 1, "hybrid_override_pattern": signs}
    return own, replace(layout, final=f"layers.{last}.{layout.final}", one_layer=one_layer)


def sorted_out(tensors: Arrays, layout: HeadLayout, *, raw: bool) -> HeadTensors:
    """What is what in a head. ``raw``: its model's file is as it was published. Raises StrangeHeadError."""
    experts = _stacked(tensors, layout.experts)
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
            found.layer[f"{layout.norm}.{last}"] = array
        elif name.startswith(layout.layer):
            found.layer[layout.into + name.removeprefix(layout.layer)] = array
        else:
            raise StrangeHeadError(f"nobody knows what its tensor {name!r} is for")
    return found


def _stacked(tensors: Arrays, names: Mapping[str, str]) -> Arrays:
    """With the experts of each projection in one array, as mlx-lm's classes have them."""
    found: Arrays = {}
    apart: dict[str, dict[int, mx.array]] = {}
    for name, array in tensors.items():
        if (expert := EXPERT.fullmatch(name)) is None:
            found[name] = array
        else:
            projection = names.get(expert[3], expert[3])
            place = f"{expert[1].removesuffix('experts')}switch_mlp.{projection}.{expert[4]}"
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
