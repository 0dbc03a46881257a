"""GET /metrics: every number of the server at one moment, as Prometheus or OpenMetrics text.

What vLLM also measures has the name that vLLM gives it, so that its dashboards show a Millpond; all else is millpond_*.
All numbers are read without a pause in between, on the event loop: submitted = finished + failed + cancelled + open
holds in every answer. The engine's own numbers come with its last heartbeat and begin anew with each engine.
docs/metrics.md says what each one means.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from millpond import __version__
from millpond.client import EngineState
from millpond.client.state import EngineSnapshot
from millpond.http.context import context_of
from millpond.http.families import Families
from millpond.http.front_end import front_end_of
from millpond.http.meters import Meters
from millpond.http.snapshot import Snapshot
from millpond.types import ErrorKind, Finish, PrefixLoad, SpecCounters
from millpond.wire import Beat

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SSD_GAUGES = {
    "files": "Files in the folder of the SSD tier, of all models.",
    "bytes": "Bytes of those files.",
    "writing": "Whether the SSD tier writes now (1): the folder is writable, disk and index are well.",
}
SSD_COUNTERS = {
    "reads": "Records read.",
    "read_bytes": "Bytes read.",
    "read_errors": "Reads that the file system refused.",
    "missing": "Reads of files that another process, or a user, had removed.",
    "writes": "Records written.",
    "written_bytes": "Bytes written.",
    "write_errors": "Writes that the file system refused.",
    "damaged": "Files set aside because they were not what had been written.",
    "evicted": "Records removed to make room.",
    "expired": "Records removed for their age.",
    "leftovers_removed": "Temporary files of dead processes removed.",
    "adopted": "Files that the index did not know.",
    "index_busy": "Times another process held the index for too long.",
    "index_rebuilt": "Times the index was made anew.",
    "index_errors": "Errors of the index.",
}
SSD_SKIPPED = {"skipped_full": "full", "skipped_daily": "daily", "skipped_off": "off"}
"""Figures of the SSD tier: all of them, by the names of disk/stats.py."""


async def metrics(request: Request) -> Response:
    """The route."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(front_end_of(request).snapshot(), context_of(request.scope).connections))
    ProcessCollector(registry=registry)
    # ALLOWUTF8 leaves valid names as they are. The library's choice for most clients turns the colons into underscores.
    if "application/openmetrics-text" in request.headers.get("accept", ""):
        text, kind = generate_openmetrics(registry, ALLOWUTF8), OPENMETRICS  # type: ignore[no-untyped-call]
    else:
        text, kind = generate_latest(registry, ALLOWUTF8), PLAIN
    return Response(text, headers={"content-type": kind})


class ServerCollector(Collector):
    """The numbers of one server at one moment."""

    def __init__(self, now: Snapshot, connections: int) -> None:
        self._now = now
        self._connections = connections

    def describe(self) -> Iterable[Metric]:
        """Nothing: there is one such collector to a registry, and nothing to clash with."""
        return ()

    def collect(self) -> Iterable[Metric]:
        model, engine = self._now.model, self._now.model.engine
        families = Families(model.name)
        beat = engine.beat or Beat(step=0, running=0, waiting=0, kv_bytes=0)
        _server(families, self._now, self._connections)
        _requests(families, engine, model.meters)
        _tokens(families, model.meters)
        _times(families, model.meters)
        _engine(families, engine, beat)
        _speculation(families, beat.counters.spec)
        _prefix_cache(families, beat.prefix)
        _ssd(families, beat.prefix)
        return families.made


