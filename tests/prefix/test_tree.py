"""The tree of cached blocks and the identity of its keys."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_support import NAMESPACE, Fake, check_tree

from millpond.prefix.keys import Namespace, common_tokens, next_key, pack, root_key
from millpond.prefix.match import Chain
from millpond.prefix.records import BLOCK, Kind
from millpond.prefix.tree import Node, Tree

few_tokens = st.lists(st.sampled_from([0, 1, 255, 256, 65536]), max_size=6)


def shared(left: list[int], right: list[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


@given(few_tokens, few_tokens)
def test_packed_tokens_compare_like_lists(left: list[int], right: list[int]) -> None:
    assert (pack(left) < pack(right)) == (left < right)
    assert common_tokens(pack(left), pack(right)) == shared(left, right)


@given(st.lists(few_tokens.filter(len), max_size=12), few_tokens)
def test_closest_is_the_longest_common_prefix_of_all_children(children: list[list[int]], query: list[int]) -> None:
    """As brute force over the children finds it; of two equals one in memory (E3)."""
    tree = Tree(NAMESPACE)
    root = tree.root("")
    for tokens in children:
        tree.add(root, pack(tokens))
    node, found = root.closest(pack(query))
    assert found == max((shared(tokens, query) for tokens in children), default=0)
    assert (node is None) == (found == 0)
    if node is not None:
        assert common_tokens(node.tokens, pack(query)) == found
    tails = [tail.tokens for tail in root.tails(pack(query))]
    expected = sorted({tuple(tokens) for tokens in children if query[: len(tokens)] == tokens}, key=len)
    assert tails == [pack(tokens) for tokens in expected]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, BLOCK), st.booleans()), max_size=25))
def test_a_node_lives_while_it_holds_something(steps: list[tuple[int, int, int, bool]]) -> None:
    """Adding and forgetting in any order: no key without data, no data without its key (E4)."""
    tree = Tree(NAMESPACE)
    root = tree.root("")
    for first, second, tail, forget in steps:
        middle = tree.add(root, pack([first] * BLOCK))
        leaf = tree.add(middle, pack([second] * tail))
        leaf.disk[Kind.KV] = 1
        check_tree(tree)
        assert tree.add(middle, pack([second] * tail)) is leaf
        assert tree.get(leaf.key) is leaf
        if forget:
            leaf.disk.clear()
            tree.prune(leaf)
            assert not leaf.alive
            assert tree.get(leaf.key) is None
            assert middle.alive == bool(middle.children)
        check_tree(tree)


def test_pins_records_and_children_keep_a_node() -> None:
    tree = Tree(NAMESPACE)
    node = tree.add(tree.root("a"), pack([1] * BLOCK))
    node.pins = 1
    tree.prune(node)
    assert node.alive
    node.pins, node.records[Kind.KV] = 0, Fake(b"")
    tree.prune(node)
    assert node.alive
    del node.records[Kind.KV]
    tree.prune(node)
    assert not node.alive
    assert not tree.root("a").children


def test_a_root_stays_the_same_while_somebody_holds_it() -> None:
    tree = Tree(NAMESPACE)
    root = tree.root("tenant")
    assert tree.root("tenant") is root
    assert tree.parent_of(root.key, 0) is root
    assert tree.parent_of(root.key, BLOCK) is None
    key = tree.add(root, pack([1])).key
    del root
    found = tree.get(key)
    assert isinstance(found, Node)
    assert tree.root("tenant") is found.parent


# --- identity (E1) -----------------------------------------------------------------------------------------------

PLAIN = Namespace(weights="w", kv_format="float16", layers=["kv 2 16"], code="0.32")
CHANGES: dict[str, object] = {
    "weights": "w2",
    "adapter": "a",
    "kv_format": "float32",
    "layers": ["kv 2 16", "kv 2 16"],
    "rank": 1,
    "world": 2,
    "format": 2,
    "block": 32,
    "code": "0.33",
}


def test_every_field_of_a_namespace_separates() -> None:
    """Weights, adapter, format, layers, rank, world, versions: each alone makes other keys (E1)."""
    assert set(CHANGES) == set(Namespace.__struct_fields__)
    digests = {PLAIN.digest, *(msgspec.structs.replace(PLAIN, **{name: CHANGES[name]}).digest for name in CHANGES)}
    assert len(digests) == len(CHANGES) + 1
    assert msgspec.structs.replace(PLAIN).digest == PLAIN.digest


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_same_tokens_in_another_namespace_have_other_keys(name: str) -> None:
    other = msgspec.structs.replace(PLAIN, **{name: CHANGES[name]})
    keys = [next_key(root_key(each.digest), pack([1, 2, 3])) for each in (PLAIN, other)]
    assert len(set(keys)) == 2
    assert all(len(key) == 32 for key in keys)


@given(st.text(max_size=8), st.text(max_size=8), st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_salts_separate(left: str, right: str, tokens: list[int]) -> None:
    assert (root_key(NAMESPACE, left) == root_key(NAMESPACE, right)) == (left == right)
    keys = [next_key(root_key(NAMESPACE, salt), pack(tokens)) for salt in (left, right)]
    assert (keys[0] == keys[1]) == (left == right)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1), max_size=3 * BLOCK), min_size=2, max_size=4, unique_by=tuple))
def test_keys_are_equal_only_for_equal_tokens_from_the_start(sequences: list[list[int]]) -> None:
    """A block after another parent, or of another length, has another key (E1)."""
    known: dict[bytes, tuple[int, ...]] = {}
    for tokens in sequences:
        chain = Chain(root_key(NAMESPACE))
        for step in range(1, len(tokens) + 1, 7):
            chain.extend(tokens[:step])
        chain.extend(tokens)
        for start in range(0, len(tokens), BLOCK):
            for end in {min(start + BLOCK, len(tokens)), start + 1}:
                before = tuple(tokens[:end])
                assert known.setdefault(chain.key(start, end), before) == before
    assert len(known) == len(set(known.values()))
