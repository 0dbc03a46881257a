"""Recurrences of mlx-lm's models on a CPU, computed in C: there mlx-lm has only formulas, token after token or of whole
chunks, which read and write a state many times for each token.

``install`` puts ours in the place of mlx-lm's functions, in this process. Engine thread only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

import mlx.core as mx

from millpond.native import recurrence
from millpond.native.recurrence import Given, recurrent

Recurrence = Callable[..., tuple[mx.array, mx.array]]


def install() -> None:
    """Where this process computes in C, for the models whose files have been loaded."""
    if not recurrence.available():
        return
    for (name, function), ours in OURS.items():
        module = sys.modules.get(name)
        if module is not None and not hasattr(getattr(module, function), "__wrapped__"):
            setattr(module, function, ours(module))


def gated_delta(module: ModuleType) -> Recurrence:
    """What takes the place of ``gated_delta_ops`` in mlx-lm's module."""
    theirs: Recurrence = module.gated_delta_ops

    @functools.wraps(theirs)
    def gated_delta_ops(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """q and k [n, L, G, K], v [n, L, H, V], g [n, L, H] or [n, L, H, K], beta [n, L, H]."""
        if state is None:
            state = mx.zeros((v.shape[0], *v.shape[2:], k.shape[-1]))
        q32, k32, v32, g32, beta32 = (_float(array) for array in (q, k, v, g, beta))
        given = Given(q32, k32, v32, g32, beta32, counted=None if mask is None else _float(mask))
        if not given.fits(state):
            return theirs(q, k, v, g, beta, state, mask)
        read, state = recurrent(state, given)
        return read.astype(q.dtype), state

    return gated_delta_ops


def state_space(module: ModuleType) -> Recurrence:
    """What takes the place of ``ssm_attn`` in mlx-lm's module."""
    theirs: Recurrence = module.ssm_attn

    @functools.wraps(theirs)
    def ssm_attn(
        x: mx.array,
        A_log: mx.array,  # noqa: N803 - mlx-lm's names
        B: mx.array,  # noqa: N803
        C: mx.array,  # noqa: N803
        D: mx.array,  # noqa: N803
        dt: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        time_step_limit: tuple[float, float] = (0.001, 100.0),
        mask: mx.array | None = None,
        lengths: mx.array | None = None,
        step: int = 256,
    ) -> tuple[mx.array, mx.array]:
        """x [n, L, H, V], B and C [n, L, G, K], dt [n, L, H]. Of ``lengths`` and ``mask`` the mask says the same where
        there are both."""
        if state is None:
            state = mx.zeros((x.shape[0], *x.shape[2:], B.shape[-1]))
        steps = module.compute_dt(dt, dt_bias, time_step_limit)
        given = Given(
            queries=_float(C),
            keys=_float(B),
            values=_float(steps[..., None] * x),
            decays=mx.exp(steps * -mx.exp(_float(A_log))),
            counted=None if mask is None else _float(mask),
        )
        if not given.fits(state) or (lengths is not None and mask is None):
            return theirs(x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths, step)
        read, state = recurrent(state, given)
        return read.astype(x.dtype) + x * D[:, None], state

    return ssm_attn


def _float(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


OURS: Mapping[tuple[str, str], Callable[[ModuleType], Recurrence]] = {
    ("mlx_lm.models.gated_delta", "gated_delta_ops"): gated_delta,
    ("mlx_lm.models.ssm", "ssm_attn"): state_space,
}
"""Modules of mlx-lm and functions in them, and what makes ours of a module."""
