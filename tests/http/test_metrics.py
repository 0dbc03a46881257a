"""GET /metrics: known requests give known numbers, and every scrape adds up, whatever goes on meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
from typing import TYPE_CHECKING

import httpx
import pytest
from metrics_page import DASHBOARDS, ROOT, RULES, Page, Samples, asked, expressions, scrape
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

from millpond import __version__
from millpond.http.metrics import SSD_COUNTERS, SSD_GAUGES, SSD_SKIPPED
from millpond.prefix.disk.stats import SsdStats
from millpond.types import ErrorKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Server, StartServer

SCRAPES = 200
PATIENCE = 120
"""Seconds after which something will not come true any more."""
ENDS = ("finished", "failed", "cancelled")


def post(server: Server, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20, verify=False)


def scraped(server: Server, condition: Callable[[Page], bool]) -> Page:
    """The first page on which it is so."""
    return until(lambda: scrape(server.url), condition)


def hang_up(server: Server, prompt: list[int]) -> None:
    """Ask for an endless stream and leave after its first piece."""
    with (
        httpx.Client(base_url=server.url, timeout=20) as client,
        client.stream("POST", "/v1/completions", json={"prompt": prompt, "max_tokens": 400, "stream": True}) as answer,
    ):
        next(answer.iter_lines())


@pytest.fixture
def known(start_server: StartServer) -> Iterator[Server]:
    """Tells when prompts are begun, as the real engine does."""
    with start_server("queue=0,slow=0.005") as server:
        yield server


# --- the formats --------------------------------------------------------------------------------------------------


def test_plain_text_by_default(server: Server) -> None:
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    page = Page(answer.text)
    assert page.value("millpond_build_info", model_name="test-model", version=__version__) == 1
    assert page.value("millpond_model_info", device="cpu", dtype="float32", lane="slots") == 1
    assert page.value("millpond_ready") == 1
    assert page.value("millpond_engine_state", state="ready") == 1
    assert page.value("millpond_engine_state", state="restarting") == 0
    assert page.value("millpond_connections") >= 1
    families = list(text_string_to_metric_families(answer.text))
    read = {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}
    assert read == page.samples
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith(("vllm:", "millpond_", "process_")), family.name
        for sample in family.samples:
            labelled = sample.labels.get("model_name") == "test-model"
            assert labelled != family.name.startswith("process_"), sample


def test_openmetrics_when_asked(server: Server) -> None:
    answer = httpx.get(f"{server.url}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert answer.text.endswith("# EOF\n")
    families = {family.name: family for family in openmetrics_families(answer.text)}
    wanted = {"millpond_requests_submitted": 1, "vllm:prompt_tokens": 1, "vllm:request_success": 4}
    for name, samples in wanted.items():
        assert [sample.name for sample in families[name].samples] == [f"{name}_total"] * samples
    assert families["vllm:iteration_tokens_total"].type == "histogram"


def test_one_name_is_one_family_and_one_series_one_sample(server: Server) -> None:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))


def test_behind_the_key(start_server: StartServer) -> None:
    with start_server("plain", "api_key", "a-secret-key") as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        answer = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer a-secret-key"})
        assert Page(answer.text).value("millpond_requests_refused_total", status="401", code="invalid_api_key") == 1


# --- known requests -----------------------------------------------------------------------------------------------


def test_known_requests_give_known_numbers(known: Server) -> None:
    """Prompts of 3 tokens, all but the last cached; the engine repeats them until max_tokens."""
    assert post(known, prompt=[64, 65, 66, 67], max_tokens=5).status_code == 200
    assert post(known, prompt=[[64, 65], [66, 67, 68]], max_tokens=2, n=2).status_code == 200
    assert post(known, prompt=[64, 65, 901], max_tokens=9).json()["choices"][0]["finish_reason"] == "stop"
    stopped = post(known, prompt="abcdefgh", max_tokens=8, stop="c").json()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == 2
    assert post(known, prompt=[64, 900], max_tokens=9).status_code == 500
    assert post(known, prompt=[902], max_tokens=9).status_code == 400
    hang_up(known, [64, 65])
    page = scraped(known, lambda page: page.value("millpond_requests_open") == 0)

    assert page.value("millpond_requests_submitted_total") == 10
    assert page.value("millpond_requests_finished_total") == 7
    assert page.value("millpond_requests_failed_total") == 2
    assert page.value("millpond_requests_cancelled_total") == 1
    for reason, count in {"length": 5, "stop": 2, "error": 2, "abort": 1}.items():
        assert page.value("vllm:request_success_total", finished_reason=reason) == count, reason
    for kind in ErrorKind:
        wanted = kind in (ErrorKind.ENGINE, ErrorKind.INVALID)
        assert page.value("millpond_request_failures_total", kind=kind.value) == wanted, kind

    begun = 1 + 4 + 1 + 1 + 1 + 1  # the refused one has no token: nor had it one to be counted
    prompts = 4 + 2 * (2 + 3) + 3 + 8 + 2 + 2
    cached = 3 + 2 * (1 + 2) + 2 + 3 + 1 + 1
    assert page.value("vllm:time_to_first_token_seconds_count") == begun
    assert page.value("vllm:request_prefill_time_seconds_count") == begun
    assert page.value("vllm:request_queue_time_seconds_count") == begun + 1
    assert page.value("vllm:prompt_tokens_total") == prompts
    assert page.value("vllm:prompt_tokens_cached_total") == cached
    assert page.value("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == cached
    assert page.value("vllm:prompt_tokens_by_source_total", source="local_compute") == prompts - cached

    # Of the one that hung up nobody knows how far it got.
    gone = page.value("vllm:generation_tokens_total") - (5 + 4 * 2 + 2 + 3 + 1)
    assert gone >= 1
    # An answer of k tokens has k - 1 gaps, and one more before an end that is no token.
    assert page.value("vllm:inter_token_latency_seconds_count") == 4 + 4 * 1 + 2 + 2 + 0 + (gone - 1)
    for name in ("e2e_request_latency", "request_decode_time", "request_inference_time"):
        assert page.value(f"vllm:{name}_seconds_count") == 7, name
    assert page.value("vllm:request_time_per_output_token_seconds_count") == 7
    assert page.value("vllm:request_prompt_tokens_count") == 7
    assert page.value("vllm:request_prompt_tokens_sum") == prompts - 2 - 2
    assert page.value("vllm:request_generation_tokens_sum") == 5 + 4 * 2 + 2 + 2
    assert page.value("vllm:request_generation_tokens_bucket", le="2.0") == 6
    assert page.value("vllm:request_generation_tokens_bucket", le="5.0") == 7
    assert page.value("vllm:request_max_num_generation_tokens_count") == 5
    assert page.value("vllm:request_max_num_generation_tokens_sum") == 5 + 2 + 2 + 2 + 2
    assert page.value("vllm:request_params_n_count") == 8
    assert page.value("vllm:request_params_n_sum") == 6 + 2 * 2
    assert page.value("vllm:request_params_max_tokens_sum") == 5 + 2 + 2 + 9 + 8 + 9 + 9 + 400


def test_the_parts_of_a_requests_time_add_up(start_server: StartServer) -> None:
    with start_server("queue=0.05,prefill=0.1,slow=0.02") as server:
        for _ in range(2):
            assert post(server, prompt=[64, 65], max_tokens=5).status_code == 200
        page = scrape(server.url)
    queue, prefill, decode, inference, first, whole = (
        page.value(f"vllm:{name}_seconds_sum")
        for name in (
            "request_queue_time",
            "request_prefill_time",
            "request_decode_time",
            "request_inference_time",
            "time_to_first_token",
            "e2e_request_latency",
        )
    )
    assert queue >= 2 * 0.05
    assert prefill >= 2 * 0.1
    assert decode >= 0.9 * 2 * 4 * 0.02  # two clocks
    assert first == pytest.approx(queue + prefill)
    assert inference == pytest.approx(prefill + decode)
    assert whole == pytest.approx(queue + prefill + decode)
    assert page.value("vllm:inter_token_latency_seconds_sum") == pytest.approx(decode)
    assert page.value("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(decode / 4)
    assert page.value("vllm:request_queue_time_seconds_bucket", le="0.03") == 0
    assert page.value("vllm:request_queue_time_seconds_bucket", le="+Inf") == 2


def test_refusals_by_code(start_server: StartServer) -> None:
    flags = ("api_key", "a-secret-key", "max_body", "2000", "max_waiting", "1", "allowed_hosts", "127.0.0.1")
    key = {"authorization": "Bearer a-secret-key"}
    with start_server("rows=1", *flags) as server, httpx.Client(base_url=server.url, headers=key, timeout=20) as client:
        page = Page(client.get("/metrics").text)
        assert "millpond_requests_refused_total" not in page.names
        for _ in range(3):
            assert client.get("/v1/models", headers={"authorization": "Bearer another-key"}).status_code == 401
        assert client.get("/v1/models", headers={"host": "elsewhere.test"}).status_code == 403
        assert client.post("/v1/completions", content=b"{" + b" " * 3000).status_code == 413
        assert client.post("/v1/completions", json={"prompt": "a", "n": 3}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": "a", "temperature": -1}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": "a", "model": "gpt-5"}).status_code == 404
        assert client.get("/nowhere").status_code == 404
        assert client.delete("/health").status_code == 405
        endless = {"prompt": [64], "n": 2, "max_tokens": 500, "stream": True}
        with client.stream("POST", "/v1/completions", json=endless) as running:
            lines = running.iter_lines()
            next(lines)
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 429
        until_free = httpx.Client(base_url=server.url, headers=key)
        while Page(until_free.get("/metrics").text).value("millpond_permits_held"):
            pass
        assert client.post("/v1/completions", json={"prompt": [900]}).status_code == 500
        page = Page(client.get("/metrics").text)
    found = {
        (labels["status"], labels["code"]): value
        for (name, said), value in page.samples.items()
        if name == "millpond_requests_refused_total" and (labels := dict(said))
    }
    assert found == {
        ("400", "invalid_value"): 2,
        ("401", "invalid_api_key"): 3,
        ("403", "host_not_allowed"): 1,
        ("404", "model_not_found"): 1,
        ("404", "not_found"): 1,
        ("405", "method_not_allowed"): 1,
        ("413", "request_too_large"): 1,
        ("429", "queue_full"): 1,
    }
    assert page.value("millpond_request_failures_total", kind="engine_error") == 1


def test_a_server_that_is_not_ready_has_numbers(start_server: StartServer) -> None:
    with start_server("load=2", ready=False) as server:
        page = scrape(server.url)
        assert page.value("millpond_ready") == 0
        assert page.value("millpond_engine_state", state="starting") == 1
        assert "millpond_model_info" not in page.names
        assert post(server, prompt="a").status_code == 503
        page = scraped(server, lambda page: page.value("millpond_ready") == 1)
        assert page.value("millpond_requests_refused_total", status="503", code="unavailable") == 1
        assert page.value("millpond_requests_submitted_total") == 0


def test_time_outs_and_places(start_server: StartServer) -> None:
    """A time-out is a failure of its own kind; places are given back."""
    with start_server("queue=0", "first_token_timeout", "0.3") as server:
        assert post(server, prompt=[64, 903], max_tokens=1).status_code == 200
        assert post(server, prompt=[903], max_tokens=1).status_code == 504
        page = scrape(server.url)
        assert page.value("millpond_request_failures_total", kind="first_token_timeout") == 1
        assert page.value("millpond_requests_cancelled_total") == 0
        assert page.value("millpond_permits_held") == 0
        assert page.value("millpond_permits_limit") == 8 + 512


# --- the engine's numbers -----------------------------------------------------------------------------------------

ENGINE_NUMBERS = {
    "vllm:num_requests_waiting": 3,
    "vllm:num_requests_running": 0,
    "vllm:kv_cache_usage_perc": 64 / 4096,
    "millpond_kv_bytes": 64,
    "millpond_queue_wait_seconds": 0.5,
    "millpond_engine_prefill_tokens_total": 7,
    "millpond_engine_drawn_tokens_total": 11,
    "vllm:num_preemptions_total": 2,
    "millpond_engine_failed_steps_total": 3,
    "millpond_engine_step_seconds_sum": 0.75,
    "millpond_engine_step_seconds_count": 9,
    "millpond_engine_step_rows_sum": 20,
    "millpond_engine_step_rows_count": 6,
    "vllm:iteration_tokens_total_sum": 130,
    "vllm:iteration_tokens_total_count": 7,
    "vllm:spec_decode_num_drafts_total": 6,
    "vllm:spec_decode_num_draft_tokens_total": 17,
    "vllm:spec_decode_num_accepted_tokens_total": 12,
    "millpond_spec_steps_total": 4,
    "millpond_spec_fallback_steps_total": 5,
    "millpond_spec_drawn_tokens_total": 18,
    "millpond_spec_bonus_tokens_total": 3,
    "millpond_spec_depth": 2.5,
    "vllm:prefix_cache_queries_total": 1900,
    "vllm:prefix_cache_hits_total": 1000,
    "millpond_prefix_cache_bytes": 1000,
    "millpond_prefix_cache_blocks": 10,
    "millpond_prefix_cache_misses_total": 5,
    "millpond_prefix_cache_computed_tokens_total": 900,
    "millpond_prefix_cache_evicted_blocks_total": 13,
    "millpond_prefix_cache_unsaved_blocks_total": 6,
    "millpond_prefix_cache_selfchecks_total": 8,
    "millpond_prefix_cache_mismatches_total": 1,
    "millpond_ssd_queue_records": 12,
    "millpond_ssd_queue_bytes": 640,
}
"""What the scripted engine's figures come out as, for each ended request."""


