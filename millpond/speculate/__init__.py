"""Guesses what comes next, so that one forward can confirm several tokens."""
