"""A backward pass over the blocks of a model, spread over shard workers: forward, turn, and back, block by block.

Like the layer-wise engine it knows blocks and shards, and nothing of gradients: it is handed a `BackwardWork`. Shards
do not need each other; every worker goes with its own through the same steps:

    0 … n-1     forward through block 0 … n-1
    n           turn: from the last hidden states to their gradients
    n+1 … 2n    backward through block n-1 … 0

Results of shards are summed in shard order, so that the sum does not depend on the workers. A worker that is asked
for a step first catches up with it from wherever it is; one that was lost begins again from its tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from cluster.errors import Cancelled
from cluster.freed import giving_back
from cluster.gangs import RETRIES, awaited, dismiss, half_bundle, with_gangs
from cluster.losses import ours
from cluster.spec import ClusterSpec
from cluster.sums import spread
from cluster.work import ShardedWork


class BackwardWork(ShardedWork, Protocol):
    """What is done at every step."""

    def begin(self, shards: Sequence[int]) -> Any:
        """What a worker holds of its shards before block 0."""

    def forward(self, block: int, held: Any) -> None:
        """Moves it through a block, and keeps what the way back needs."""

    def turn(self, held: Any) -> Sequence[Any]:
        """From activations to gradients; one result per shard."""

    def backward(self, block: int, held: Any) -> Sequence[Any]:
        """Moves gradients back through a block; one result per shard."""

    def total(self, parts: Sequence[Any]) -> Any:
        """Sums the shards' results of one step, given in shard order."""


class Walk:
    """The steps of some shards, in order, from wherever they are. Also runs without Ray."""

    def __init__(self, work: BackwardWork, shards: Sequence[int]) -> None:
        self.work = work
        self.shards = shards
        self.next: int | None = None
        self.held: Any = None

    def step(self, number: int) -> Sequence[Any]:
        """The shards' results of a step, after catching up with it."""
        if self.next is None or self.next > number:
            self.held = self.work.begin(self.shards)
            self.next = 0
        while self.next < number:
            self._take(self.next)
            self.next += 1
        results = self._take(number)
        self.next += 1
        return results

    def _take(self, number: int) -> Sequence[Any]:
        last = self.work.block_count
        if number < last:
            self.work.forward(number, self.held)
            return []
        return self.work.turn(self.held) if number == last else self.work.backward(2 * last - number, self.held)


@ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES)
class BackwardWorker:
    """A process that goes the way with some shards, one block in memory at a time."""

    def __init__(self, work: BackwardWork, shards: Sequence[int]) -> None:
        work.setup()
        self.walk = Walk(work, shards)

    def step(self, number: int) -> Sequence[Any]:
        """See `Walk.step`."""
        with giving_back():
            return self.walk.step(number)


def run_backwards(
    work: BackwardWork,
    spec: ClusterSpec,
    cpus_per_worker: int,
    on_step: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> tuple[Any, list[Any]]:
    """Goes all steps and returns the total of the turn, and of each block's backward from block 0 on.

    Ray replaces single workers. When that is not enough, the gang is given back and another one begins again; totals
    that were there already are kept.

    Args:
        work: what to do.
        spec: how many workers, how long to wait for them, and after how long a step counts as stuck.
        cpus_per_worker: CPUs of each.
        on_step: told how many of how many steps are done.
        stop: asked between steps and while waiting for machines.

    Raises:
        Cancelled: `stop` said so, between steps or while waiting.
        Unavailable: no machines within the time, or one gang after another was lost.
    """
    totals: list[Any] = []  # of the turn, then of blocks from the last to the first
    with_gangs(
        lambda group: _attempt(work, group, spec, totals, on_step, stop),
        lambda: len(totals),
        work.block_count + 1,
        lambda: "begin again",
        spec,
        cpus_per_worker,
        stop,
    )
    return totals[0], totals[:0:-1]


def _attempt(
    work: BackwardWork,
    group: PlacementGroup,
    spec: ClusterSpec,
    totals: list[Any],
    on_step: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> None:
    """One gang's way through all steps; makes `totals` longer.

    Raises:
        MachinesLost: more than Ray itself can make up for.
    """
    steps = 2 * work.block_count + 1
    shared = ray.put(work)
    workers = []
    for number, shards in enumerate(spread(work.shard_count, len(group.bundle_specs))):
        if shards:
            own = half_bundle(group, number)
            workers.append(BackwardWorker.options(**own).remote(shared, shards))  # type: ignore[attr-defined]
    what = "gradients"
    try:
        for step in range(steps):
            if stop():
                raise Cancelled(f"stopped after step {step} of {steps} of the gradient pass")
            what = f"gradients: step {step + 1} of {steps}"
            asked = [worker.step.remote(step) for worker in workers]
            parts = [part for one in asked for part in awaited(one, group, spec, what)]
            if step == work.block_count + len(totals):
                totals.append(work.total(parts))
            on_step(step + 1, steps)
    except RayError as error:
        raise ours(error, what) from error
    finally:
        dismiss(workers)
