"""Text on both sides of the model: chat template and tokenising before it, detokenising and stop strings after it."""
