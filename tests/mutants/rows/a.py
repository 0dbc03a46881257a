"""Breaks of section A: shape and life cycle."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="A1-ready-while-loading",
        file="millpond/http/served_model.py",
        old=("elif self.client.state is not EngineState.READY:\n            reasons.append"),
        new=("elif self.client.state is EngineState.FAILED:\n            reasons.append"),
        by=("test_livez_answers_and_work_is_refused_while_the_model_loads",),
    ),
    Break(
        name="A2-explains-forgotten",
        file="millpond/client/open_requests.py",
        old="[*self._streams, *self._explaining]",
        new="list(self._streams)",
        by=("test_killed_engine_fails_every_stream_and_comes_back",),
    ),
    Break(
        name="A2-streams-left-open",
        file="millpond/client/open_requests.py",
        old="[*self._streams, *self._explaining]",
        new="[*list(self._streams)[1:], *self._explaining]",
        by=("test_killed_engine_fails_every_stream_and_comes_back",),
    ),
    Break(
        name="A3-no-drain",
        file="millpond/cli/serve.py",
        old="await front.drain(self._config.drain_seconds)",
        new="await front.drain(0.0)",
        by=("test_sigterm_drains_and_exits_with_0",),
    ),
    Break(
        name="A3-second-signal-waits",
        file="millpond/cli/serve.py",
        old="            os._exit(128 + number)\n",
        new="            return\n",
        by=("test_a_second_signal_forces_exit",),
    ),
    Break(
        name="A4-draft-tokens-kept",
        file="millpond/engine/speculation.py",
        old="        self.stop(sequence.request.id)\n",
        new="",
        by=("test_with_preemption_cancels_and_cached_prefixes",),
    ),
    Break(
        name="A4-places-kept",
        file="millpond/http/front_end.py",
        old="self.held -= choices",
        new="self.held -= 1",
        by=("test_one_failed_choice_fails_the_request_and_frees_the_others",),
    ),
    Break(
        name="A5-link-touches-mlx",
        file="millpond/engine/link.py",
        old="                self.inbox.put(decode_to_engine(body))\n",
        new=(
            "                self.inbox.put(decode_to_engine(body))\n"
            '                __import__("mlx.core").core.eval(__import__("mlx.core").core.zeros(1))\n'
        ),
        by=("test_one_thread_alone_touches_mlx",),
    ),
    Break(
        name="A6-imports-from-here",
        file="millpond/child.py",
        old='return (program, "-P", *arguments)',
        new="return (program, *arguments)",
        by=("test_no_child_imports_from_the_folder_it_starts_in",),
    ),
    Break(
        name="A6-orphans",
        file="millpond/lifeline.py",
        old='if sys.platform == "linux":',
        new='if sys.platform == "nowhere":',
        by=("test_nobody_outlives_a_killed_front_end",),
    ),
    Break(
        name="A6-own-group-unread",
        file="millpond/memory/cgroups.py",
        old="            yield folder\n",
        new="            yield self.point\n",
        by=("test_version_1", "test_version_2"),
    ),
    Break(
        name="A6-files-taken",
        file="millpond/model/open_files.py",
        old="    resource.setrlimit = raising\n",
        new="",
        by=("test_it_is_kept_and_used",),
    ),
    Break(
        name="A7-all-shards-count",
        file="millpond/hub/weights.py",
        old="        names = files_of_index(folder)\n        missing",
        new="        names = present\n        missing",
        by=("test_the_index_decides_and_what_lies_beside_is_named",),
    ),
    Break(
        name="A7-bytes-for-floats",
        file="millpond/model/float8.py",
        old="    return FLOAT8 in dtypes.values()",
        new="    return False",
        by=("test_eight_bit_floats_are_read_with_their_scales",),
    ),
    Break(
        name="A7-scaling-dropped",
        file="millpond/model/config_rope.py",
        old='        changes["rope_scaling"] = _scaling(given)\n    elif',
        new="        changes |= {}\n    elif",
        by=("test_rope_parameters_mean_what_their_two_keys_meant",),
    ),
    Break(
        name="A7-any-gguf-field",
        file="millpond/hub/gguf_keys.py",
        old="if key == name or key in known",
        new='if key == name or "scale" in key or key in known',
        by=("test_fields_that_nothing_maps_are_refused_by_name",),
    ),
    Break(
        name="A7-a-part-of-a-file",
        file="millpond/hub/gguf_file.py",
        old="    if parts > 1:",
        new="    if parts > 2:",
        by=("test_one_part_of_several_is_refused",),
    ),
]