def _server(to: Families, now: Snapshot, connections: int) -> None:
    info = now.model.engine.info
    to.gauges("millpond_build_info", "Version of Millpond; always 1.", ("version",), [(__version__, 1)])
    model = [((info.device, info.dtype, info.lane, info.fingerprint), 1.0)] if info is not None else []
    labels = ("device", "dtype", "lane", "fingerprint")
    to.gauges("millpond_model_info", "What the engine found out about the model; always 1.", labels, model)
    to.gauge("millpond_ready", "Whether requests are welcome (1).", not now.reasons)
    to.gauge("millpond_connections", "Open connections, the one that asks included.", connections)
    to.gauge(
        "millpond_permits_held",
        "Answers that hold a place: from before their prompt is read to the last byte sent.",
        now.held,
    )
    to.gauge("millpond_permits_limit", "Places there are; more requests get a 429.", now.most_held)
    to.counters(
        "millpond_requests_refused",
        "HTTP requests answered with an error before anything was submitted to the engine.",
        ("status", "code"),
        [((str(status), code), count) for (status, code), count in sorted(now.refusals.items())],
    )
    to.counter(
        "millpond_unknown_fields", "Fields of requests that mean nothing here and were ignored.", now.unknown_fields
    )


def _requests(to: Families, engine: EngineSnapshot, meters: Meters) -> None:
    counts = engine.counts
    to.counter("millpond_requests_submitted", "Answers asked of the engine.", counts.submitted)
    to.counter("millpond_requests_finished", "Answers that came to their end.", counts.finished)
    to.counter("millpond_requests_failed", "Answers that failed.", counts.failed)
    to.counter(
        "millpond_requests_cancelled", "Answers given up: the client left, or another answer failed.", counts.cancelled
    )
    to.gauge("millpond_requests_open", "Answers waiting or running.", engine.open_requests)
    to.counters(
        "millpond_request_failures",
        "Answers that failed, by what went wrong.",
        ("kind",),
        [(kind.value, counts.by_error[kind]) for kind in ErrorKind],
    )
    to.counters(
        "vllm:request_success",
        "Answers that ended, by why: stop, length, abort (given up) or error (failed).",
        ("finished_reason",),
        [
            ("stop", counts.by_finish[Finish.STOP]),
            ("length", counts.by_finish[Finish.LENGTH]),
            ("abort", counts.cancelled),
            ("error", counts.failed),
        ],
    )
    to.histogram("vllm:request_params_n", "Answers asked for per prompt.", meters.answers_asked.distribution())
    to.histogram("vllm:request_params_max_tokens", "Most tokens asked for.", meters.tokens_asked.distribution())


def _tokens(to: Families, meters: Meters) -> None:
    cached, prompt = meters.cached_tokens, meters.prompt_tokens
    to.counter(
        "vllm:prompt_tokens", "Prompt tokens of answers that got their first token, cached ones included.", prompt
    )
    to.counter("vllm:prompt_tokens_cached", "Those of them that the prefix cache had.", cached)
    to.counters(
        "vllm:prompt_tokens_by_source",
        "The same by where their keys and values came from.",
        ("source",),
        [("local_compute", prompt - cached), ("local_cache_hit", cached)],
    )
    to.counter("vllm:generation_tokens", "Tokens generated.", meters.generated_tokens)
    sizes = (
        ("vllm:request_prompt_tokens", "Prompt tokens of finished answers.", meters.prompt_sizes),
        ("vllm:request_generation_tokens", "Tokens of finished answers.", meters.answer_sizes),
        ("vllm:request_max_num_generation_tokens", "Tokens of the longest answer to a prompt.", meters.longest_answers),
    )
    for name, text, seen in sizes:
        to.histogram(name, text, seen.distribution())


def _times(to: Families, meters: Meters) -> None:
    times = (
        (
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            meters.first_token_seconds,
        ),
        ("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", meters.gap_seconds),
        (
            "vllm:request_time_per_output_token_seconds",
            "Mean time between two tokens, of each finished answer.",
            meters.mean_gap_seconds,
        ),
        ("vllm:e2e_request_latency_seconds", "From arrival to the end, of finished answers.", meters.whole_seconds),
        ("vllm:request_queue_time_seconds", "From arrival until the prompt is begun.", meters.queue_seconds),
        ("vllm:request_prefill_time_seconds", "From there to the first token.", meters.prefill_seconds),
        (
            "vllm:request_decode_time_seconds",
            "From the first token to the end, of finished answers.",
            meters.decode_seconds,
        ),
        (
            "vllm:request_inference_time_seconds",
            "From the prompt's begin to the end, of finished answers.",
            meters.inference_seconds,
        ),
    )
    for name, text, seen in times:
        to.histogram(name, text, seen.distribution())


