"""Millpond: an LLM serving engine on MLX. Read types.py, then engine/loop.py."""

__version__ = "0.1.0"
