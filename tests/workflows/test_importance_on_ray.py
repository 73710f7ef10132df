"""The gradient pass on a real Ray: the same bits whatever the workers, wherever boundaries lie, whoever was lost."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_importance import LENGTH, SHARDS, WINDOWS, assert_same_bits, make_pass, walked

from cluster.backwards import run_backwards
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.gradient_files import Importance
from workflows.importance import GradientPass, measure_importance
from workflows.recipe import Recipe


class KilledOnceEachWay(GradientPass):
    """The real work, but a worker is killed without a word on the way forward, at the turn and on the way back."""

    died: Path  # a directory with a file for each death

    def _die_once(self, moment: str) -> None:
        try:
            (self.died / moment).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def forward(self, block, held):
        if block == 1:
            self._die_once("forward")
        super().forward(block, held)

    def turn(self, held):
        found = super().turn(held)
        self._die_once("turn")
        return found

    def backward(self, block, held):
        found = super().backward(block, held)
        if block == 1:
            self._die_once("backward")
        return found


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_pass(tmp_path_factory.mktemp("importance"), "gemma3")


@pytest.fixture(scope="module")
def alone(work):
    """The pass in this very process, no Ray."""
    threads = torch.get_num_threads()
    yield walked(work)
    torch.set_num_threads(threads)


def run(work: GradientPass, workers: int) -> Importance:
    spec = ClusterSpec(workers=workers, wait_seconds=60)
    return work.result(*run_backwards(work, spec, 1, lambda done, total: None, lambda: False))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_same_bits_on_any_number_of_workers(embedded_ray, work, alone, workers):
    assert_same_bits(run(work, workers), alone)


@pytest.mark.slow
def test_same_bits_when_workers_are_killed(embedded_ray, work, alone, tmp_path):
    killed = KilledOnceEachWay(**work.__getstate__())
    killed.died = tmp_path
    assert_same_bits(run(killed, 2), alone)
    assert {one.name for one in tmp_path.iterdir()} == {"forward", "turn", "backward"}


@pytest.mark.slow
def test_same_bits_when_boundaries_are_spilled_and_their_worker_is_killed(embedded_ray, work, alone, tmp_path):
    killed = KilledOnceEachWay(**replace(work, memory=0).__getstate__())
    killed.died = tmp_path
    assert_same_bits(run(killed, 2), alone)


def test_two_workers_that_spill_give_the_bits_of_this_process_and_a_recipe_says_how(embedded_ray, work, alone):
    recipe = Recipe.model_validate(
        {
            "model": work.before.source,
            "target": {"pattern": "2:4", "sparsity": 0.5},
            "token_weights": "gradient",
            "data": {
                "shards": SHARDS,
                "calibration": {
                    "source": "builtin:python-docs",
                    "windows": WINDOWS,
                    "length": LENGTH,
                    "part": [0, 0.2],
                },
            },
        }
    )
    store = open_store(work.before.store)
    windows = store.put("windows", store.get(work.windows_key))
    told = []
    spec = ClusterSpec(workers=2, wait_seconds=60, spill_above_gib=0)
    found = measure_importance(
        work.before, windows, recipe, spec, lambda done, total: told.append((done, total)), lambda: False
    )
    assert_same_bits(found, alone)
    assert told[-1] == (7, 7)