def test_the_engines_numbers(start_server: StartServer) -> None:
    with start_server("figures") as server:
        for _ in range(3):
            assert post(server, prompt=[64, 65], max_tokens=4).status_code == 200
        page = scraped(server, lambda page: page.value("millpond_prefix_cache_mismatches_total") == 3)
        for name, each in ENGINE_NUMBERS.items():
            assert page.value(name) == 3 * each, name
        assert page.value("millpond_engine_steps_total") == 12
        assert page.value("millpond_kv_limit_bytes") == page.value("millpond_prefix_cache_limit_bytes") == 4096
        for le, count in {"0.01": 15, "0.1": 24, "+Inf": 27}.items():
            assert page.value("millpond_engine_step_seconds_bucket", le=le) == count
        for place, (proposed, accepted) in enumerate(((6, 5), (6, 4), (5, 3))):
            where = {"position": str(place)}
            assert page.value("millpond_spec_draft_tokens_per_pos_total", **where) == 3 * proposed
            assert page.value("vllm:spec_decode_num_accepted_tokens_per_pos_total", **where) == 3 * accepted
        assert page.value("millpond_prefix_cache_hits_total", tier="memory") == 15
        assert page.value("millpond_prefix_cache_hits_total", tier="disk") == 12
        assert page.value("millpond_prefix_cache_tokens_total", tier="memory") == 1800
        assert page.value("millpond_prefix_cache_tokens_total", tier="disk") == 1200
        for number, name in enumerate(SsdStats.__struct_fields__, 1):
            if name in SSD_SKIPPED:
                assert page.value("millpond_ssd_skipped_total", reason=SSD_SKIPPED[name]) == 3 * number, name
            else:
                exported = f"millpond_ssd_{name}" + ("_total" if name in SSD_COUNTERS else "")
                assert page.value(exported) == 3 * number, name

        os.kill(server.engine_pid(), signal.SIGKILL)
        page = scraped(server, lambda page: page.value("millpond_engine_restarts_total") == 1)
        page = scraped(server, lambda page: page.value("millpond_ready") == 1)
        assert page.value("millpond_requests_finished_total") == 3
        assert page.value("millpond_engine_steps_total") == 0
        assert page.value("millpond_engine_step_seconds_count") == 0
        assert page.value("millpond_prefix_cache_mismatches_total") == 0


