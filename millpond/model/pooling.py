"""One vector of a whole prompt, for models that declare how theirs is made.

Such a model's folder has the files of sentence-transformers: modules.json names what comes behind the network, and
1_Pooling/config.json which of its tokens count. Engine thread only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from millpond.model.prompt import Prompt
from millpond.model.upstream import cache_arrays, new_cache

MODULES = "modules.json"
KINDS: Final = ["Transformer", "Pooling", "Normalize"]
MODES: Final = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
TRIED: Final = (0, 1, 2, 3)
"""Tokens of the prompt with which the hidden states are found."""
NEAR = 1e-2
"""Of the spread of logits: what two ways to them may differ by, whatever the element type."""
Body = Callable[..., mx.array]


class NotPooled(Exception):  # noqa: N818 - it says what a model is not
    """No vectors of prompts can be made; why, as a sentence goes on."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a model's vectors are made."""

    mode: str
    """Of the last token (``last``), or the mean over all (``mean``)."""
    normalised: bool
    """Their length is 1."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """What makes vectors of prompts."""

    pooling: Pooling
    body: Body
    """The network without its head: tokens int [1, n] and caches to hidden states [1, n, D]."""
    size: int
    """D."""


class Pooled:
    """What has been read of one prompt."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.reset()

    def reset(self) -> None:
        """Nothing has been read."""
        self._sum: mx.array | None = None
        self._count = 0

    def read(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        """Append ``tokens`` to the prompt, and wait for it."""
        if not tokens:
            return
        hidden = self._embedder.body(mx.array([tokens], dtype=mx.int32), cache=prompt.caches)[0].astype(mx.float32)
        if self._embedder.pooling.mode == "last":
            self._sum, self._count = hidden[-1], 1
        else:
            self._sum = hidden.sum(axis=0) if self._sum is None else self._sum + hidden.sum(axis=0)
            self._count += len(tokens)
        mx.eval(self._sum, cache_arrays(prompt.caches))
        prompt.packed_after(prompt.length, len(tokens))

    def vector(self) -> bytes:
        """Of all that was read: float32 [D], little-endian. Raises ArithmeticError where it is not finite."""
        assert self._sum is not None
        found = np.array(self._sum).astype(np.float64) / self._count
        if self._embedder.pooling.normalised:
            found /= max(float(np.linalg.norm(found)), 1e-12)
        if not np.isfinite(found).all():
            raise ArithmeticError("the model produced hidden states that are not finite")
        return found.astype("<f4").tobytes()


def embedder_of(folder: Path, network: nn.Module) -> Embedder:
    """What makes vectors of prompts. Raises NotPooled."""
    pooling = _declared(folder)
    body = getattr(network, "model", None)
    if not callable(body):
        raise NotPooled("its network has no part that ends with hidden states")
    try:
        hidden = body(mx.array([TRIED]), cache=new_cache(network))
        expected = network(mx.array([TRIED]), cache=new_cache(network)).astype(mx.float32)
        head = getattr(network, "lm_head", None)
        logits = (head(hidden) if head is not None else body.embed_tokens.as_linear(hidden)).astype(mx.float32)
        wrong = mx.abs(logits - expected).max() / mx.maximum(expected.max() - expected.min(), 1e-6)
        alike = logits.shape == expected.shape and bool((wrong < NEAR).item())
    except Exception as error:  # whatever a class of mlx-lm does that is made otherwise
        raise NotPooled(f"its hidden states cannot be had ({type(error).__name__})") from error
    if not alike:
        raise NotPooled("what its head reads is not what its body ends with")
    return Embedder(pooling, body, int(hidden.shape[-1]))


def _declared(folder: Path) -> Pooling:
    """What the folder says. Raises NotPooled."""
    if not (folder / MODULES).is_file():
        raise NotPooled(f"it declares no pooling (its folder has no {MODULES})")
    config, modules = _read(folder / "config.json"), _read(folder / MODULES)
    if isinstance(config, dict) and config.get("use_bidirectional_attention"):
        raise NotPooled("its tokens see those behind them, which is not supported")
    listed = [one for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    kinds = [str(module.get("type")).rpartition(".")[2] for module in listed]
    if kinds not in (KINDS[:2], KINDS):
        told = ", ".join(kinds) or "no list of modules"
        raise NotPooled(f"its {MODULES} has {told}; supported are {', '.join(KINDS)}, or the first two of them")
    path = str(listed[1].get("path"))
    pooling = _read(folder / path / "config.json") if re.fullmatch(r"\w+", path) else None
    modes = pooling.items() if isinstance(pooling, dict) else ()
    chosen = [name for name, on in modes if name.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise NotPooled(f"its pooling is {' and '.join(chosen) or 'not said'}; supported are {' and '.join(MODES)}")
    return Pooling(MODES[chosen[0]], "Normalize" in kinds)


def _read(file: Path) -> object:
    """Raises NotPooled."""
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotPooled(f"its {file.name} cannot be read") from error
    return found
