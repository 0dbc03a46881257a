"""Arguments of a call as a model has written them, on their way through a chat template."""

from __future__ import annotations

from collections.abc import Mapping


class Spelled(dict[str, object]):
    """The arguments, for templates that look into them; ``text`` is the JSON text that they were, for those that write
    all of them: another spelling would be other tokens than those that the model drew, and nothing behind them cached.
    """

    def __init__(self, values: Mapping[str, object], text: str) -> None:
        super().__init__(values)
        self.text = text
