"""The layer-wise engine: spreads the work on each block over shard workers and solve tasks.

It knows blocks, shards and units of work, and nothing of pruning: it is handed a `BlockWork`. Per block:

    statistics   every worker runs its shards through the block       one result per shard and input
    prepare      one task per distinct input sums them in shard order  so the sum does not depend on the workers
    solve        one task per unit (a chunk of rows)                   retried by Ray
                 (these three turn by turn, where statistics depend on what became of earlier units)
    look, refine rounds on request: every worker looks at the result   a task makes a better one of what they saw
    assemble     one task writes the finished block to the store       then it is recorded

There is no step to move shards on: a worker that is asked for block i first catches up, from whatever it holds to
block i. A new worker, a restarted one and a resumed run all go that one way, through the finished blocks.

A block's work is lined up while the one before is still at work, so that nobody waits for its file to be written and
recorded. Who holds activations within that block goes on through its last results; who is new cannot, and then the
work is lined up again, behind the file.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import Cancelled
from cluster.freed import giving_back
from cluster.losses import AGAIN, MachinesLost, NotWritten, cause_of, ours
from cluster.session import gang
from cluster.spec import ClusterSpec
from cluster.storage import Stored
from cluster.work import BlockWork, RoundedWork, Unit

log = logging.getLogger(__name__)

# How often Ray restarts a lost worker or repeats a lost task.
RETRIES = 5
# How many gangs in a row may be lost without finishing one block; then the run gives up, and can be resumed.
GANGS = 3
LOOK_AGAIN = 1.0  # seconds between looks at whether the machines of a block are still there


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
        """Statistics of some inputs of one block, after catching up to it.

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
def prepare(work: BlockWork, group: str, *parts: Any) -> Any:
    """See `BlockWork.prepare`."""
    work.setup()
    with giving_back():
        return work.prepare(group, parts)


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


def run_blocks(
    work: BlockWork,
    spec: ClusterSpec,
    cpus_per_worker: int,
    finished: Sequence[Stored],
    on_block: Callable[[int, Stored], None],
    stop: Callable[[], bool],
) -> list[Stored]:
    """Works through all blocks in order and returns their files.

    Ray replaces single workers and repeats single tasks. When that is not enough – a machine is gone and nothing
    takes its place, or something hangs – the gang is given back and another one goes on at the block at hand.

    Args:
        work: what to do.
        spec: how many workers, how long to wait for them, and after how long a block counts as stuck.
        cpus_per_worker: CPUs of each; a worker and the tasks share its bundle half and half, since they take turns.
        finished: blocks that an earlier attempt recorded; work goes on after them.
        on_block: called with each block as soon as it is written, to record it.
        stop: asked between blocks and while waiting for machines.

    Raises:
        Cancelled: `stop` said so, between blocks or while waiting; all finished blocks are recorded.
        Unavailable: no machines within the time, or one gang after another was lost.
    """
    blocks = list(finished)

    def note(block: int, stored: Stored) -> None:
        on_block(block, stored)
        blocks.append(stored)

    with_gangs(
        lambda group: _attempt(work, group, spec, blocks, note, stop),
        lambda: len(blocks),
        work.block_count,
        lambda: f"go on at block {len(blocks)}",
        spec,
        cpus_per_worker,
        stop,
    )
    return blocks


def with_gangs(
    attempt: Callable[[PlacementGroup], None],
    done: Callable[[], int],
    goal: int,
    then: Callable[[], str],
    spec: ClusterSpec,
    cpus_per_worker: int,
    stop: Callable[[], bool],
) -> None:
    """Attempts with one gang of machines after another, until all is done.

    Args:
        attempt: works with a gang; MachinesLost when it cannot go on with this one.
        done: how much is done.
        goal: how much there is to do.
        then: what other machines do after a loss, for the log.
        spec: as for `gang`.
        cpus_per_worker: as for `gang`.
        stop: as for `gang`.

    Raises:
        Cancelled: `stop` said so.
        Unavailable: no machines within the time, or `GANGS` in a row were lost with nothing more done.
    """
    lost = 0
    while (begun := done()) < goal:
        try:
            with gang(spec, cpus_per_worker, stop) as group:
                attempt(group)
        except MachinesLost as error:
            lost = 0 if done() > begun else lost + 1
            if lost == GANGS:
                raise
            log.warning("%s; other machines %s", error.message, then())


def _attempt(
    work: BlockWork,
    group: PlacementGroup,
    spec: ClusterSpec,
    blocks: Sequence[Stored],
    note: Callable[[int, Stored], None],
    stop: Callable[[], bool],
) -> None:
    """One gang's work on all blocks that are left. `note` makes `blocks` longer.

    Raises:
        MachinesLost: more than Ray itself can make up for.
    """
    resources = half_bundle(group)
    shared = ray.put(work)
    workers = [
        ShardWorker.options(**resources).remote(work, shards)  # type: ignore[attr-defined]
        for shards in spread(work.shard_count, len(group.bundle_specs))
    ]
    for _ in workers:
        warm_up.options(**resources).remote(shared)
    turns = work.turns()
    at_work: list[Any] = []
    last: list[Any] = []  # results of the last turn of the block that was lined up last
    try:
        while len(blocks) < work.block_count:
            if stop():
                raise Cancelled(f"stopped after block {len(blocks)} of {work.block_count}")
            block = len(blocks)
            while len(at_work) < min(work.lookahead, work.block_count - block):
                new = block + len(at_work)
                written, last = _written(work, shared, workers, new, turns, list(blocks), last, resources)
                at_work.append(written)
            try:
                note(block, awaited(at_work.pop(0), group, spec, f"block {block} of {work.block_count}"))
            except RayError as error:
                if not isinstance(cause_of(error), NotWritten):
                    raise
                at_work.clear()
                last = []
    except RayError as error:
        raise ours(error, f"block {len(blocks)} of {work.block_count}") from error
    finally:
        dismiss(workers)