def test_every_figure_of_the_ssd_tier_has_a_metric() -> None:
    named = [*SSD_GAUGES, *SSD_COUNTERS, *SSD_SKIPPED]
    assert len(named) == len(set(named))
    assert set(named) == set(SsdStats.__struct_fields__)


def test_without_an_ssd_tier_there_are_no_figures_of_it(server: Server) -> None:
    page = scrape(server.url)
    assert not [name for name in page.names if name.startswith("millpond_ssd")]


# --- at all times -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_scrape_adds_up(start_server: StartServer) -> None:
    """Answers that finish, stop, fail and are given up, and engines that die, while 200 scrapes look on."""
    with start_server("slow=0.004,queue=0.002", "max_restarts", "1000") as server:
        asyncio.run(look_on(server.url))
        page = scraped(server, lambda page: page.value("millpond_requests_open") == 0)
        ended = {end: page.value(f"millpond_requests_{end}_total") for end in ENDS}
        assert min(ended.values()) >= 5, ended
        assert page.value("millpond_engine_restarts_total") >= 1
        reasons = {"stop": "finished", "length": "finished", "abort": "cancelled", "error": "failed"}
        for reason, end in reasons.items():
            assert page.value("vllm:request_success_total", finished_reason=reason) <= ended[end]
        assert page.value("vllm:e2e_request_latency_seconds_count") <= ended["finished"]


