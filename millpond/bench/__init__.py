"""Load generator for any OpenAI-compatible server: workloads, exact timing of streams, summaries.

Knows nothing of the engine: it speaks HTTP only, so that every server is measured by the same clock and the same code.
"""