def _engine(to: Families, engine: EngineSnapshot, beat: Beat) -> None:
    counted = beat.counters
    limit = engine.info.kv_limit_bytes if engine.info is not None else 0
    states = [(state.value, state is engine.state) for state in EngineState]
    to.gauges("millpond_engine_state", "The engine's state (1), and the others (0).", ("state",), states)
    to.counter("millpond_engine_restarts", "Engines started after the first.", engine.counts.restarts)
    ranks = engine.info.ranks if engine.info is not None else 0
    to.gauge("millpond_engine_ranks", "Processes that run the model together; 0 before they do.", ranks)
    stuck = engine.stuck_seconds if engine.beat is not None else 0.0
    to.gauge("millpond_engine_stuck_seconds", "For how long there has been work and no step.", stuck)
    to.gauge(
        "millpond_engine_beat_age_seconds",
        "Age of the engine's last heartbeat; 0 before the first.",
        engine.beat_age or 0.0,
    )
    to.gauge("vllm:num_requests_running", "Answers being decoded.", beat.running)
    to.gauge("vllm:num_requests_waiting", "Answers waiting, prompts being read included.", beat.waiting)
    to.gauge(
        "millpond_queue_wait_seconds",
        "Predicted wait of a request that came now, until its prompt is begun.",
        beat.wait_seconds,
    )
    to.gauge(
        "vllm:kv_cache_usage_perc",
        "Share of the memory for keys and values in use, 0 to 1.",
        beat.kv_bytes / limit if limit else 0.0,
    )
    to.gauge("millpond_kv_bytes", "Bytes of keys and values held for answers and prompts.", beat.kv_bytes)
    to.gauge("millpond_kv_limit_bytes", "Most bytes of keys and values.", limit)
    if engine.info is not None:
        to.gauges(
            "millpond_kv_bytes_per_token",
            "Bytes of one token's keys and values in a row, a cached block or a file.",
            ("kv_format",),
            [(engine.info.kv_format, engine.info.kv_bytes_per_token)],
        )
    to.counter("millpond_engine_steps", "Steps.", beat.step)
    to.counter("millpond_engine_failed_steps", "Steps whose decode forward failed.", counted.failed_steps)
    to.counter(
        "millpond_engine_prefill_tokens",
        "Prompt tokens computed, again after a preemption included.",
        counted.prefill_tokens,
    )
    to.counter("millpond_engine_drawn_tokens", "Tokens drawn, those that end an answer included.", counted.drawn_tokens)
    to.counter(
        "vllm:num_preemptions", "Answers that lost their row or their begun prompt to others.", counted.preemptions
    )
    to.histogram("millpond_engine_step_seconds", "How long steps took.", counted.step_seconds)
    to.histogram("millpond_engine_step_rows", "Answers decoded together in a step: the batch size.", counted.step_rows)
    to.histogram(
        "vllm:iteration_tokens_total", "Tokens that a step took in, of prompts and answers.", counted.step_tokens
    )


def _speculation(to: Families, counted: SpecCounters) -> None:
    to.counter("vllm:spec_decode_num_drafts", "Times tokens were guessed ahead for an answer.", counted.rows)
    to.counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead.", counted.proposed)
    to.counter("vllm:spec_decode_num_accepted_tokens", "Those of them that were drawn.", counted.accepted)
    to.counters(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "The same by place: 0 is the first token guessed in a step.",
        ("position",),
        [(str(place), count) for place, count in enumerate(counted.accepted_at)],
    )
    to.counters(
        "millpond_spec_draft_tokens_per_pos",
        "Tokens guessed ahead by place.",
        ("position",),
        [(str(place), count) for place, count in enumerate(counted.proposed_at)],
    )
    to.counter("millpond_spec_steps", "Steps that checked guesses.", counted.steps)
    to.counter("millpond_spec_fallback_steps", "Steps without guesses, which would not have paid.", counted.fallbacks)
    to.counter("millpond_spec_drawn_tokens", "Tokens drawn for answers that had guesses in the step.", counted.drawn)
    to.counter("millpond_spec_bonus_tokens", "Those of them drawn behind guesses that were all right.", counted.bonus)
    to.gauge("millpond_spec_depth", "Tokens guessed ahead per answer in the latest step.", counted.depth)


