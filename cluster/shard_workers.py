"""The processes of the layer-wise engine: workers that hold shards, and tasks; Ray's side of a `BlockWork`."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import ray

from cluster.freed import giving_back
from cluster.gangs import RETRIES
from cluster.storage import Stored
from cluster.sums import Span, added
from cluster.work import BlockWork, RoundedWork, Unit


class Solved(Sequence[Any]):
    """Results of a block's turns; those before the last are fetched by who asks, which is a worker that is new."""

    def __init__(self, earlier: Sequence[Any], last: Sequence[Any]) -> None:
        self._earlier, self._last = earlier, last

    def __len__(self) -> int:
        return len(self._earlier) + 1

    def __getitem__(self, turn: Any) -> Any:
        own = range(len(self))[turn]
        return self._last if own == len(self._earlier) else ray.get(self._earlier[own])


@ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES)
class ShardWorker:
    """Holds the activations of some shards and, while at it, one block."""

    def __init__(self, work: BlockWork, shards: Sequence[int]) -> None:
        self.work = work
        self.shards = shards
        self.position: int | None = None
        self.activations: dict[int, Any] = {}
        work.setup()

    def statistics(
        self,
        block: int,
        turn: int,
        groups: Sequence[str],
        finished: Sequence[Stored],
        earlier: Sequence[Any],
        *last: Any,
    ) -> Iterator[Any]:
        """Statistics of some inputs of one block, after catching up to it; see `BlockWork.statistics`.

        Args:
            block: which one.
            turn: turns of it that were.
            groups: the inputs.
            finished: blocks that are.
            earlier: references to the results of this block's turns before the last one.
            last: results of the last turn, of this block or of the one before.
        """
        self._catch_up(block, finished, () if turn else last)
        solved = Solved(earlier, last) if turn else ()
        with giving_back():
            yield from self.work.statistics(block, self.activations, groups, solved)

    def look(self, block: int, number: int, seen: Any, finished: Sequence[Stored]) -> Iterator[Any]:
        """A round's look at the result so far of one block, after catching up to it."""
        self._catch_up(block, finished, ())
        yield from cast(RoundedWork, self.work).look(block, number, seen, self.activations)

    def _catch_up(self, block: int, finished: Sequence[Stored], last: Sequence[Any]) -> None:
        if self.position is None or self.position > block:
            self.activations = {shard: self.work.open_shard(shard) for shard in self.shards}
            self.position = 0
        while self.position < block:
            done = finished[self.position] if self.position < len(finished) else None
            with giving_back():
                self.work.advance(self.position, done, last if self.position == block - 1 else (), self.activations)
            self.position += 1


@ray.remote(max_retries=0)
def warm_up(work: BlockWork) -> None:
    """Imports what tasks need, while workers open their shards; else the first block would wait for it."""
    work.setup()


@ray.remote(max_retries=RETRIES)
def add_up(spans: Sequence[Span], branches: Sequence[Span], *parts: np.ndarray) -> Any:
    """Sums over some branches, of sums over spans within them."""
    with giving_back():
        found = dict(zip(spans, parts, strict=True))
        sums = [added(found, branch) for branch in branches]
        return sums if len(sums) > 1 else sums[0]


@ray.remote(max_retries=RETRIES)
def prepare(work: BlockWork, group: str, spans: Sequence[Span], *parts: np.ndarray) -> Any:
    """See `BlockWork.prepare`; parts are sums over spans of shards, and all of them together."""
    work.setup()
    with giving_back():
        own = dict(zip(spans, parts, strict=True))
        # A part is the store's own. The sum has no name here, so that `work` can let go of it.
        return work.prepare(group, np.require(added(own, (0, work.shard_count)), requirements="W"))


@ray.remote(max_retries=RETRIES)
def solve(work: BlockWork, block: int, unit: Unit, prepared: Any) -> Any:
    """See `BlockWork.solve`."""
    work.setup()
    with giving_back():
        return work.solve(block, unit, prepared)


@ray.remote(max_retries=RETRIES, num_returns=2)
def begin(work: RoundedWork, block: int, *results: Any) -> tuple[Any, Any]:
    """See `BlockWork.begin`."""
    work.setup()
    with giving_back():
        return work.begin(block, results)


@ray.remote(max_retries=RETRIES, num_returns=2)
def refine(work: RoundedWork, block: int, number: int, seen: Any, kept: Any, *parts: Any) -> tuple[Any, Any]:
    """See `BlockWork.refine`."""
    work.setup()
    with giving_back():
        return work.refine(block, number, seen, kept, parts)


@ray.remote(max_retries=RETRIES)
def assemble(work: BlockWork, block: int, refined: Any | None, *results: Any) -> Stored:
    """See `BlockWork.assemble`."""
    work.setup()
    with giving_back():
        return work.assemble(block, refined, results)