async def look_on(url: str) -> None:
    """Scrape under load; every scrape must add up, and nothing may fall but what the engine counts."""
    chooser = random.Random(5)
    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
        done = asyncio.Event()
        load = [asyncio.create_task(ask(client, random.Random(seed), done)) for seed in range(8)]
        before: Samples = {}
        for number in range(SCRAPES):
            answer = await client.get("/metrics")
            page = Page(answer.text)
            parts = [page.value(f"millpond_requests_{end}_total") for end in ENDS]
            assert page.value("millpond_requests_submitted_total") == sum(parts) + page.value("millpond_requests_open")
            reasons = ("stop", "length", "abort", "error")
            assert sum(page.value("vllm:request_success_total", finished_reason=each) for each in reasons) == sum(parts)
            failures = (page.value("millpond_request_failures_total", kind=kind.value) for kind in ErrorKind)
            assert sum(failures) == parts[1]
            fallen = [key for key, value in before.items() if page.rising[key] < value and not by_the_engine(key[0])]
            assert not fallen, fallen
            before = page.rising
            if number in (60, 130):
                await client.post("/v1/completions", json={"prompt": [904], "max_tokens": 3})
            elif chooser.random() < 0.3:
                await asyncio.sleep(0.01)
        done.set()
        await asyncio.gather(*load)