def _prefix_cache(to: Families, load: PrefixLoad) -> None:
    counted = load.counters
    hits = counted.memory_tokens + counted.disk_tokens
    to.counter("vllm:prefix_cache_queries", "Prompt tokens restored or computed.", hits + counted.computed_tokens)
    to.counter("vllm:prefix_cache_hits", "Prompt tokens restored.", hits)
    to.gauge("millpond_prefix_cache_bytes", "Bytes of cached prefixes in memory.", load.ram_bytes)
    to.gauge("millpond_prefix_cache_limit_bytes", "Most bytes of cached prefixes in memory.", load.ram_limit)
    to.gauge("millpond_prefix_cache_blocks", "Blocks of cached prefixes in memory.", load.ram_blocks)
    to.gauge("millpond_prefix_cache_snapshots", "Snapshots of recurrent layers in memory.", load.ram_snapshots)
    to.gauge("millpond_prefix_cache_snapshot_bytes", "Bytes of those snapshots.", load.ram_snapshot_bytes)
    to.counters(
        "millpond_prefix_cache_hits",
        "Prompts begun with a cached prefix, by the slowest tier that a part of it came from.",
        ("tier",),
        [("memory", counted.hits - counted.disk_hits), ("disk", counted.disk_hits)],
    )
    to.counter("millpond_prefix_cache_misses", "Prompts begun without one.", counted.misses)
    to.counters(
        "millpond_prefix_cache_tokens",
        "Prompt tokens restored, by tier.",
        ("tier",),
        [("memory", counted.memory_tokens), ("disk", counted.disk_tokens)],
    )
    to.counter("millpond_prefix_cache_computed_tokens", "Prompt tokens computed.", counted.computed_tokens)
    to.counter("millpond_prefix_cache_evicted_blocks", "Blocks that left memory to make room.", counted.evicted)
    to.counter(
        "millpond_prefix_cache_dropped_snapshots",
        "Snapshots of recurrent layers that left memory before their blocks.",
        counted.snapshots_dropped,
    )
    to.counter(
        "millpond_prefix_cache_unsaved_blocks",
        "Those of them that the SSD should have had and had not.",
        counted.unsaved,
    )
    to.counter("millpond_prefix_cache_selfchecks", "Blocks computed afresh and compared.", counted.checked)
    to.counter("millpond_prefix_cache_mismatches", "Blocks that were not the same.", counted.mismatches)


def _ssd(to: Families, load: PrefixLoad) -> None:
    """Families without values where there is no SSD tier."""
    figures = load.ssd

    def value(name: str) -> list[tuple[tuple[()], int]]:
        return [((), figures[name])] if name in figures else []

    queue = [((), load.saving_records)], [((), load.saving_bytes)]
    records, under_way = queue if figures else ([], [])
    to.gauges("millpond_ssd_queue_records", "Records that wait for the writer, or are being written.", (), records)
    to.gauges(
        "millpond_ssd_queue_bytes", "Bytes that the writer has been given and has not yet written.", (), under_way
    )
    for name, text in SSD_GAUGES.items():
        to.gauges(f"millpond_ssd_{name}", text, (), value(name))
    for name, text in SSD_COUNTERS.items():
        to.counters(f"millpond_ssd_{name}", text, (), value(name))
    skipped = [(reason, figures[name]) for name, reason in SSD_SKIPPED.items() if name in figures]
    text = "Records not written: no room, the day's limit, or writes are off."
    to.counters("millpond_ssd_skipped", text, ("reason",), skipped)
