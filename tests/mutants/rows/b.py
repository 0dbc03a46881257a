"""Breaks of section B: the HTTP API."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="B1-other-object",
        file="kvarn/http/chat.py",
        old='return self._head | {"object": "chat.completion"}',
        new='return self._head | {"object": "text_completion"}',
        by=("test_chat",),
    ),
    Break(
        name="B1-stream-without-object",
        file="kvarn/http/chat.py",
        old='chunk = self._head | {"object": "chat.completion.chunk", "choices": [body]}',
        new='chunk = self._head | {"choices": [body]}',
        by=("test_chat_stream_begins_with_the_role_and_ends_with_usage",),
    ),
    Break(
        name="B2-parts-dropped",
        file="kvarn/http/messages.py",
        old=('    if kind != "text":\n        raise _wrong_part(kind, where)\n'),
        new=('    if kind != "text":\n        return ""\n'),
        by=("test_bad_messages",),
    ),
    Break(
        name="B2-one-part-of-many",
        file="kvarn/http/messages.py",
        old=("for index, part in enumerate(value))\n\n\ndef _part"),
        new=("for index, part in enumerate(value[:1]))\n\n\ndef _part"),
        by=("test_content_parts_and_every_role",),
    ),
    Break(
        name="B3-top-k-ignored",
        file="kvarn/http/schemas.py",
        old="top_k=max(0, self.top_k),",
        new="top_k=0,",
        by=("test_fields_reach_the_sampler",),
    ),
    Break(
        name="B3-suffix-ignored",
        file="kvarn/http/schemas.py",
        old='    "suffix": (_empty, "no suffix"),\n',
        new="",
        by=("test_what_is_not_implemented_is_named",),
    ),
    Break(
        name="B4-failure-ends-as-done",
        file="kvarn/http/respond.py",
        old="        await events.error(from_engine(error))\n",
        new="        await events.done()\n",
        by=("test_a_failure_in_mid_stream_is_an_error_event",),
    ),
    Break(
        name="B4-paths-in-messages",
        file="kvarn/http/errors.py",
        old='return _PATH.sub("…", first)[:300]',
        new="return first[:300]",
    ),
    Break(
        name="B5-other-finish",
        file="kvarn/http/generation.py",
        old="finish.value if finish is not None else None)",
        new="str(finish.name) if finish is not None else None)",
        by=("test_end_of_sequence_is_a_stop",),
    ),
    Break(
        name="B6-prompt-per-choice",
        file="kvarn/http/generation.py",
        old="sum(choice.prompt_tokens for choice in firsts)",
        new="sum(choice.prompt_tokens for choice in self._choices)",
        by=("test_completion_prompts_in_every_form",),
    ),
    Break(
        name="B6-tokens-past-the-stop",
        file="kvarn/text/answer.py",
        old="return self._settled if self.stopped else self._fed",
        new="return self._fed",
        by=("test_tokens_past_the_stop_are_not_counted",),
    ),
    Break(
        name="B7-kept-whole",
        file="kvarn/http/body.py",
        old=("        else:\n            kept.clear()\n"),
        new=("        else:\n            kept += part\n"),
        by=("test_what_is_beyond_the_limit_is_not_kept",),
    ),
    Break(
        name="B7-announced-length-believed",
        file="kvarn/http/body.py",
        old=("    if size > most:\n        raise _too_large(most)\n"),
        new=("    if size > DISCARDED * most:\n        raise _too_large(most)\n"),
        by=("test_the_limit_is_on_real_bytes",),
    ),
    Break(
        name="B8-metrics-open",
        file="kvarn/http/gate.py",
        old='OPEN = ("/livez", "/readyz", "/health")',
        new='OPEN = ("/livez", "/readyz", "/health", "/metrics")',
        by=("test_only_the_probes_are_open",),
    ),
    Break(
        name="B8-wildcard-without-dot",
        file="kvarn/http/gate.py",
        old="host.endswith(allowed[1:])",
        new="host.endswith(allowed[2:])",
        by=("test_allowed_hosts_are_the_only_ones",),
    ),
    Break(
        name="B8-plain-comparison",
        file="kvarn/http/keys.py",
        old="if hmac.compare_digest(known, digest):",
        new="if known == digest:",
        by=("test_every_known_key_is_compared_in_constant_time",),
    ),
    Break(
        name="B9-choices-not-counted",
        file="kvarn/http/service.py",
        old="if own_most and own + choices > own_most:",
        new="if own_most and own >= own_most:",
        by=("test_places_per_client_without_keys",),
    ),
    Break(
        name="B9-one-place-for-all",
        file="kvarn/http/respond.py",
        old="with service.permit(count, client):",
        new="with service.permit(1, client):",
        by=("test_a_place_per_answer",),
    ),
    Break(
        name="B10-request-timeout-alone",
        file="kvarn/http/clock.py",
        old="if self._total else [])], default=None)",
        new="if self._total and not ends else [])], default=None)",
        by=("test_each_timeout_names_itself_and_cancels_the_work",),
    ),
    Break(
        name="B11-one-message-per-step",
        file="kvarn/engine/loop.py",
        old=("        while not self._stopping:\n            try:\n"),
        new=("        for _ in range(1):\n            try:\n"),
        by=("test_cancel_at_any_time_frees_everything",),
    ),
    Break(
        name="B11-the-engine-is-not-told",
        file="kvarn/client/engine.py",
        old=(
            "            if self._crew is not None:\n"
            "                self._crew.send(wire.Cancel(request_id))\n"
            "            self._finish(request_id, why)"
        ),
        new="            self._finish(request_id, why)",
        by=("test_disconnects_empty_the_engine",),
    ),
    Break(
        name="B12-kernel-takes-megabytes",
        file="kvarn/http/connection.py",
        old="        if UNSENT_OPTION is not None:\n",
        new="        if False:\n",
        by=("test_a_slow_reader_gets_what_was_kept_and_then_an_error_and_others_keep_their_pace",),
    ),
    Break(
        name="B12-oldest-dropped",
        file="kvarn/http/generation.py",
        old=(
            '                raise EngineError(ErrorKind.OVERRUN, f"the answer was read too slowly: {most} '
            'steps of it were waiting")\n'
        ),
        new="                self._queue.get_nowait()\n",
        by=("test_a_slow_reader_gets_what_was_kept_and_then_an_error_and_others_keep_their_pace",),
    ),
    Break(
        name="B13-on-the-loop",
        file="kvarn/http/service.py",
        old="return await asyncio.wrap_future(self._pool.submit(work, urgent=urgent))",
        new="return work()",
        by=("test_the_event_loop_answers_while_a_prompt_is_read",),
    ),
    Break(
        name="B13-a-call-that-keeps-the-interpreter",
        file="kvarn/text/tokenizer.py",
        old="self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids",
        new="self._backend.encode(text, add_special_tokens=False).ids",
        by=("test_the_event_loop_runs_while_a_long_text_becomes_tokens",),
    ),
    Break(
        name="B14-values-not-counted",
        file="kvarn/http/body.py",
        old="    if more_values_than(body, most):\n",
        new="    if False:\n",
        by=("test_the_limit_is_on_values",),
    ),
    Break(
        name="B14-read-on-the-loop",
        file="kvarn/http/reading.py",
        old="if len(body) <= SMALL_BODY else await",
        new="if True else await",
        by=("test_a_large_body_is_read_in_a_text_thread",),
    ),
    Break(
        name="B14-prompts-kept",
        file="kvarn/http/respond.py",
        old="            del prompts, prediction, requests\n",
        new="",
        by=("test_a_request_that_runs_holds_little",),
    ),
    Break(
        name="B14-errors-keep-their-work",
        file="kvarn/http/threads.py",
        old="            del work, future\n",
        new="            pass\n",
        by=("test_what_was_worked_on_is_let_go",),
    ),
    Break(
        name="B14-stops-without-limit",
        file="kvarn/http/schemas.py",
        old="isinstance(stop, str) and len(stop) > LONGEST_STOP",
        new="isinstance(stop, str) and len(stop) > LONGEST_STOP ** 3",
        by=("test_bad_values",),
    ),
    Break(
        name="B14-chunks-parsed-at-once",
        file="kvarn/http/connection.py",
        old="PIECE = 8 * 1024\n",
        new="PIECE = 8 * 1024 * 1024\n",
    ),
    Break(
        name="B14-empty-messages-not-counted",
        file="kvarn/http/prompts.py",
        old="many = len(asked.messages) >= info.context_length",
        new="many = False",
        by=("test_a_chat_that_is_far_too_long",),
    ),
]
