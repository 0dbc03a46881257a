"""The OpenAI-compatible HTTP front end. Never imports mlx."""
