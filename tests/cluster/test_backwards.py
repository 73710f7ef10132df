"""The backward engine on a real Ray, with a small work of whole numbers: order, losses, deadlines, a user's stop.

What real gradients become in it is tested in tests/workflows/test_importance_on_ray.py.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from cluster.backwards import Walk, run_backwards
from cluster.errors import Cancelled, InputError
from cluster.losses import MachinesLost
from cluster.spec import ClusterSpec

BLOCKS, SHARDS = 3, 5
STEPS = 2 * BLOCKS + 1


@dataclass
class Written:
    """Every shard writes down where it has been; the result of a step is that text."""

    block_count: int = BLOCKS
    shard_count: int = SHARDS

    def setup(self) -> None:
        pass

    def begin(self, shards):
        return {shard: f"{shard}:" for shard in shards}

    def forward(self, block, held):
        self._write(held, f"f{block}")

    def turn(self, held):
        return self._write(held, "t")

    def backward(self, block, held):
        return self._write(held, f"b{block}")

    def total(self, parts):
        return list(parts)

    def _write(self, held, what):
        for shard in held:
            held[shard] += what
        return list(held.values())


def expected() -> tuple[list[str], list[list[str]]]:
    """What all shards have written when they turn, and when they have come back through each block."""
    turned = [f"{shard}:f0f1f2t" for shard in range(SHARDS)]
    back = {2: "b2", 1: "b2b1", 0: "b2b1b0"}
    return turned, [[one + back[block] for one in turned] for block in range(BLOCKS)]


@dataclass
class Killed(Written):
    """The same, but its process is killed without a word at one step, the first time that anybody gets there."""

    died: str = ""

    def backward(self, block, held):
        if block == 1 and 0 in held:
            try:
                Path(self.died).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().backward(block, held)


class Refuses(Written):
    def turn(self, held):
        raise InputError("this field", "do that")


class Hangs(Written):
    def turn(self, held):
        signal.pause()


def run(work, workers, on_step=lambda done, total: None, stop=lambda: False, **spec):
    return run_backwards(work, ClusterSpec(workers=workers, wait_seconds=60, **spec), 1, on_step, stop)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_all_steps_are_gone_in_order_and_results_come_by_shard_and_block(embedded_ray, workers):
    told = []
    assert run(Written(), workers, on_step=lambda done, total: told.append((done, total))) == expected()
    assert told == [(done, STEPS) for done in range(1, STEPS + 1)]


def test_more_workers_than_shards(embedded_ray):
    assert run(Written(shard_count=1), 3) == ([expected()[0][0]], [[one[0]] for one in expected()[1]])


def test_a_killed_worker_is_replaced_and_goes_its_way_again(embedded_ray, tmp_path):
    died = tmp_path / "died"
    assert run(Killed(died=str(died)), 2) == expected()
    assert died.exists()


def test_a_stopped_pass_gives_its_machines_back(embedded_ray):
    told = []
    with pytest.raises(Cancelled, match=f"after step 2 of {STEPS}"):
        run(Written(), 2, on_step=lambda done, total: told.append(done), stop=lambda: len(told) == 2)
    assert run(Written(), 4) == expected(), "the CPUs are not free again"


def test_an_error_of_the_work_comes_back_as_it_is(embedded_ray):
    with pytest.raises(InputError, match="this field"):
        run(Refuses(), 2)


def test_a_step_that_hangs_is_given_up(embedded_ray):
    with pytest.raises(MachinesLost, match=r"step \d of 7: not done in 2 s"):
        run(Hangs(), 1, block_seconds=2)
    assert ray.is_initialized()


def test_a_walk_goes_on_from_where_it_is():
    walk, (turned, back) = Walk(Written(), range(SHARDS)), expected()
    assert walk.step(BLOCKS) == turned, "it did not catch up"
    assert walk.step(STEPS - 1) == back[0], "it left blocks out"
    assert walk.step(BLOCKS + 1) == back[2], "it did not begin again for a step that lies behind"
