"""OpenAI's Responses, as Codex and the agents' kits speak it."""
