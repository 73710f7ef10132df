"""The processes of one gang, and how a block's work is lined up for them; see `cluster.layerwise`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from cluster.gangs import by_node, half_bundle
from cluster.shard_workers import ShardWorker, add_up, assemble, begin, prepare, refine, solve, warm_up
from cluster.storage import Stored
from cluster.sums import Span, branches, of_worker, spread
from cluster.work import BlockWork, Unit


@dataclass(frozen=True)
class Crew:
    """Lines up work in references to results that are not there yet.

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
        spans = [of_worker(shards, self.work.shard_count) for shards in self.shards]
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
        held = (min(parts)[0], max(parts)[1]) if parts else (0, 0)
        whole = branches(held, (0, self.work.shard_count))
        if len(whole) == len(parts):
            return parts
        there = add_up.options(**resources, num_returns=len(whole))
        return dict(zip(whole, _listed(there.remote(list(parts), whole, *parts.values())), strict=True))

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
