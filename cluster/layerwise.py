"""The layer-wise engine: spreads the work on each block over shard workers and solve tasks.

It knows blocks, shards and units of work, and nothing of pruning: it is handed a `BlockWork`. Per block:

    statistics   every worker runs its shards through the block        one sum per two shards and input
    add up       one task per node and input, where there are several  so one sum per node travels
    prepare      one task per input adds up these                      all in a tree that is fixed over the shards, so
                                                                       that bits do not depend on who holds them
    solve        one task per unit (a chunk of rows)                   retried by Ray
                 (these four turn by turn, where statistics depend on what became of earlier units)
    look, refine rounds on request: every worker looks at the result   a task makes a better one of what they saw
    assemble     one task writes the finished block to the store       then it is recorded

There is no step to move shards on: a worker that is asked for block i first catches up, from whatever it holds to
block i. A new worker, a restarted one and a resumed run all go that one way, through the finished blocks.

A block's work is lined up while the one before is still at work, so that nobody waits for its file to be written and
recorded. Who holds activations within that block goes on through its last results; who is new cannot, and then the
work is lined up again, behind the file.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from cluster.crew import Crew
from cluster.errors import Cancelled
from cluster.gangs import awaited, dismiss, with_gangs
from cluster.losses import NotWritten, cause_of, ours
from cluster.spec import ClusterSpec
from cluster.storage import Stored
from cluster.work import BlockWork


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
    crew = Crew.of(group, work)
    at_work: list[Any] = []
    last: list[Any] = []  # results of the last turn of the block that was lined up last
    try:
        while len(blocks) < work.block_count:
            if stop():
                raise Cancelled(f"stopped after block {len(blocks)} of {work.block_count}")
            block = len(blocks)
            while len(at_work) < min(work.lookahead, work.block_count - block):
                written, last = crew.line_up(block + len(at_work), list(blocks), last)
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
        dismiss(crew.workers)
