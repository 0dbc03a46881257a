"""Decides what one engine step does: pure Python, no mlx, no clock of its own."""
