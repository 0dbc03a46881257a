"""What the recurrent layers of a forward of several columns are given, so that a part of it can be kept.

A recurrence's state behind fewer columns than were run is computed again from the state before and from what it was
given: a fraction of the layer, for which no weights are read. mlx-lm's model files import their recurrences by name;
``install`` puts ours around them, as attention.py does, and has convolutions note their inputs. What is noted belongs
to the slot that was read last (``kv/states``). Whether that is true of a model the probe finds out. Engine thread only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.states import NOTES, Recurrence

RECURRENCES = {
    "gated_delta_update": (("q", "k", "v", "a", "b"), 1),
    "ssm_update": (("hidden_states", "B", "C", "dt"), 1),
    "recurrent_gla": (("q", "k", "v"), 2),
}
"""mlx-lm's functions that return (outputs, state), by the names that its model files have for them: which of their
arguments have columns, and on which axis."""

Recurrent = Callable[..., tuple[mx.array, mx.array]]


class NotingConv1d(nn.Conv1d):  # type: ignore[misc]  # mlx.nn has no types
    """A convolution that notes what it is given, [n, kept + columns, channels]."""

    def __call__(self, x: mx.array) -> mx.array:
        if (notes := NOTES.get()) is not None:
            notes.convolved.append(x)
        convolved: mx.array = super().__call__(x)
        return convolved


class _Noting:
    """A recurrence that notes its arguments."""

    def __init__(self, function: Recurrent, columned: tuple[str, ...], axis: int) -> None:
        """``columned``: the arguments with columns, on ``axis``."""
        self._function = function
        self._signature = inspect.signature(function)
        self._columned = columned
        self._axis = axis

    def __call__(self, *args: object, **kwargs: object) -> tuple[mx.array, mx.array]:
        outputs, state = self._function(*args, **kwargs)
        notes = NOTES.get()
        if notes is not None and "mask" in self._signature.parameters:

            def at(counted: mx.array, counts: mx.array) -> mx.array:
                return self._again(self._signature.bind(*args, **kwargs), counted, counts)

            notes.recurrences.append(Recurrence(state, at))
        return outputs, state

    def _again(self, bound: inspect.BoundArguments, counted: mx.array, counts: mx.array) -> mx.array:
        for name in self._columned:
            bound.arguments[name] = mx.split(bound.arguments[name], [counted.shape[1]], axis=self._axis)[0]
        bound.arguments["mask"] = counted
        if "lengths" in self._signature.parameters:
            bound.arguments["lengths"] = counts
        return self._function(*bound.args, **bound.kwargs)[1]


def install(network: nn.Module) -> None:
    """Have the recurrent layers of ``network`` note what they are given whenever somebody wants to know."""
    for module in network.modules():
        if type(module) is nn.Conv1d and module.groups > 1:
            module.__class__ = NotingConv1d
    for name in {type(module).__module__ for module in network.modules()}:
        if not name.startswith("mlx_lm.models."):
            continue
        for function, (columned, axis) in RECURRENCES.items():
            known = getattr(sys.modules[name], function, None)
            if known is not None and not isinstance(known, _Noting):
                setattr(sys.modules[name], function, _Noting(known, columned, axis))
