"""Breaks of section L, as far as it is about requests, connections and ranks."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="L1-one-too-many",
        file="millpond/http/front_end.py",
        old="if self.held + choices > most:",
        new="if self.held + choices > most + 1:",
        by=("test_a_full_queue_is_a_429",),
    ),
    Break(
        name="L2-no-retry-after",
        file="millpond/http/errors.py",
        old='headers={"Retry-After": str(max(1, min(60, round(wait_seconds))))})',
        new="headers={})",
        by=("test_a_full_house_is_a_429_that_clients_obey",),
    ),
    Break(
        name="L3-sent-too-much",
        file="millpond/http/body.py",
        old=("    if size > most:\n        raise _too_large(most)\n"),
        new=("    if size > DISCARDED * most:\n        raise _too_large(most)\n"),
        by=("test_a_chunked_large_body",),
    ),
    Break(
        name="L3-declared-too-much",
        file="millpond/http/body.py",
        old="    if length.isdigit() and int(length) > DISCARDED * most:\n",
        new="    if length.isdigit() and int(length) > 10**18:\n",
        by=("test_an_absurd_length_is_refused_before_the_key",),
    ),
    Break(
        name="L4-nan-accepted",
        file="millpond/http/json_body.py",
        old="value = msgspec.json.decode(body) if",
        new='value = __import__("json").loads(body) if',
        by=("test_bad_json",),
    ),
    Break(
        name="L5-lenient-types",
        file="millpond/http/openai/schemas.py",
        old='ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)',
        new='ConfigDict(strict=False, extra="ignore", frozen=True, allow_inf_nan=False)',
        by=("test_bad_values",),
    ),
    Break(
        name="L6-read-to-its-end",
        file="millpond/http/prompts.py",
        old=("        if count > context:\n            return True\n    return False\n"),
        new="    return count > context\n",
        by=("test_a_far_too_long_prompt_costs_no_more_than_a_long_one",),
    ),
    Break(
        name="L7-nobody-watches",
        file="millpond/http/sse.py",
        old="await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)",
        new="await asyncio.wait({work})",
        by=("test_disconnects_cancel_the_work",),
    ),
    Break(
        name="L8-the-engine-is-not-told",
        file="millpond/client/open_requests.py",
        old="            self._cancel(request_id)\n            self._finish(request_id, why)",
        new="            self._finish(request_id, why)",
        by=("test_disconnects_cancel_the_work",),
    ),
    Break(
        name="L9-whole-answers-shielded",
        file="millpond/http/respond.py",
        old="    return WatchedResponse(work)\n",
        new=(
            "    return WatchedResponse(work if asked.stream else lambda send: "
            "asyncio.shield(asyncio.create_task(work(send))))\n"
        ),
        by=("test_disconnects_cancel_the_work",),
    ),
    Break(
        name="L10-oldest-dropped",
        file="millpond/http/generation.py",
        old=(
            '                raise EngineError(ErrorKind.OVERRUN, f"the answer was read too slowly: {most} '
            'steps of it were waiting")\n'
        ),
        new="                self._queue.get_nowait()\n",
        by=("test_a_slow_reader_gets_what_was_kept_and_then_an_error_and_others_keep_their_pace",),
    ),
    Break(
        name="L11-another-name",
        file="millpond/http/clock.py",
        old="Phase.PREFILL: ErrorKind.FIRST_TOKEN_TIMEOUT,",
        new="Phase.PREFILL: ErrorKind.TOKEN_TIMEOUT,",
        by=("test_each_timeout_names_itself_and_cancels_the_work",),
    ),
    Break(
        name="L25-the-rest-forgotten",
        file="millpond/http/served_model.py",
        old="            self.client.fail_all(EngineError(ErrorKind.UNAVAILABLE, message))\n",
        new="            await self._idle.wait()\n",
        by=("test_a_stop_with_requests_that_nobody_began",),
    ),
    Break(
        name="L26-work-accepted-meanwhile",
        file="millpond/http/served_model.py",
        old=("        self.refusing = why\n        try:\n"),
        new="        try:\n",
        by=("test_sigterm_drains_and_exits_with_0",),
    ),
    Break(
        name="L28-a-follower-not-missed",
        file="millpond/launch/group.py",
        old=("        if not self._stopping:\n            self._process.abandon()\n"),
        new="        return\n",
        by=("test_a_killed_follower_ends_all_at_once",),
    ),
    Break(
        name="L29-silence-forgiven",
        file="millpond/parallel/leader.py",
        old='        self._lost(rank, f"it has not been heard of for {seconds:.0f} s")\n',
        new="        del rank, seconds\n",
        by=("test_a_rank_that_falls_silent_is_given_up",),
    ),
    Break(
        name="L30-four-gigabytes-announced",
        file="millpond/wire.py",
        old="    if length > MAX_FRAME:\n",
        new="    if length > 2**32:\n",
        by=("test_an_undecodable_message_ends_it",),
    ),
    Break(
        name="L31-the-loop-by-wall-time",
        file="millpond/engine/loop.py",
        old="        now = time.monotonic()\n        room = 0 if",
        new="        now = time.time()\n        room = 0 if",
        by=("test_only_dates_are_read_off_the_wall_clock",),
    ),
    Break(
        name="L31-watchdog-by-wall-time",
        file="millpond/client/watchdog.py",
        old="    clock: Callable[[], float] = time.monotonic\n",
        new="    clock: Callable[[], float] = time.time\n",
        by=("test_only_dates_are_read_off_the_wall_clock",),
    ),
]
