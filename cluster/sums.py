"""Who holds which shards, and sums over them in the shape of one tree that is fixed by their number alone.

Additions of floating-point numbers depend on their order. Here the sum over shards a … b is that over the first half of
them plus that over the second, all the way down. So whoever holds neighbouring shards adds up as much as makes whole
branches and hands those on: the bits are the same wherever shards lie, and few sums travel instead of many parts.
"""

import itertools
import math
from collections.abc import Collection, Mapping

import numpy as np

Span = tuple[int, int]  # from the first shard to before the second
TOGETHER = 2  # shards that a worker adds up itself: with each doubling it would hold one more sum at once


def halves(span: Span) -> tuple[Span, Span]:
    """The two branches below a span of more than one shard."""
    first, after = span
    middle = (first + after + 1) // 2
    return (first, middle), (middle, after)


def branches(held: Span, whole: Span, most: float = math.inf) -> list[Span]:
    """The largest branches of the tree over `whole` that lie in `held` and have at most `most` shards, in order."""
    first, after = max(held[0], whole[0]), min(held[1], whole[1])
    if first >= after:
        return []
    if (first, after) == whole and after - first <= most:
        return [whole]
    return [one for half in halves(whole) for one in branches(held, half, most)]


def spread(shards: int, workers: int) -> list[list[int]]:
    """Consecutive shards for each worker, as even as can be; a worker too many gets none."""
    bounds = [math.ceil(worker * shards / workers) for worker in range(workers + 1)]
    return [list(range(low, high)) for low, high in itertools.pairwise(bounds)]


def of_worker(shards: Collection[int], count: int) -> list[Span]:
    """The sums that a worker with some neighbouring shards, of `count` in all, hands on."""
    return branches((min(shards), max(shards) + 1), (0, count), TOGETHER) if shards else []


def added(parts: Mapping[Span, np.ndarray], span: Span) -> np.ndarray:
    """The sum over a span, of sums over branches of it; these are left as they are. A sum of one part is that part."""
    if span in parts:
        return parts[span]
    assert span[1] - span[0] > 1, f"no sum over shard {span[0]}"
    first, second = halves(span)
    left, right = added(parts, first), added(parts, second)
    own = None  # a sum that is not a part is nobody else's
    if first not in parts:
        own = left
    elif second not in parts:
        own = right
    return np.add(left, right, out=own)
