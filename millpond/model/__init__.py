"""The model: loading, the CPU fast path, the lanes that run it, and the probe that says which lane is right."""
