"""A head for multi-token prediction (MTP): one layer that guesses the token behind the next one.

At the place of token t it reads the hidden state behind token t-1, as the model's output layer reads it, beside the
embedding of t, and ends with what stands for the hidden state behind t. Embedding and output layer are the model's own.
Engine thread only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar, Protocol, cast

import mlx.core as mx
import mlx.nn as nn


class HeadCache(Protocol):
    """Keys and values of a head's layer, as mlx-lm's layers use a cache."""

    def make_mask(self, N: int, return_array: bool, window_size: int | None) -> mx.array | str | None:  # noqa: N803
        """What each of N tokens sees."""


class HeadCarry(Protocol):
    """The hidden states behind the last tokens that were read, [n, 1, D]: what a head goes on from."""

    @property
    def arrays(self) -> list[mx.array]:
        """They themselves, as far as a step has to evaluate them."""

    def shift(self, hidden: mx.array) -> mx.array:
        """Of the hidden states behind new tokens, [n, L, D], the last is kept; those before the tokens come back."""


class Blocks(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """A layer that is cut into blocks, one of them with attention, as Nemotron's models are."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = list(blocks)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: HeadCache) -> mx.array:
        """As the layers of other models are called."""
        for block in self.blocks:
            x = block(x, mask=mask, cache=cache)  # those without attention look at neither
        return x

    def attended(self, x: mx.array, mask: mx.array | str | None, cache: HeadCache) -> mx.array:
        """Only as far as ``cache`` gets keys and values."""
        before = list(itertools.takewhile(lambda block: block.block_type != "*", self.blocks))
        for block in before:
            x = block(x)
        block = self.blocks[len(before)]
        found: mx.array = block.mixer(block.norm(x), mask=mask, cache=cache)
        return found


class Head(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """The layer between what joins the two vectors and the last norm."""

    OWN: ClassVar[tuple[str, ...]] = ("embedding_norm.", "hidden_norm.", "fc.")
    """Begins the names of parameters that are not the layer's or the last norm's."""

    def __init__(self, layer: nn.Module, norm: nn.RMSNorm, *, embedding_first: bool) -> None:
        """``layer`` and ``norm``: of a model that has one layer; its vectors have ``norm``'s size."""
        super().__init__()
        size, eps = int(norm.weight.shape[0]), float(norm.eps)
        self.embedding_norm = nn.RMSNorm(size, eps=eps)
        self.hidden_norm = nn.RMSNorm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layer = layer
        self.norm = norm
        self._embedding_first = embedding_first

    def __call__(self, hidden: mx.array, embedded: mx.array, cache: HeadCache) -> mx.array:
        """What stands for the hidden states behind tokens, from those before them and their embeddings; [n, L, D]
        each. ``cache`` gets the tokens' keys and values."""
        x = self._joined(hidden, embedded)
        found: mx.array = self.norm(self.layer(x, _mask(x, cache), cache))
        return found

    def follow(self, hidden: mx.array, embedded: mx.array, cache: HeadCache) -> mx.array:
        """Only read tokens, of which ``cache`` gets keys and values: it has once what comes back is evaluated."""
        x = self._joined(hidden, embedded)
        if isinstance(self.layer, Blocks):
            return self.layer.attended(x, _mask(x, cache), cache)
        found: mx.array = self.layer.self_attn(self.layer.input_layernorm(x), _mask(x, cache), cache)
        return found

    def _joined(self, hidden: mx.array, embedded: mx.array) -> mx.array:
        sides = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        joined: mx.array = self.fc(mx.concatenate(sides if self._embedding_first else sides[::-1], axis=-1))
        return joined


def body_of(network: nn.Module) -> nn.Module:
    """Of a model of a family whose heads are known, all but the output layer."""
    return cast(nn.Module, network.backbone if "backbone" in network else network.model)


def embeddings_of(network: nn.Module) -> nn.Module:
    """The same model's input layer."""
    body = body_of(network)
    return cast(nn.Module, body.embeddings if "embeddings" in body else body.embed_tokens)


def norm_of(network: nn.Module) -> nn.RMSNorm:
    """The same model's last norm."""
    body = body_of(network)
    return cast(nn.RMSNorm, body.norm_f if "norm_f" in body else body.norm)


def _mask(x: mx.array, cache: HeadCache) -> mx.array | str | None:
    # An array wherever there is a mask: latent attention adds it to scores of its own.
    return cache.make_mask(int(x.shape[1]), return_array=True, window_size=None)
