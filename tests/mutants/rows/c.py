"""Breaks of section C: text."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="C1-end-of-the-text-config",
        file="millpond/text/ends.py",
        old='for part in (config, config.get("text_config"), generation):',
        new="for part in (config, generation):",
        by=("test_ends_are_the_union_of_all_sources",),
    ),
    Break(
        name="C1-two-bos",
        file="millpond/text/tokenizer.py",
        old="return ids if parse_special and ids[:1] == self._prefix[:1] else self._prefix + ids",
        new="return self._prefix + ids",
        by=("test_completion_has_one_bos_even_if_the_text_brings_it",),
    ),
    Break(
        name="C2-settled-late",
        file="millpond/text/stops.py",
        old="automaton.depth[state] >= self._found:",
        new="automaton.depth[state] > self._found:",
        by=("test_holds_back_less_than_the_longest_stop",),
    ),
    Break(
        name="C2-longest-first",
        file="millpond/text/stops.py",
        old="if self._found is None or start < self._found:",
        new="if self._found is None:",
        by=("test_same_as_searching_the_whole_text",),
    ),
    Break(
        name="C3-held-text-lost",
        file="millpond/text/detokenize.py",
        old=("    def finish(self) -> str:\n        return self._end_run()\n"),
        new=('    def finish(self) -> str:\n        return ""\n'),
        by=("test_deltas_add_up_to_the_full_decoding",),
    ),
    Break(
        name="C3-half-a-surrogate",
        file="millpond/text/detokenize.py",
        old="return text + REPLACEMENT * 2, len(data)",
        new="return text + REPLACEMENT, len(data)",
        by=("test_replacement_of_broken_sequences_agrees_with_the_decoder",),
    ),
    Break(
        name="C4-no-role",
        file="millpond/http/openai/chat.py",
        old='{"role": "assistant", "content": ""}',
        new='{"content": ""}',
        by=("test_chat_stream_begins_with_the_role_and_ends_with_usage",),
    ),
    Break(
        name="C4-always-200",
        file="millpond/http/respond.py",
        old=("        if not stream.started:\n            raise from_engine(error) from error\n"),
        new="",
        by=("test_engine_death_before_the_first_byte_is_a_500",),
    ),
]
