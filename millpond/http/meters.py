"""What the front end counts and times, for /metrics. Event loop only; a token costs about one microsecond.

How requests end is counted in ``EngineClient.counts``, in the one place where they end.
"""

from __future__ import annotations

from millpond.observe.histogram import SECONDS, TOKENS, Histogram

CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """One per served model. A request here is one answer: n of them to a prompt count n times, their prompt too."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.queue_seconds = Histogram(SECONDS)
        self.prefill_seconds = Histogram(SECONDS)
        self.first_token_seconds = Histogram(SECONDS)
        self.gap_seconds = Histogram(SECONDS)
        self.whole_seconds = Histogram(SECONDS)
        self.inference_seconds = Histogram(SECONDS)
        self.decode_seconds = Histogram(SECONDS)
        self.mean_gap_seconds = Histogram(SECONDS)
        self.prompt_sizes = Histogram(TOKENS)
        self.answer_sizes = Histogram(TOKENS)
        self.longest_answers = Histogram(TOKENS)
        self.answers_asked = Histogram(CHOICES)
        self.tokens_asked = Histogram(TOKENS)

    def copy(self) -> Meters:
        """What is counted and timed so far."""
        made = Meters()
        for name, value in vars(self).items():
            setattr(made, name, value.copy() if isinstance(value, Histogram) else value)
        return made

    def asked(self, choices: int, max_tokens: int) -> None:
        """A prompt asks for so many answers of so many tokens."""
        self.answers_asked.observe(choices)
        self.tokens_asked.observe(max_tokens)

    def queued(self, seconds: float) -> None:
        """A request's prompt was begun so long after its submission."""
        self.queue_seconds.observe(seconds)

    def first_token(self, seconds: float, prefill_seconds: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A request's first token came so long after its submission, and after its prompt was begun."""
        self.first_token_seconds.observe(seconds)
        self.prefill_seconds.observe(prefill_seconds)
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def token_gap(self, seconds: float) -> None:
        """A token, or the end, came so long after the token before it."""
        self.gap_seconds.observe(seconds)

    def generated(self, tokens: int) -> None:
        """The engine produced so many tokens for a request."""
        self.generated_tokens += tokens

    def finished(
        self, prompt_tokens: int, answer_tokens: int, seconds: float, inference_seconds: float, decode_seconds: float
    ) -> None:
        """A request got its whole answer: so long after its submission, its prompt's begin and its first token."""
        self.whole_seconds.observe(seconds)
        self.inference_seconds.observe(inference_seconds)
        self.decode_seconds.observe(decode_seconds)
        if answer_tokens > 1:
            self.mean_gap_seconds.observe(decode_seconds / (answer_tokens - 1))
        self.prompt_sizes.observe(prompt_tokens)
        self.answer_sizes.observe(answer_tokens)

    def all_finished(self, longest: int) -> None:
        """All answers to a prompt are there, the longest of so many tokens."""
        self.longest_answers.observe(longest)
