"""A scoring pass finds what formulas over the whole model say, and changes nothing."""

import json

import numpy as np
import pytest
import torch
from models_for_tests import write_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from cluster.alone import totals
from cluster.backwards import Walk
from cluster.layerwise import run_blocks
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.data.windows import Windows, to_parquet
from workflows.gradient_files import put_gradients
from workflows.importance import GradientPass
from workflows.level_files import LevelFile
from workflows.models.state import ModelState
from workflows.pruning.patterns import achieved
from workflows.recipe import Solver
from workflows.scored import OUTLIER, BlockScores, ScoreStage
from workflows.scoring.gram import damped

LENGTH, WINDOWS, SHARDS, ROWS = 32, 6, 3, 24
LEVELS = (0.3, 0.5, 0.7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The fields that scoring and gradients share."""
    path = tmp_path_factory.mktemp("scored")
    directory = write_tiny_model(path / "model", "gemma3", layers=3, hidden=64, ffn=96, dtype="float32")
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(path / "store"))
    tokens = np.random.default_rng(0).integers(4, config["vocab_size"], (WINDOWS, LENGTH)).astype(np.int32)
    windows = store.put("windows", to_parquet({"calibration": Windows(tokens=tokens, slices=["all"] * WINDOWS)}))
    before = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    return dict(before=before, windows_key=windows.key, shard_count=SHARDS, dtype="float32", device="cpu", threads=1)


@pytest.fixture(scope="module")
def importance(base):
    work = GradientPass(**base, memory=1 << 30)
    work.setup()
    walk = Walk(work, range(SHARDS))
    totals = [work.total(parts) for step in range(2 * work.block_count + 1) if (parts := walk.step(step))]
    return work.result(totals[0], totals[:0:-1])


@pytest.fixture(scope="module")
def stage(base, importance):
    stored = put_gradients(open_store(base["before"].store), "gammas", importance)
    return ScoreStage(
        **base, norms=None, gammas=stored, levels=LEVELS, solver=Solver(rows=ROWS), key_prefix="one/scores"
    )


def scored(stage: ScoreStage) -> list[BlockScores]:
    """What the engine does, in one process."""
    stage.setup()
    units = stage.units()
    groups = sorted({unit.group for unit in units})
    shards = {shard: stage.open_shard(shard) for shard in range(SHARDS)}
    found = []
    for block in range(stage.block_count):
        sums = totals(stage.statistics(block, shards, groups), groups, SHARDS)
        prepared = {name: stage.prepare(name, total) for name, total in sums.items()}
        stored = stage.assemble(block, None, [stage.solve(block, unit, prepared[unit.group]) for unit in units])
        stage.advance(block, stored, (), shards)
        found.append(BlockScores.model_validate_json(open_store(stage.before.store).get(stored.key)))
    return found


@pytest.fixture(scope="module")
def found(stage):
    return scored(stage)


@pytest.fixture(scope="module")
def reference(stage):
    """Every linear of the whole model in memory, with the Gram of its inputs."""
    model = AutoModelForCausalLM.from_pretrained(stage.before.source, dtype=torch.float32).eval().requires_grad_(False)
    linears = [
        {name: one for name, one in layer.named_modules() if isinstance(one, nn.Linear)} for layer in model.model.layers
    ]
    grams = [{name: torch.zeros(one.in_features, one.in_features) for name, one in own.items()} for own in linears]
    for own, sums in zip(linears, grams, strict=True):
        for name, one in own.items():

            def add(_, args, total=sums[name]):
                total += args[0].flatten(0, -2).mT @ args[0].flatten(0, -2)

            one.register_forward_pre_hook(add)
    with torch.no_grad():
        for window in stage._tokens:
            model(window[None], use_cache=False)
    return linears, grams


def test_costs_are_the_second_order_loss_of_the_rows_that_are_kept_at_each_level(stage, found, reference, importance):
    linears, grams = reference
    for block, scores in enumerate(found):
        levels = LevelFile(open_store(stage.before.store), scores.levels.key)
        assert scores.linears.keys() == linears[block].keys()
        for name, one in scores.linears.items():
            dense, gamma = linears[block][name].weight.double(), importance.gammas[block][name].double()
            assert (one.weights, one.zeros) == (dense.numel(), 0)
            assert list(one.costs) == sorted(one.costs)
            for number, level in enumerate(LEVELS):
                kept = levels.read(name, number)
                assert level <= achieved(kept) < level + ROWS / dense.numel() * 3
                change = kept.double() - dense
                expected = ((change @ grams[block][name].double() * change).sum(1) @ gamma) / 2
                assert one.costs[number] == pytest.approx(float(expected), rel=1e-3)


def test_curves_are_quantiles_of_the_composite_saliency(found, reference, importance, stage):
    linears, grams = reference
    for block, scores in enumerate(found):
        for name, one in scores.linears.items():
            dense, gamma = linears[block][name].weight.double(), importance.gammas[block][name].double()
            inverse = torch.linalg.inv(damped(grams[block][name], stage.solver.damping).double()).diagonal()
            saliency = (dense.square() * gamma[:, None] / inverse / 2).flatten().sort().values
            wanted = saliency[[(len(saliency) - 1) * percent // 100 for percent in range(101)]]
            np.testing.assert_allclose(one.curve, wanted.numpy(), rtol=0.1)  # quantiles between two values, bins
            rows = [row for row in scores.rows if row["linear"] == name and row["part"] is None]
            assert [row["weights"] for row in rows] == [dense.numel()]


def test_outliers_are_counted_over_the_whole_block(found, reference):
    linears, grams = reference
    for block, scores in enumerate(found):
        wanda = torch.cat(
            [
                (one.weight.abs() * grams[block][name].diagonal().sqrt()).flatten()
                for name, one in linears[block].items()
            ]
        )
        expected = (wanda > OUTLIER * wanda.mean()).double().mean().item()
        assert scores.outliers == pytest.approx(expected, abs=2e-3)


def test_the_inputs_alone_do_without_gradients_and_give_the_same_outliers(base, found):
    plain = scored(ScoreStage(**base, norms=None, gammas=None, levels=(), solver=Solver(), key_prefix="two/scores"))
    for one, two in zip(plain, found, strict=True):
        assert one.outliers == pytest.approx(two.outliers, abs=1e-4)
        assert one.levels is None
        assert not one.rows


@pytest.mark.slow
def test_on_ray_the_bytes_are_those_of_one_process_and_scoring_goes_on_after_recorded_blocks(stage, found):
    with session(ClusterSpec(), cpus=4):
        recorded = []
        spec = ClusterSpec(workers=2, wait_seconds=60)
        blocks = run_blocks(stage, spec, 1, [], lambda block, stored: recorded.append(stored), lambda: False)
        again = run_blocks(stage, spec, 1, recorded[:2], lambda block, stored: None, lambda: False)
    store = open_store(stage.before.store)
    assert [BlockScores.model_validate_json(store.get(one.key)) for one in blocks] == found
    assert [one.sha256 for one in again] == [one.sha256 for one in blocks]
