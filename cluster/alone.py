"""A stage's work in one process, without Ray: what workers and tasks do together, in their order."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from cluster.storage import Stored
from cluster.sums import added, of_worker
from cluster.work import BlockWork, RoundedWork


def blocks_alone(work: BlockWork) -> Iterator[Stored]:
    """Works through all blocks in order; yields each one's file when it is written."""
    work.setup()
    shards = {shard: work.open_shard(shard) for shard in range(work.shard_count)}
    for block in range(work.block_count):
        solved: list[list[Any]] = []
        for units in work.turns():
            groups = sorted({unit.group for unit in units if unit.group is not None})
            sums = work.statistics(block, shards, groups, solved) if groups else ()
            prepared: dict[str | None, Any] = {
                name: work.prepare(name, total) for name, total in totals(sums, groups, len(shards)).items()
            }
            solved.append([work.solve(block, unit, prepared.get(unit.group)) for unit in units])
        results = list(itertools.chain.from_iterable(solved))
        refined = _refined(cast(RoundedWork, work), block, results, shards) if work.rounds else None
        yield (finished := work.assemble(block, refined, results))
        if block + 1 < work.block_count:
            work.advance(block, finished, solved[-1] if work.flows_on else (), shards)


def totals(sums: Iterable[np.ndarray], groups: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """The sum over all shards for each group, of what `BlockWork.statistics` yields to who holds them all."""
    parts = [one.copy() for one in sums]  # they may be filled again
    spans = of_worker(range(count), count)
    return {
        name: added(dict(zip(spans, parts[number :: len(groups)], strict=True)), (0, count))
        for number, name in enumerate(groups)
    }


def _refined(work: RoundedWork, block: int, results: Sequence[Any], shards: Mapping[int, Any]) -> Any:
    """What the rounds make of a block's results."""
    seen, kept = work.begin(block, results)
    for number in range(work.rounds):
        seen, kept = work.refine(block, number, seen, kept, list(work.look(block, number, seen, shards)))
    return seen
