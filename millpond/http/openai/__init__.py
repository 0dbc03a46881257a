"""OpenAI's API: chat completions and text completions, as it asks and as it answers."""
