"""The simulation of the engine: its arithmetic, and its bytes against Ray's own count of a real run."""

import json
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import safetensors.torch
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from big_checkpoint import LLAMA_3_8B, shapes_of, write_checkpoint
from scaling import config_of, stage_for, written
from scaling_model import (
    H100_NODES,
    LLAMA_8B,
    LLAMA_70B,
    LLAMA_405B,
    RECIPE,
    Schedule,
    Shape,
    block_steps,
    least_traffic,
    predict,
    store_needed,
    traffic,
)

from cluster.layerwise import run_blocks
from cluster.session import WORKER_PROCESSES, session, worker_environment
from cluster.spec import ClusterSpec
from cluster.storage import Stored

FREE_NETWORK = replace(
    H100_NODES, link=float("inf"), read=float("inf"), add=float("inf"), store=float("inf"), copy=float("inf"), task=0.0
)
SMALL = Shape("small", blocks=2, hidden=512, ffn=1024, key_value=256)
SHORT = Schedule(windows=4, length=32, shards=2, rows=256, workers=2)


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B, LLAMA_405B], ids=lambda one: one.name)
def test_where_moving_and_adding_cost_nothing_more_gpus_are_never_slower(shape):
    seconds = [
        predict(shape, FREE_NETWORK, replace(RECIPE, shards=64, workers=workers)).block for workers in range(1, 65)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0] / 2


def test_a_slower_part_makes_its_own_step_slower_and_no_other():
    schedule = replace(RECIPE, workers=16, shards=16)
    before = block_steps(LLAMA_70B, H100_NODES, schedule)
    for part, step in {
        "gram": "Grams", "factor": "prepare (Cholesky)", "column": "solve",
        "read": "read the checkpoint", "task": "engine, per task", "add": "add up Grams",
    }.items():  # fmt: skip
        rate = getattr(H100_NODES, part)
        slower = rate * 2 if part in ("column", "task") else rate / 2
        after = block_steps(LLAMA_70B, replace(H100_NODES, **{part: slower}), schedule)
        assert {name for name in after if after[name] > before[name]} == {step}


def test_a_block_is_written_while_the_next_one_is_at_work():
    schedule = replace(RECIPE, workers=16, shards=16)
    assert block_steps(LLAMA_70B, H100_NODES, schedule)["write the block"] == 0
    slow = replace(H100_NODES, write_one=1e6)
    assert predict(LLAMA_70B, slow, schedule).block == pytest.approx(LLAMA_70B.block_bytes / 1e6)


def test_more_workers_than_cores_take_turns():
    two = replace(H100_NODES, cores=2, per_node=1, link=float("inf"), read=float("inf"), task=0.0)
    half, full = (block_steps(LLAMA_8B, two, replace(RECIPE, workers=workers, shards=4)) for workers in (2, 4))
    assert {name: full[name] for name in ("forward", "Grams", "solve")} == pytest.approx(
        {name: half[name] for name in ("forward", "Grams", "solve")}
    )


def test_shapes_count_the_weights_of_the_models_they_name():
    assert [round(one.blocks * one.weights / 1e9) for one in (LLAMA_8B, LLAMA_70B, LLAMA_405B)] == [7, 68, 402]
    assert LLAMA_8B.factor_bytes == 4 * (3 * 4096**2 + 14336**2)
    assert LLAMA_8B.gram_bytes == LLAMA_8B.factor_bytes / 2 + 4 * (3 * 4096 + 14336), "folded"


def test_bytes_are_the_least_where_workers_have_two_shards_and_a_node_of_their_own():
    for workers in (2, 4):
        given = replace(RECIPE, workers=workers)
        assert traffic(LLAMA_8B, given, workers).all == least_traffic(LLAMA_8B, given, workers)
    one = traffic(LLAMA_8B, RECIPE, 1).all
    assert one == least_traffic(LLAMA_8B, RECIPE, 1) + LLAMA_8B.gram_bytes, "four shards make two sums"
    assert store_needed(LLAMA_8B, H100_NODES, RECIPE) == one


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("scaling")
    write_checkpoint(found / "model", config_of(SMALL))
    return found


def test_the_simulation_cuts_blocks_as_the_engine_does(directory):
    stage = stage_for(directory, SHORT)
    columns = {one.name: one.columns for one in stage._decoder.linears(0)}
    units = [(unit.stop - unit.start, columns[unit.linear]) for unit in stage.units()]
    assert SHORT.units(SMALL) == units
    assert len({unit.group for unit in stage.units()}) == len(SMALL.widths)


@pytest.mark.slow
def test_bytes_are_those_that_ray_counts(directory):
    with session(ClusterSpec(), cpus=2):
        before = written()
        run_blocks(
            stage_for(directory, SHORT), ClusterSpec(workers=2), 1, [], lambda block, stored: None, lambda: False
        )
        counted = written() - before
    assert counted == pytest.approx(SMALL.blocks * traffic(SMALL, SHORT, nodes=1).all, rel=0.01)


@pytest.mark.slow
def test_bytes_and_blocks_of_two_nodes_with_two_workers_each(directory):
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once: later tests keep it
    given = replace(SHORT, shards=4, workers=4)
    stage = stage_for(directory, given)

    def run(workers: int) -> list[Stored]:
        return run_blocks(stage, ClusterSpec(workers=workers), 1, [], lambda block, stored: None, lambda: False)

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": WORKER_PROCESSES},
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        ray.init(cluster.address, runtime_env=worker_environment(), log_to_driver=False, logging_level="ERROR")
        before = written()
        blocks = run(given.workers)
        counted = written() - before
        assert run(1) == blocks, "the number of workers shows in the bytes"
    finally:
        ray.shutdown()
        cluster.shutdown()
    predicted = traffic(SMALL, given, nodes=2)
    assert predicted.grams == 4 * SMALL.gram_bytes
    assert predicted.added == 2 * SMALL.gram_bytes, "two sums on a node become one"
    # Units may all be solved where the factors are: then nothing of these travels.
    assert 0 <= SMALL.blocks * predicted.all - counted <= SMALL.blocks * predicted.factors * 1.1


def test_a_made_checkpoint_is_a_stock_one_and_is_made_once(directory):
    model = directory / "model"
    files = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    total = write_checkpoint(model, config_of(SMALL))
    assert files == {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    stored = {
        name: one for file in model.glob("*.safetensors") for name, one in safetensors.torch.load_file(file).items()
    }
    assert {name: tuple(one.shape) for name, one in stored.items()} == shapes_of(config_of(SMALL))
    assert sum(one.nbytes for one in stored.values()) == total
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert all(one.eq(stored[name]).all() for name, one in loaded.state_dict().items())
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert LLAMA_3_8B["num_hidden_layers"] * LLAMA_8B.block_bytes < 16e9
