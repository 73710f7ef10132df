"""The layer-wise engine: spreads the work on each block over shard workers and solve tasks.

It knows blocks, shards and units of work, and nothing of pruning: it is handed a `BlockWork`. Per block:

    statistics   every worker runs its shards through the block        one sum per worker and input
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

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from cluster.errors import Cancelled
from cluster.gangs import awaited, by_node, dismiss, half_bundle, spread, with_gangs
from cluster.losses import NotWritten, cause_of, ours
from cluster.shard_workers import ShardWorker, add_up, assemble, begin, prepare, refine, solve, warm_up
from cluster.spec import ClusterSpec
from cluster.storage import Stored
from cluster.sums import Span, branches
from cluster.work import BlockWork, Unit


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


@dataclass(frozen=True)
class Crew:
    """The processes of one gang; lines up work for them, in references to results that are not there yet.

    Attributes:
        work: what they do.
        shared: a reference to it, for tasks.
        workers: those that hold shards, neighbouring ones on one node.
        shards: what each holds.
        nodes: on each, its workers' places in `workers`, and Ray options of a task there.
        turns: of every block.
        resources: Ray options of a task anywhere.
    """

    work: BlockWork
    shared: Any
    workers: Sequence[Any]
    shards: Sequence[Sequence[int]]
    nodes: Sequence[tuple[range, dict[str, Any]]]
    turns: Sequence[Sequence[Unit]]
    resources: dict[str, Any]

    @classmethod
    def of(cls, group: PlacementGroup, work: BlockWork) -> "Crew":
        """Starts them."""
        shared, shards = ray.put(work), spread(work.shard_count, len(group.bundle_specs))
        workers: list[Any] = []
        nodes = []
        for bundles in by_node(group):
            nodes.append((range(len(workers), len(workers) + len(bundles)), half_bundle(group, bundles[0])))
            for number in bundles:
                own = half_bundle(group, number)
                workers.append(ShardWorker.options(**own).remote(work, shards[len(workers)]))  # type: ignore[attr-defined]
                warm_up.options(**own).remote(shared)
        return cls(work, shared, workers, shards, nodes, work.turns(), half_bundle(group))

    def line_up(self, block: int, finished: Sequence[Stored], before: Sequence[Any]) -> tuple[Any, list[Any]]:
        """All that is done to a block.

        Args:
            block: which one.
            finished: blocks that are.
            before: results of the last turn of the block before, if they are at hand.

        Returns:
            Its file and, of work that flows on, its last turn's results.
        """
        solved: list[list[Any]] = []
        for units in self.turns:
            groups = sorted({unit.group for unit in units if unit.group is not None})
            prepared = self._prepared(block, groups, finished, solved, before) if groups else {}
            solved.append([self._task(solve, block, unit, prepared.get(unit.group)) for unit in units])
        results = list(itertools.chain.from_iterable(solved))
        refined = self._refined(block, results, finished) if self.work.rounds else None
        return self._task(assemble, block, refined, *results), solved[-1] if self.work.flows_on else []

    def _prepared(
        self,
        block: int,
        groups: Sequence[str],
        finished: Sequence[Stored],
        solved: Sequence[Sequence[Any]],
        before: Sequence[Any],
    ) -> dict[str | None, Any]:
        """What `solve` needs, for each distinct input; a Gram goes to a node once, not once per task."""
        last = solved[-1] if solved else before
        spans = [self._branches(shards) for shards in self.shards]
        sums = [
            _several(
                worker.statistics, len(own) * len(groups), block, len(solved), groups, finished, solved[:-1], *last
            )
            for worker, own in zip(self.workers, spans, strict=True)
        ]
        prepared: dict[str | None, Any] = {}
        for number, name in enumerate(groups):
            travel: dict[Span, Any] = {}
            for there, resources in self.nodes:
                parts = {
                    span: part
                    for place in there
                    for span, part in zip(spans[place], sums[place][number :: len(groups)], strict=True)
                }
                travel |= self._on_node(parts, resources) if len(self.nodes) > 1 else parts
            prepared[name] = self._task(prepare, name, list(travel), *travel.values())
        return prepared

    def _on_node(self, parts: Mapping[Span, Any], resources: dict[str, Any]) -> Mapping[Span, Any]:
        """As few sums as there may be of those that lie on one node."""
        whole = self._branches([shard for span in parts for shard in range(*span)])
        if len(whole) == len(parts):
            return parts
        there = add_up.options(**resources, num_returns=len(whole))
        return dict(zip(whole, _listed(there.remote(list(parts), whole, *parts.values())), strict=True))

    def _branches(self, shards: Sequence[int]) -> list[Span]:
        """The largest branches of the sum over all shards that lie in some neighbouring ones."""
        return branches((shards[0], shards[-1] + 1), (0, self.work.shard_count)) if shards else []

    def _refined(self, block: int, results: Sequence[Any], finished: Sequence[Stored]) -> Any:
        """What the rounds make of the units' results."""
        seen, kept = self._task(begin, block, *results)
        for number in range(self.work.rounds):
            parts: list[Any] = []  # in shard order, because workers hold neighbouring shards
            for worker, shards in zip(self.workers, self.shards, strict=True):
                parts += _several(worker.look, len(shards), block, number, seen, finished)
            seen, kept = self._task(refine, block, number, seen, kept, *parts)
        return seen

    def _task(self, function: Any, *arguments: Any) -> Any:
        return function.options(**self.resources).remote(self.shared, *arguments)


def _several(method: Any, count: int, *arguments: Any) -> list[Any]:
    """References to all that a call yields."""
    return _listed(method.options(num_returns=count).remote(*arguments)) if count else []


def _listed(references: Any) -> list[Any]:
    """What Ray gives for a call with several results, or with one."""
    return references if isinstance(references, list) else [references]
