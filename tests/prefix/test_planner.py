"""What can be restored, against a definition that looks at every position."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_support import LAYOUTS

from millpond.prefix.planner import Layout, Link, needed, restorable
from millpond.prefix.records import BLOCK, Kind

layouts = st.one_of(
    st.sampled_from(list(LAYOUTS.values())),
    st.builds(
        Layout,
        window=st.sampled_from([0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 200]),
        state=st.booleans(),
    ),
)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Link], Layout]:
    """Blocks as a match yields them: whole ones, the last one maybe shorter or matched in part."""
    layout = draw(layouts)
    links = []
    for index in range(draw(st.integers(0, 6))):
        start, end = index * BLOCK, (index + 1) * BLOCK
        held_from = max(start, end - layout.window) if draw(st.integers(0, 5)) else end
        links.append(Link(start, end, bool(draw(st.integers(0, 7))), held_from, draw(st.booleans())))
    if links and draw(st.booleans()):
        used = draw(st.integers(1, BLOCK))
        last = links[-1]
        end = last.start + used
        links[-1] = Link(last.start, end, last.kv, min(last.window_from, end), last.state)
    return links, layout


def can_resume(links: list[Link], layout: Layout, position: int) -> bool:
    """Every layer has what it needs: all tokens, the window before the position, a snapshot at it (E7)."""
    before = [link for link in links if link.start < position]
    if not before or before[-1].end != position or not all(link.kv for link in before):
        return False
    covered = {at for link in before for at in range(link.window_from, link.end)}
    window = set(range(max(0, position - (layout.window - 1)), position)) if layout.window else set()
    return window <= covered and (not layout.state or before[-1].state)


@settings(max_examples=300)
@given(chains())
def test_restorable_is_the_largest_position_that_every_layer_can_resume(chain: tuple[list[Link], Layout]) -> None:
    links, layout = chain
    expected = max((link.end for link in links if can_resume(links, layout, link.end)), default=0)
    assert restorable(links, layout) == expected


@settings(max_examples=300)
@given(chains())
def test_needed_is_exactly_what_a_restore_reads(chain: tuple[list[Link], Layout]) -> None:
    """Without any one of the records the position cannot be resumed, with just these it can (E7)."""
    links, layout = chain
    resume = restorable(links, layout)
    wanted = needed(links, layout, resume)
    assert [index for index, _ in wanted] == sorted(index for index, _ in wanted)
    assert len(set(wanted)) == len(wanted)

    def reduced(keep: set[tuple[int, Kind]]) -> list[Link]:
        return [
            Link(
                link.start,
                link.end,
                (index, Kind.KV) in keep,
                link.window_from if (index, Kind.WINDOW) in keep else link.end,
                link.state and (index, Kind.STATE) in keep,
            )
            for index, link in enumerate(links)
        ]

    if not resume:
        assert wanted == []
        return
    assert can_resume(reduced(set(wanted)), layout, resume)
    for left_out in wanted:
        assert not can_resume(reduced(set(wanted) - {left_out}), layout, resume), left_out


@given(layouts)
def test_a_layout_says_what_it_needs(layout: Layout) -> None:
    assert layout.kinds[0] is Kind.KV
    assert (Kind.WINDOW in layout.kinds, Kind.STATE in layout.kinds) == (layout.window > 0, layout.state)
    if layout.window:
        ends = range(BLOCK, 6 * BLOCK)
        most = max(-(-end // BLOCK) - (end - layout.reach) // BLOCK for end in ends if end > layout.reach + BLOCK)
        assert layout.trail >= most, "a window may lie in more blocks than are kept for it"
    else:
        assert layout.trail == 0