def dismiss(workers: Sequence[Any]) -> None:
    """Ends workers at once."""
    for worker in workers:
        with suppress(RayError):  # Ray itself may be what is gone
            ray.kill(worker)


def awaited(written: Any, group: PlacementGroup, spec: ClusterSpec, what: str) -> Any:
    """Waits for a block's result, but not for ever.

    Raises:
        MachinesLost: the gang is broken and not made whole again within `spec.wait_seconds`, or the block is not done
            within `spec.block_seconds`. Ray itself waits for ever in both cases: it notices dead processes and
            nodes, not a process that hangs, nor that nobody will bring another machine.
    """
    started = whole = time.monotonic()
    while True:
        done, _ = ray.wait([written], timeout=LOOK_AGAIN)
        if done:
            return ray.get(written)
        now = time.monotonic()
        if placement_group_table(group)["state"] == "CREATED":
            whole = now
        if now - whole > spec.wait_seconds:
            raise MachinesLost(f"{what}: a machine was lost and none took its place in {spec.wait_seconds:g} s", AGAIN)
        if now - started > spec.block_seconds:
            raise MachinesLost(f"{what}: not done in {spec.block_seconds:g} s, so something hangs", AGAIN)


def _written(
    work: BlockWork,
    shared: Any,
    workers: Sequence[Any],
    block: int,
    turns: Sequence[Sequence[Unit]],
    finished: Sequence[Stored],
    before: Sequence[Any],
    resources: dict[str, Any],
) -> tuple[Any, list[Any]]:
    """References to one block's file and, of work that flows on, to its last turn's results; all is lined up at once.

    `before` are such results of the block before, if they are at hand.
    """
    solved: list[list[Any]] = []
    for units in turns:
        groups = sorted({unit.group for unit in units if unit.group is not None})
        prepared = _prepared(work, shared, workers, block, groups, finished, before, solved, resources)
        solved.append(
            [solve.options(**resources).remote(shared, block, unit, prepared.get(unit.group)) for unit in units]
        )
    results = list(itertools.chain.from_iterable(solved))
    refined = None
    if work.rounds:
        refined = _refined(cast(RoundedWork, work), shared, workers, block, results, finished, resources)
    return assemble.options(**resources).remote(shared, block, refined, *results), solved[-1] if work.flows_on else []


def _prepared(
    work: BlockWork,
    shared: Any,
    workers: Sequence[Any],
    block: int,
    groups: Sequence[str],
    finished: Sequence[Stored],
    before: Sequence[Any],
    solved: Sequence[Sequence[Any]],
    resources: dict[str, Any],
) -> dict[str | None, Any]:
    """References to what `solve` needs, one per distinct input; a Gram goes to a node once, not once per task."""
    if not groups:
        return {}
    parts = _from_shards(
        work,
        workers,
        len(groups),
        lambda one: one.statistics,
        block,
        len(solved),
        groups,
        finished,
        solved[:-1],
        *(solved[-1] if solved else before),
    )
    return {
        name: prepare.options(**resources).remote(shared, name, *parts[number :: len(groups)])
        for number, name in enumerate(groups)
    }


def _refined(
    work: RoundedWork,
    shared: Any,
    workers: Sequence[Any],
    block: int,
    results: Sequence[Any],
    finished: Sequence[Stored],
    resources: dict[str, Any],
) -> Any:
    """A reference to what the rounds make of the units' results; all rounds are lined up at once."""
    seen, kept = begin.options(**resources).remote(shared, block, *results)
    for number in range(work.rounds):
        parts = _from_shards(work, workers, 1, lambda one: one.look, block, number, seen, finished)
        seen, kept = refine.options(**resources).remote(shared, block, number, seen, kept, *parts)
    return seen


def _from_shards(
    work: BlockWork, workers: Sequence[Any], each: int, method: Callable[[Any], Any], *arguments: Any
) -> list[Any]:
    """References to what workers find, `each` per shard; in shard order, because workers hold consecutive shards."""
    parts: list[Any] = []
    for worker, shards in zip(workers, spread(work.shard_count, len(workers)), strict=True):
        count = len(shards) * each
        got = method(worker).options(num_returns=count).remote(*arguments) if count else []
        parts += got if isinstance(got, list) else [got]
    return parts


def spread(shards: int, workers: int) -> list[list[int]]:
    """Consecutive shards for each worker, as even as can be; a worker too many gets none."""
    bounds = [math.ceil(worker * shards / workers) for worker in range(workers + 1)]
    return [list(range(low, high)) for low, high in itertools.pairwise(bounds)]


def half_bundle(group: PlacementGroup, number: int = -1) -> dict[str, Any]:
    """Ray options for something that takes half of one worker's bundle: of bundle `number`, or of any."""
    bundle = group.bundle_specs[0]
    return {
        "num_cpus": bundle["CPU"] / 2,
        "num_gpus": bundle.get("GPU", 0) / 2,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, number, placement_group_capture_child_tasks=False
        ),
    }
