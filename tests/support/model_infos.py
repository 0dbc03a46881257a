"""What an engine says of its model, for tests that have no engine."""

from __future__ import annotations

from millpond.types import ModelInfo

SMALL = ModelInfo(
    context_length=4000,
    vocab_size=1000,
    lane="slots",
    lane_reason="",
    cache_kinds=["kv"],
    dtype="float32",
    device="cpu",
    blas="",
    kv_bytes_per_token=64,
    max_batch=8,
    kv_limit_bytes=4096,
    fingerprint="0" * 64,
)
