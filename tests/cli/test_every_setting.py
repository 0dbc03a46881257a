"""(J1) No setting is dead: each names the tests that show it changing what the server does, and those tests exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from millpond.config import ServeConfig

TESTS = Path(__file__).resolve().parents[1]

PROOFS: dict[str, tuple[str, ...]] = {
    "host": ("http/test_access.py::test_beyond_loopback_any_host_is_served_and_a_missing_key_is_warned_about",),
    "port": ("http/test_lifecycle.py::test_a_port_in_use_is_said_before_anything_loads",),
    "model_name": ("http/test_engine_flags.py::test_settings_from_all_sources_reach_the_engine",),
    "sampling_defaults": (
        "http/test_sampling_defaults.py::test_the_models_file_counts_by_default",
        "http/test_sampling_defaults.py::test_the_setting_says_whose_defaults_count",
    ),
    "reasoning_field": ("http/test_tools.py::test_thoughts_are_told_under_the_names_that_are_set",),
    "tool_format": (
        "http/test_tools.py::test_calls_are_read_as_the_user_names",
        "text/test_own_writing.py::test_what_the_user_names_counts",
    ),
    "context_length": (
        "http/test_engine_flags.py::test_settings_from_all_sources_reach_the_engine",
        "engine/test_process.py::test_a_context_beyond_the_models_is_refused",
    ),
    "max_batch": ("http/test_engine_flags.py::test_settings_from_all_sources_reach_the_engine",),
    "max_itl_ms": (
        "http/test_engine_flags.py::test_the_pace_reaches_the_scheduler",
        "schedule/test_scheduler.py::test_rows_decoding_leave_only_their_spare_time",
        "schedule/test_scheduler.py::test_slow_decoding_still_lets_one_block_through",
    ),
    "prefill_chunk": ("http/test_engine_flags.py::test_prefill_chunk_cuts_prompts",),
    "kv_memory_mb": (
        "http/test_engine_flags.py::test_little_kv_memory_means_a_shorter_context",
        "engine/test_process.py::test_no_memory_for_any_request_is_said_at_start",
    ),
    "wired_memory_mb": (
        "engine/test_prepare.py::test_what_is_wired",
        "engine/test_process.py::test_memory_that_cannot_be_wired_is_refused_at_start",
    ),
    "deterministic": (
        "http/test_engine_flags.py::test_deterministic_answers_are_promised_or_refused",
        "engine/test_deterministic.py::test_answers_are_the_same_whatever_the_load",
    ),
    "kv_bits": ("http/test_packed_server.py::test_bits_groups_and_exact_tokens",),
    "kv_group_size": (
        "http/test_packed_server.py::test_bits_groups_and_exact_tokens",
        "http/test_packed_server.py::test_what_cannot_be_packed_is_an_error_at_start",
    ),
    "kv_quant_mode": ("http/test_packed_server.py::test_bits_groups_and_exact_tokens",),
    "kv_quant_start": ("http/test_packed_server.py::test_bits_groups_and_exact_tokens",),
    "cache_ram": (
        "http/test_prefix_flags.py::test_cache_ram_bounds_memory",
        "http/test_prefix_cache.py::test_no_cache_says_so",
    ),
    "share_prefixes": ("http/test_tenants.py::test_prefixes_are_shared_where_the_setting_says_so",),
    "cache_selfcheck": ("http/test_prefix_flags.py::test_selfcheck_compares_every_hit",),
    "cache_dir": ("http/test_prefix_flags.py::test_a_folder_that_cannot_be_made",),
    "cache_ssd": ("http/test_prefix_flags.py::test_cache_ssd_bounds_the_files",),
    "ssd_policy": (
        "http/test_prefix_cache.py::test_policy_all_survives_kill_9",
        "http/test_prefix_cache.py::test_policy_second_use_survives_kill_9_for_what_was_used_twice",
        "http/test_prefix_cache.py::test_policy_evicted_keeps_everything_at_an_orderly_stop",
        "http/test_prefix_cache.py::test_policy_off_reads_and_changes_nothing",
    ),
    "ssd_durability": ("http/test_prefix_flags.py::test_ssd_durability_syncs_every_file_or_none",),
    "ssd_ttl": ("http/test_prefix_flags.py::test_ssd_ttl_removes_what_was_not_used",),
    "ssd_daily_writes": ("http/test_prefix_flags.py::test_ssd_daily_writes_stop_for_the_day",),
    "ssd_min_free": ("http/test_prefix_flags.py::test_ssd_min_free_is_left_free",),
    "spec": (
        "http/test_speculation_fields.py::test_the_servers_default_is_what_a_silent_request_gets",
        "http/test_speculation_server.py::test_a_model_with_a_head_of_its_own",
        "http/test_speculation_server.py::test_a_head_that_is_not_there_cannot_be_asked_for",
    ),
    "spec_tokens": ("http/test_speculation_fields.py::test_the_servers_default_is_what_a_silent_request_gets",),
    "spec_adaptive": ("http/test_speculation_fields.py::test_the_engine_is_told_every_setting",),
    "spec_shared": ("http/test_speculation_fields.py::test_the_engine_is_told_every_setting",),
    "draft_model": (
        "http/test_speculation_fields.py::test_the_engine_is_told_every_setting",
        "http/test_speculation_fields.py::test_a_draft_model_that_is_not_there_is_said_at_start",
    ),
    "tp": (
        "parallel/test_rank_processes.py::test_every_rank_is_told_its_place",
        "parallel/test_hosts.py::test_a_group_that_cannot_work_is_refused",
    ),
    "hostfile": (
        "parallel/test_ssh_ranks.py::test_ranks_over_ssh_work_and_are_told_everything",
        "parallel/test_hosts.py::test_ring",
    ),
    "tp_backend": (
        "parallel/test_hosts.py::test_jaccl",
        "parallel/test_hosts.py::test_nccl",
        "parallel/test_hosts.py::test_the_backend_of_the_hostfile_counts_unless_another_is_asked_for",
    ),
    "tp_host": (
        "parallel/test_rank_processes.py::test_an_address_that_cannot_be_had_is_named",
        "parallel/test_hosts.py::test_ranks_of_mpirun",
    ),
    "tp_port": (
        "parallel/test_rank_processes.py::test_tp_port_is_where_rank_0_listens",
        "parallel/test_keepers.py::test_it_binds_no_port_and_starts_followers_again",
    ),
    "tp_secret_file": ("parallel/test_hosts.py::test_secrets_of_launched_ranks",),
    "tp_silence": (
        "parallel/test_rank_processes.py::test_a_stopped_rank_0_is_killed_after_tp_silence",
        "parallel/test_hosts.py::test_ring",
    ),
    "tp_python": ("parallel/test_ssh_ranks.py::test_what_cannot_be_started_is_said",),
    "tp_ssh": ("parallel/test_ssh_ranks.py::test_ranks_over_ssh_work_and_are_told_everything",),
    "max_waiting": (
        "http/test_limits.py::test_the_65th_stream_of_64_waits_outside",
        "http/test_lifecycle.py::test_a_full_queue_is_a_429",
    ),
    "max_per_client": (
        "http/test_limits.py::test_places_per_client_without_keys",
        "http/test_limits.py::test_places_per_key",
    ),
    "responses_size": ("http/test_kept_responses.py::test_where_nothing_is_kept",),
    "responses_ttl": ("http/test_kept_responses.py::test_kept_over_a_restart",),
    "keepalive": ("http/test_watchdog.py::test_comments_come_while_steps_do",),
    "stall_timeout": (
        "http/test_watchdog.py::test_an_engine_that_hangs_is_killed_and_everybody_is_told",
        "http/test_watchdog.py::test_a_slow_engine_is_left_alone",
    ),
    "max_restarts": (
        "http/test_watchdog.py::test_too_many_deaths_end_the_server_and_it_says_why",
        "http/test_watchdog.py::test_no_restart_at_all_may_be_asked_for",
    ),
    "queue_timeout": ("http/test_timeouts.py::test_each_timeout_names_itself_and_cancels_the_work",),
    "first_token_timeout": ("http/test_timeouts.py::test_each_timeout_names_itself_and_cancels_the_work",),
    "token_timeout": ("http/test_timeouts.py::test_each_timeout_names_itself_and_cancels_the_work",),
    "request_timeout": ("http/test_timeouts.py::test_each_timeout_names_itself_and_cancels_the_work",),
    "write_timeout": ("http/test_slow_readers.py::test_one_that_never_reads_is_cut_and_everything_is_given_back",),
    "stream_buffer": (
        "http/test_slow_readers.py::test_a_slow_reader_gets_what_was_kept_and_then_an_error_and_others_keep_their_pace",
    ),
    "body_timeout": (
        "http/test_limits.py::test_half_a_head_is_cut",
        "http/test_limits.py::test_a_slow_body_is_a_408",
    ),
    "max_body": ("http/test_body_size.py::test_the_limit_is_on_real_bytes",),
    "max_values": ("http/test_body_size.py::test_the_limit_is_on_values",),
    "max_connections": ("http/test_limits.py::test_one_connection_too_many_is_cut_and_the_others_live",),
    "api_key": ("http/test_keys.py::test_each_key_opens",),
    "api_key_file": (
        "http/test_keys.py::test_each_key_opens",
        "http/test_keys.py::test_sighup_reads_keys_again_and_disturbs_nobody",
    ),
    "allowed_hosts": ("http/test_access.py::test_allowed_hosts_are_the_only_ones",),
    "cors_origins": (
        "http/test_access.py::test_cors_for_the_page_that_may",
        "http/test_access.py::test_cors_for_everybody",
    ),
    "tls_certificate": ("http/test_tls.py::test_the_official_client_over_https",),
    "tls_key": ("http/test_tls.py::test_a_bad_pair_is_refused_with_what_is_wrong",),
    "drain_seconds": (
        "http/test_lifecycle.py::test_drain_deadline_ends_the_rest_with_an_error",
        "http/test_lifecycle.py::test_a_second_signal_forces_exit",
    ),
    "log_format": ("http/test_log_lines.py::test_every_line_parses_and_none_has_text_of_a_prompt",),
    "log_level": ("http/test_log_lines.py::test_log_levels",),
}
"""Setting → tests, as path below tests/ and name."""


def functions_in(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


def test_every_setting_is_in_the_table() -> None:
    assert set(PROOFS) == set(ServeConfig.model_fields)


@pytest.mark.parametrize("name", PROOFS)
def test_the_proof_exists(name: str) -> None:
    assert PROOFS[name], "a setting without a test"
    for proof in PROOFS[name]:
        path, _, function = proof.partition("::")
        assert (TESTS / path).is_file(), f"no file {path}"
        assert function in functions_in(TESTS / path), f"no test {proof}"
        # The setting is at least spoken of where it is said to be proved: by its name, as a flag, or in a fixture.
        text = (TESTS / path).read_text(encoding="utf-8")
        assert name in text or name.replace("_", "-") in text, f"{proof} has never heard of {name}"