async def ask(client: httpx.AsyncClient, chooser: random.Random, done: asyncio.Event) -> None:
    """Requests of all kinds, one after another."""
    while not done.is_set():
        body: dict[str, object] = {"prompt": chooser.choice(([64, 65], [64, 65, 901], [64, 900], "abcabc", "xyzxyz"))}
        body |= {"max_tokens": chooser.randint(1, 40), "n": chooser.choice((1, 1, 2)), "stream": chooser.random() < 0.5}
        if chooser.random() < 0.3:
            body["stop"] = "c"
        patience = chooser.choice((0.02, 20, 20))
        try:
            async with asyncio.timeout(patience):
                await client.post("/v1/completions", json=body)
        except TimeoutError:
            pass


def by_the_engine(name: str) -> bool:
    """Whether a number begins anew with each engine."""
    own = ("vllm:num_preemptions", "vllm:prefix_cache", "vllm:iteration_tokens", "vllm:spec_decode")
    steps = name.startswith("millpond_engine") and name != "millpond_engine_restarts_total"
    return steps or name.startswith((*own, "millpond_prefix_cache", "millpond_ssd", "millpond_spec"))


# --- what asks for them -------------------------------------------------------------------------------------------


def test_dashboards_and_rules_ask_for_metrics_that_there_are(start_server: StartServer) -> None:
    with start_server("figures") as server:
        assert post(server, prompt=[64], max_tokens=2).status_code == 200
        assert post(server, prompt=[64], max_tokens=2, model="none").status_code == 404
        there = scraped(server, lambda page: "millpond_ssd_bytes" in page.names).names
    for file in (*DASHBOARDS, *RULES):
        for expression in expressions(file):
            assert asked(expression), expression
            assert asked(expression) <= there, (file.name, expression, asked(expression) - there)
    everything = {name for file in DASHBOARDS for expression in expressions(file) for name in asked(expression)}
    assert len(everything) > 60


def test_the_documentation_names_every_metric_and_no_other(start_server: StartServer) -> None:
    with start_server("figures") as server:
        assert post(server, prompt=[64], model="none").status_code == 404
        assert post(server, prompt=[64]).status_code == 200
        page = scraped(server, lambda page: "millpond_ssd_bytes" in page.names)
    parts = ("_bucket", "_sum", "_count")
    there = {name for name in page.names if name.startswith(("vllm:", "millpond_")) and not name.endswith(parts)}
    there |= {name.removesuffix("_count") for name in page.names if name.endswith("_count")}
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:vllm:|millpond_)[a-z0-9_]+)", text)) == there


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.name)
def test_dashboards_can_be_imported(file: Path) -> None:
    board = json.loads(file.read_text(encoding="utf-8"))
    assert board["id"] is None
    assert board["uid"]
    assert board["title"]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["DS_PROMETHEUS"]["type"] == "datasource"
    assert variables["DS_PROMETHEUS"]["query"] == "prometheus"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"] is not None
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters)), panel["title"]
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}, panel["title"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables.keys() | {"__rate_interval"}, target["expr"]
            assert "instance" in used, target["expr"]


def test_asked_finds_the_metrics_of_an_expression() -> None:
    rate = 'sum by (le, a) (rate(vllm:x_bucket{y=~"$z", w="n(m"}[5m]))'
    found = asked(f"{rate} / ignoring (t) group_left () max(k_1 and on (i) k2 > 1e3)")
    assert found == {"vllm:x_bucket", "k_1", "k2"}
