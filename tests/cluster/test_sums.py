"""Sums over shards: the same bits, whoever holds which shards."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.sums import TOGETHER, added, branches, halves, of_worker

SHARDS = 12


@st.composite
def holders(draw) -> tuple[int, list[tuple[int, int]]]:
    """A number of shards, and neighbouring ones for each of some holders."""
    shards = draw(st.integers(1, SHARDS))
    bounds = draw(st.lists(st.integers(0, shards), max_size=shards))
    return shards, list(pairwise([0, *sorted(bounds), shards]))


def leaves(shards: int) -> dict[tuple[int, int], np.ndarray]:
    """Numbers whose sum depends on the order of additions."""
    random = np.random.default_rng(shards)
    return {
        (shard, shard + 1): (random.standard_normal(50) * 10.0 ** random.integers(-4, 5, 50)).astype(np.float32)
        for shard in range(shards)
    }


@given(holders(), st.data())
def test_bits_do_not_depend_on_who_holds_what(found, data):
    shards, held = found
    whole, parts = (0, shards), leaves(shards)
    wanted = added(parts, whole)
    of_workers = {span: added(parts, span) for own in held for span in of_worker(range(*own), shards)}
    assert np.array_equal(added(of_workers, whole), wanted)
    first = data.draw(st.integers(0, len(held)))  # two nodes, each with some of the workers
    of_nodes = {}
    for own in (held[:first], held[first:]):
        if own:
            of_nodes |= {span: added(of_workers, span) for span in branches((own[0][0], own[-1][1]), whole)}
    assert np.array_equal(added(of_nodes, whole), wanted)


@given(holders())
def test_branches_are_all_that_is_held_and_no_two_could_be_one(found):
    shards, held = found
    for own in held:
        spans = branches(own, (0, shards))
        assert [shard for span in spans for shard in range(*span)] == list(range(*own))
        assert not any(set(halves(span)) <= set(spans) for span in tree((0, shards)))


@given(holders())
def test_a_worker_adds_up_few_shards_at_once(found):
    shards, held = found
    for own in held:
        spans = of_worker(range(*own), shards)
        assert [shard for span in spans for shard in range(*span)] == list(range(*own))
        assert all(after - first <= TOGETHER for first, after in spans)


def tree(span: tuple[int, int]) -> list[tuple[int, int]]:
    """All spans of more than one shard."""
    return [] if span[1] - span[0] == 1 else [span, *(one for half in halves(span) for one in tree(half))]


def test_parts_are_left_as_they_are():
    parts = leaves(7)
    before = {span: part.copy() for span, part in parts.items()}
    for part in parts.values():
        part.flags.writeable = False  # as they come from a store
    added(parts, (0, 7))
    assert all(np.array_equal(parts[span], before[span]) for span in parts)


def test_the_sum_is_right():
    assert added({(0, 2): np.float64([3, 1]), (2, 3): np.float64([4, 1])}, (0, 3)).tolist() == [7, 2]
    assert halves((0, 3)) == ((0, 2), (2, 3))


def test_a_missing_shard_is_an_error():
    parts = leaves(4)
    del parts[2, 3]
    with pytest.raises(AssertionError, match="no sum over shard 2"):
        added(parts, (0, 4))
