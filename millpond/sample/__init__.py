"""Picks the next token of every live row: penalties, filters, position-keyed noise, log-probabilities."""
