"""The layer-wise engine on a real Ray: the same bytes whatever the workers, whatever was lost on the way."""

import os
import signal
from pathlib import Path

import pytest
import ray
from test_blockwork import make_stage
from test_token_weights import weigh

from cluster.errors import Cancelled, Unavailable
from cluster.gangs import gang
from cluster.layerwise import run_blocks
from cluster.spec import ClusterSpec
from cluster.sums import spread
from workflows.blockwork import DensePruneStage, PruneStage
from workflows.recipe import Recovery


class KilledEverywhere(PruneStage):
    """The real work, but its process is killed without a word in each part of it, the first time it gets there."""

    died: Path  # a directory with a file for each death

    def _die_once(self, moment: str) -> None:
        if not (self.died / moment).exists():
            (self.died / moment).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def statistics(self, block, shards, groups, solved=()):
        for number, part in enumerate(super().statistics(block, shards, groups, solved)):
            if block == 1 and number == 0 and len(solved) in (0, 3):
                self._die_once(f"statistics of turn {len(solved)}")
            yield part

    def prepare(self, group, total):
        self._die_once("prepare")
        return super().prepare(group, total)

    def solve(self, block, unit, prepared):
        if block == 1:
            self._die_once("solve")
        return super().solve(block, unit, prepared)

    def look(self, block, number, seen, shards):
        for found in super().look(block, number, seen, shards):
            if block == 1 and number == 1:
                self._die_once("look")
            yield found

    def refine(self, block, number, seen, kept, parts):
        if block == 1:
            self._die_once("refine")
        return super().refine(block, number, seen, kept, parts)

    def assemble(self, block, refined, results):
        if block == 2:
            self._die_once("assemble")
        return super().assemble(block, refined, results)


def run(stage: PruneStage, workers: int, finished=(), on_block=lambda block, stored: None, stop=lambda: False):
    return run_blocks(stage, ClusterSpec(workers=workers, wait_seconds=60), 1, list(finished), on_block, stop)


def hashes(blocks) -> list[str]:
    return [block.sha256 for block in blocks]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("engine"), "2:4", 0.5)


@pytest.fixture(scope="module")
def undisturbed(embedded_ray, stage):
    return hashes(run(stage, 2))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_same_bytes_on_any_number_of_workers(stage, undisturbed, workers):
    assert hashes(run(stage, workers)) == undisturbed


@pytest.fixture(scope="module")
def recovered(embedded_ray, tmp_path_factory):
    stage = make_stage(tmp_path_factory.mktemp("recovery"), "2:4", 0.5, recovery=Recovery(steps=3))
    return stage, hashes(run(stage, 2))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_same_bytes_with_block_recovery(undisturbed, recovered, workers):
    stage, expected = recovered
    assert hashes(run(stage, workers)) == expected != undisturbed


@pytest.mark.slow
def test_same_bytes_with_block_recovery_when_processes_are_killed(recovered, tmp_path):
    stage, expected = recovered
    killed = KilledEverywhere(**stage.__getstate__())
    killed.died = tmp_path
    assert hashes(run(killed, 2)) == expected
    assert {one.name for one in tmp_path.iterdir()} >= {"look", "refine"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PruneStage, DensePruneStage])
def test_same_bytes_where_tokens_are_weighed(stage, undisturbed, kind):
    weighed = kind(**weigh(stage).__getstate__())
    one, two = (hashes(run(weighed, workers)) for workers in (1, 2))
    assert one == two != undisturbed


@pytest.fixture(scope="module")
def dense_states(embedded_ray, tmp_path_factory):
    stage = DensePruneStage(**make_stage(tmp_path_factory.mktemp("dense"), "2:4", 0.5).__getstate__())
    return stage, hashes(run(stage, 2))


class KilledWithDenseStates(KilledEverywhere, DensePruneStage):
    """The same for blocks that do not wait for each other."""


@pytest.mark.slow
def test_same_bytes_where_blocks_do_not_wait_for_each_other(dense_states, tmp_path):
    stage, expected = dense_states
    killed = KilledWithDenseStates(**stage.__getstate__())
    killed.died = tmp_path
    assert hashes(run(killed, 4)) == expected
    assert {one.name for one in tmp_path.iterdir()} == {"statistics of turn 0", "prepare", "solve", "assemble"}


@pytest.mark.slow
def test_a_run_whose_blocks_do_not_wait_goes_on_after_the_last_recorded_one(dense_states):
    stage, expected = dense_states
    recorded = []
    with pytest.raises(Cancelled):
        run(stage, 2, on_block=lambda block, stored: recorded.append(stored), stop=lambda: len(recorded) == 1)
    later = []
    assert hashes(run(stage, 1, recorded, lambda block, stored: later.append(block))) == expected
    assert later == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "sparsity"), [("ffn", 0.25), ("unstructured", 0.5)])
def test_same_bytes_for_the_other_patterns(embedded_ray, tmp_path, pattern, sparsity):
    stage = make_stage(tmp_path, pattern, sparsity)
    results = [hashes(run(stage, workers)) for workers in (1, 2, 4)]
    assert results[0] == results[1] == results[2]


def test_same_bytes_when_processes_are_killed_within_blocks(stage, undisturbed, tmp_path):
    killed = KilledEverywhere(**stage.__getstate__())
    killed.died = tmp_path
    assert hashes(run(killed, 2)) == undisturbed
    assert {one.name for one in tmp_path.iterdir()} == {f"statistics of turn {number}" for number in (0, 3)} | {
        "prepare",
        "solve",
        "assemble",
    }


def test_a_stopped_run_goes_on_after_the_last_recorded_block(stage, undisturbed):
    recorded = []
    with pytest.raises(Cancelled):
        run(stage, 1, on_block=lambda block, stored: recorded.append(stored), stop=lambda: len(recorded) == 1)
    assert len(recorded) == 1
    later = []
    assert hashes(run(stage, 2, recorded, lambda block, stored: later.append(block))) == undisturbed
    assert later == [1, 2], "a finished block was done again"


def test_machines_that_are_not_there_are_named(embedded_ray):
    asked = ClusterSpec(workers=3, gpus_per_worker=8, wait_seconds=1)
    with pytest.raises(Unavailable, match=r"GPU: asked 3 x 8, cluster has 0"), gang(asked, 1, lambda: False):
        pass
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"], "the reservation was not given back"


def test_whoever_waits_for_machines_can_be_stopped(embedded_ray):
    asked = ClusterSpec(workers=3, gpus_per_worker=8, wait_seconds=3600)
    with pytest.raises(Cancelled, match="while waiting"), gang(asked, 1, lambda: True):
        pass


def test_shards_are_spread_evenly_and_in_order():
    assert spread(4, 1) == [[0, 1, 2, 3]]
    assert spread(4, 3) == [[0, 1], [2], [3]]
    assert spread(2, 4) == [[0], [], [1], []]
