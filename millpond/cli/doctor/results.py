"""What the self-test's measurements say: a row of its table for each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millpond.cli.doctor.timing import DecodeRate, TimedAnswer
from millpond.types import ModelInfo

START, PARITY, HIT, DONATION, RESTART = "engine start", "parity", "cache hit", "donation", "restart-warm"


@dataclass(frozen=True)
class ResultRow:
    """``figures`` are what was measured, by name, each with its unit; nothing that was not is in them."""

    test: str
    state: str
    """ok, skipped or failed."""
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


def decode_name(rows: int) -> str:
    return f"decode, {rows} row{'s' if rows > 1 else ''}"


def prefill_name(tokens: int) -> str:
    return f"prefill, {tokens // 1024}k tokens"


def skipped(test: str, why: str) -> ResultRow:
    return ResultRow(test, "skipped", f"not run: {why}")


def failed(test: str, why: str) -> ResultRow:
    return ResultRow(test, "failed", why)


def started(info: ModelInfo, seconds: float) -> ResultRow:
    """The engine is ready."""
    lane = "lane slots (rows share one forward)"
    if info.lane != "slots":
        lane = f"lane {info.lane} (a forward for each row: {info.lane_reason})"
    text = f"{duration(seconds)}; {info.dtype}, keys and values {info.kv_format}, {lane}"
    return ResultRow(START, "ok", text, {"seconds": seconds})


def donation(info: ModelInfo) -> ResultRow:
    """Whether a step in flight makes the next copy what rows hold."""
    if info.lane != "slots":
        return ResultRow(DONATION, "ok", "does not apply: each row writes to a cache of its own")
    what = "writes in place while a step is in flight"
    if info.pipelined:
        return ResultRow(DONATION, "ok", f"{what}: yes")
    return ResultRow(DONATION, "ok", f"{what}: no, so each step waits for the one before it on a GPU")


def parity(info: ModelInfo, together: Sequence[TimedAnswer], alone: Sequence[TimedAnswer]) -> ResultRow:
    """What the start-up probe found, and whether answers depend on who else is being answered. Where products of
    different sizes round differently, as on GPUs, some may: that is no failure."""
    same = sum(one.tokens == other.tokens for one, other in zip(together, alone, strict=True))
    count, length = len(alone), len(alone[0].tokens)
    probed = "probe at start: held" if info.lane == "slots" else "no shared forward"
    told = f"{same} of {count} answers of {length} tokens the same together as alone"
    text = "; ".join(filter(None, (probed, told, rounding(info.alike))))
    return ResultRow(PARITY, "ok", text, {"answers": count, "same": same, "answer_tokens": length})


def rounding(alike: Sequence[Sequence[int]]) -> str:
    """Whether a row's last bits depend on how many rows there are; empty where that was not compared."""
    if len(alike) <= 1:
        return f"the same bits for 1 to {alike[0][-1]} rows" if alike else ""
    return f"other bits by number of rows: {'; '.join(', '.join(map(str, group)) for group in alike)}"


def hit(misses: Sequence[TimedAnswer], hits: Sequence[TimedAnswer]) -> ResultRow:
    """Whether prompts that are asked alone, and then alone once more, are answered the same: every forward that is not
    spared has the same shape then, so they are on any device, or something is wrong."""
    found = [(miss, again) for miss, again in zip(misses, hits, strict=True) if again.prefix.cached]
    if not found:
        return skipped(HIT, f"nothing was restored ({hits[0].prefix.end})")
    cached = sum(again.prefix.cached for _, again in found)
    same = sum(miss.tokens == again.tokens for miss, again in found)
    figures = {"answers": len(found), "same": same, "restored_tokens": cached}
    text = f"{same} of {len(found)} answers the same with {cached} tokens restored as without"
    return ResultRow(HIT, "ok" if same == len(found) else "failed", text, figures)


def decoded(rows: int, rate: DecodeRate | None) -> ResultRow:
    """Plain decoding of so many rows at once."""
    if rate is None:
        return skipped(decode_name(rows), "memory for keys and values does not hold so many rows at once")
    ms = rate.step_seconds * 1000
    figures = {"tokens_per_second": rate.tokens_per_second, "step_ms": ms}
    return ResultRow(decode_name(rows), "ok", f"{rate.tokens_per_second:.4g} tok/s, {ms:.3g} ms per step", figures)


def prefilled(test: str, answer: TimedAnswer) -> ResultRow:
    """A prompt of which nothing was cached."""
    rate, tokens = answer.prefill_rate, answer.prompt_tokens
    text = f"TTFT {duration(answer.first_seconds)} of {tokens} tokens, {rate:.4g} tok/s"
    figures = {"prompt_tokens": tokens, "ttft_seconds": answer.first_seconds, "tokens_per_second": rate}
    return ResultRow(test, "ok", text, figures)


def restarted(cold: TimedAnswer, warm: TimedAnswer, disk: str) -> ResultRow:
    """The same prompt, before and after the engine's restart. ``disk``: the kind of file system the SSD tier was on;
    empty where it is not known."""
    came = warm.prefix.disk
    ratio = cold.first_seconds / max(warm.first_seconds, 1e-9)
    where = f" ({disk})" if disk else ""
    text = f"TTFT {duration(warm.first_seconds)} of {warm.prompt_tokens} tokens, {came} of them from disk{where}"
    text += f": {ratio:.3g} times as fast as cold" if came else f": {warm.prefix.end}"
    figures = {
        "prompt_tokens": warm.prompt_tokens,
        "ttft_seconds": warm.first_seconds,
        "disk_tokens": came,
        "cold_to_warm": ratio,
    }
    if came == warm.prompt_tokens - 1 and warm.tokens != cold.tokens:  # otherwise the rest was read in other chunks
        return ResultRow(RESTART, "failed", f"{text}; its answer is another one", figures)
    return ResultRow(RESTART, "ok", text, figures)


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
